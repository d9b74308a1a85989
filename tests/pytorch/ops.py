"""Compares annulus' clipping and optimizers with PyTorch's on the same numbers.

    python3 tests/pytorch/ops.py FILE

FILE (safetensors, written by `tests/pytorch_ops.rs`) holds inputs and what annulus made of them; its metadata holds the
hyper-parameters. Prints one line a comparison and exits with 1 if one is beyond its bound.
"""

import json
import struct
import sys

import torch

# Relative to the larger of the two numbers unless said otherwise; 6e-8 is half an ulp of f32.
BOUND_EXACT = 1.3e-7  # against the same formula in f64: what annulus promises, 2^-23 and one rounding
BOUND_NORM = 2e-5  # PyTorch adds up a tensor in f32: at 100,003 elements it is off by 5e-7 (p = 2) to 1e-5 (p = 3.5)
BOUND_NORM_HALF = 2**-7  # PyTorch rounds each tensor's norm, and the norm of the norms, to the gradients' dtype
BOUND_WEIGHTS = 1e-6  # absolute; 100 steps of size about 1e-2, each rounded in its own way (2.4e-7 seen)
BOUND_MOMENTS = 2e-6  # relative to the largest of the tensor (4.3e-7 seen)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def load(path):
    """Tensors and metadata, read by hand: the format is a length, a JSON header and the bytes."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        dtype = DTYPES[entry["dtype"]]
        tensors[name] = torch.frombuffer(bytearray(data[start:end]), dtype=dtype).reshape(entry["shape"]).clone()
    return tensors, metadata


failures = 0


def compare(what, difference, bound):
    global failures
    # Written so that NaN fails.
    within = difference <= bound
    failures += not within
    print(f"{'ok  ' if within else 'FAIL'} {what:<44} {difference:9.2e}  bound {bound:.1e}")


def relative(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs() / torch.maximum(actual.abs(), expected.abs()).clamp_min(1e-30)).max().item()


def parameters(tensors, prefix):
    return [torch.nn.Parameter(tensors[name].clone()) for name in sorted(tensors) if name.startswith(prefix)]


def check_clipping(tensors, metadata):
    max_norm = float(metadata["max_norm"])
    for dtype in ["f32", "bf16", "f16"]:
        for norm_type in [1.0, 2.0, 3.0, 3.5, float("inf")]:
            names = sorted(name for name in tensors if name.startswith(f"gradient.{dtype}."))
            params = [torch.nn.Parameter(torch.zeros_like(tensors[name])) for name in names]
            for param, name in zip(params, names):
                param.grad = tensors[name].clone()
            case = f"{dtype}.{norm_type}"
            flat = torch.cat([param.grad.flatten().double() for param in params])
            exact = torch.linalg.vector_norm(flat, norm_type)
            total = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type=norm_type)
            ours = tensors[f"norm.{case}"]
            compare(f"norm {case} and f64", relative(ours, exact.reshape(1)), BOUND_EXACT)
            bound = BOUND_NORM if dtype == "f32" else BOUND_NORM_HALF
            compare(f"norm {case}", relative(ours, total.reshape(1)), bound)
            if dtype == "f32":
                clipped = [tensors[f"clipped.{case}.{index}"] for index in range(len(params))]
                flat_clipped = torch.cat([tensor.flatten() for tensor in clipped])
                expected = flat * (max_norm / (exact + 1e-6)).clamp(max=1.0)
                compare(f"clipped {case} and f64", relative(flat_clipped, expected), 2 * BOUND_EXACT)
                worst = max(relative(ours, param.grad) for ours, param in zip(clipped, params))
                compare(f"clipped {case}", worst, BOUND_NORM)


def run_steps(tensors, optimizer, params, steps, max_norm):
    for step in range(steps):
        for index, param in enumerate(params):
            param.grad = tensors[f"step.{index}"][step].clone()
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()


def check_optimizer(tensors, metadata, name, make, states):
    steps, max_norm = int(metadata["steps"]), float(metadata["max_norm"])
    for variant in ["foreach", "fused", "plain"]:
        flags = {"foreach": variant == "foreach", "fused": variant == "fused"}
        params = parameters(tensors, "initial.")
        optimizer = make(params, flags)
        run_steps(tensors, optimizer, params, steps, max_norm)
        weights = max(
            (tensors[f"{name}.weights.{index}"] - param.detach()).abs().max().item()
            for index, param in enumerate(params)
        )
        compare(f"{name} ({variant}), weights after {steps} steps", weights, BOUND_WEIGHTS)
        for theirs, ours in states:
            worst = 0.0
            for index, param in enumerate(params):
                expected = optimizer.state[param][theirs]
                difference = (tensors[f"{name}.{ours}.{index}"] - expected).abs().max() / expected.abs().max()
                worst = max(worst, difference.item())
            compare(f"{name} ({variant}), {theirs}", worst, BOUND_MOMENTS)


def main():
    torch.set_num_threads(1)
    tensors, metadata = load(sys.argv[1])
    check_clipping(tensors, metadata)
    options = json.loads(metadata["adamw"])
    check_optimizer(
        tensors,
        metadata,
        "adamw",
        lambda params, flags: torch.optim.AdamW(
            params,
            lr=options["lr"],
            betas=(options["beta1"], options["beta2"]),
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            **flags,
        ),
        [("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")],
    )
    for name in ["sgd", "nesterov"]:
        sgd = json.loads(metadata[name])
        check_optimizer(
            tensors,
            metadata,
            name,
            lambda params, flags: torch.optim.SGD(params, **sgd, **flags),
            [("momentum_buffer", "velocity")],
        )
    print(f"{failures} beyond their bounds, torch {torch.__version__}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
