"""PyTorch's versions of what annulus-gpu times, on the same shapes: python3 pytorch.py ROUNDS LEN LEN ..

Prints a line of JSON for each: median, fastest and slowest of ROUNDS between two CUDA events.
"""

import json
import sys

import torch

rounds, lens = int(sys.argv[1]), [int(word) for word in sys.argv[2:]]
f32, bf16 = torch.float32, torch.bfloat16


def tensors(dtype):
    return [torch.rand(length, device="cuda", dtype=dtype).sub_(0.5) for length in lens]


def parameters(dtype):
    made = [torch.nn.Parameter(torch.rand(length, device="cuda", dtype=dtype)) for length in lens]
    for parameter in made:
        parameter.grad = torch.rand_like(parameter).sub_(0.5)
    return made


def clip(dtype, max_norm):
    made = parameters(dtype)
    return lambda: torch.nn.utils.clip_grad_norm_(made, max_norm, foreach=True)


def norm(dtype, order):
    made = tensors(dtype)
    return lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(made, order)), order)


def copy(source, target):
    sources, targets = tensors(source), tensors(target)
    return lambda: torch._foreach_copy_(targets, sources)


def unscale():
    gradients, targets = tensors(f32), tensors(bf16)
    found, inverse = torch.zeros(1, device="cuda"), torch.ones(1, device="cuda")

    def run():
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
        torch._foreach_copy_(targets, gradients)
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(targets, 2)), 2)

    return run


def accumulate():
    sums, gradients = tensors(f32), tensors(bf16)
    return lambda: torch._foreach_add_(sums, gradients, alpha=0.25)


def adamw(made):
    return torch.optim.AdamW(made, lr=1e-4, weight_decay=0.01, fused=True)


def clip_and_step(optimizer):
    made = parameters(f32)
    optimizer = optimizer(made)

    def run():
        torch.nn.utils.clip_grad_norm_(made, 1.0, foreach=True)
        optimizer.step()

    return run


def clip_and_step_with_master():
    made, gradients, copies = parameters(f32), tensors(bf16), tensors(bf16)
    optimizer, wide = adamw(made), [parameter.grad for parameter in made]

    def run():
        torch._foreach_copy_(wide, gradients)
        torch.nn.utils.clip_grad_norm_(made, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(copies, made)

    return run


def sgd(made):
    return torch.optim.SGD(made, lr=1e-4, momentum=0.9, weight_decay=0.01, fused=True)


CLIP, COPY = "clip_grad_norm_(foreach=True)", "_foreach_copy_"
UNSCALE = f"_amp_foreach_non_finite_check_and_unscale_, {COPY}, _foreach_norm"
CASES = {
    "norm and clip, nothing to clip, bf16": (CLIP, lambda: clip(bf16, 1e9)),
    "norm and clip, clipping, bf16": (CLIP, lambda: clip(bf16, 1.0)),
    "norm and clip, clipping, f32": (CLIP, lambda: clip(f32, 1.0)),
    "L2 norm, bf16": ("_foreach_norm", lambda: norm(bf16, 2)),
    "L1 norm, bf16": ("_foreach_norm", lambda: norm(bf16, 1)),
    "inf norm, bf16": ("_foreach_norm", lambda: norm(bf16, float("inf"))),
    "L2 norm, f32": ("_foreach_norm", lambda: norm(f32, 2)),
    "cast f32 to bf16": (COPY, lambda: copy(f32, bf16)),
    "cast bf16 to f32": (COPY, lambda: copy(bf16, f32)),
    "unscale, cast and norm, f32 to bf16": (UNSCALE, unscale),
    "accumulate bf16 into f32": ("_foreach_add_(alpha)", accumulate),
    "clip and AdamW, f32": (f"{CLIP}, AdamW(fused=True)", lambda: clip_and_step(adamw)),
    "clip and AdamW, bf16 with f32 master": (f"{COPY}, {CLIP}, AdamW(fused=True), {COPY}", clip_and_step_with_master),
    "clip and SGD with momentum, f32": (f"{CLIP}, SGD(fused=True)", lambda: clip_and_step(sgd)),
}


def time(run):
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) * 1e3 for start, stop in events)


for what, (how, prepare) in CASES.items():
    torch.cuda.empty_cache()
    try:
        us = time(prepare())
        peer = {"what": what, "how": f"torch {torch.__version__}, {how}", "us": us[len(us) // 2]}
        line = {"peer": peer | {"range_us": [us[0], us[-1]]}}
    except Exception as error:  # The other cases are still worth their time.
        line = {"skipped": f"{what} by PyTorch: {error}"}
    print(json.dumps(line), flush=True)
