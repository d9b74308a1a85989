"""PyTorch's CPU versions of what `benches/ops.rs` times, on one thread, driven by it so that both are timed by turns.

    python3 benches/ops_pytorch.py 100000000 FD FD FD FD FD FD

The descriptors are the memory of gradient, master weights, first and second moment (float32), model (bfloat16) and half
(float16): the tensors of `benches/ops.rs` themselves, because on a virtual machine the same loop takes half as long again over
other pages.

Prints the names of the operations it has on one line; then, for each name read from standard input, runs that operation once
and prints its milliseconds. In place where annulus works in place, preallocated outputs elsewhere, so that no allocation is
timed; the optimizers are PyTorch's fused ones.
"""

import mmap
import sys
import time

import torch


def operations(len_elems, fds):
    def tensor(fd, dtype):
        return torch.frombuffer(mmap.mmap(fd, len_elems * dtype.itemsize), dtype=dtype)

    gradient, master, exp_avg, exp_avg_sq = (tensor(fd, torch.float32) for fd in fds[:4])
    model, half = tensor(fds[4], torch.bfloat16), tensor(fds[5], torch.float16)
    weight = torch.nn.Parameter(master)
    weight.grad = gradient
    coefficient = torch.tensor(0.9999999)
    adamw = torch.optim.AdamW([weight], lr=1e-4, fused=True)
    adamw.state[weight] = {"step": torch.tensor(10.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    sgd = torch.optim.SGD([weight], lr=1e-4, momentum=0.9, weight_decay=0.01, fused=True)
    sgd.state[weight] = {"momentum_buffer": exp_avg}

    def unscale_and_norm():
        torch._foreach_mul_([gradient], coefficient)
        torch._foreach_norm([gradient], 2)

    return {
        "norm_l2_f32": lambda: torch._foreach_norm([gradient], 2),
        "norm_l1_f32": lambda: torch._foreach_norm([gradient], 1),
        "norm_inf_f32": lambda: torch._foreach_norm([gradient], float("inf")),
        "norm_p3_f32": lambda: torch._foreach_norm([gradient], 3.0),
        "norm_p3.5_f32": lambda: torch._foreach_norm([gradient], 3.5),
        "norm_l2_bf16": lambda: torch._foreach_norm([model], 2),
        "norm_l2_f16": lambda: torch._foreach_norm([half], 2),
        "cast_f32_bf16": lambda: model.copy_(gradient),
        "cast_bf16_f32": lambda: gradient.copy_(model),
        "cast_f32_f16": lambda: half.copy_(gradient),
        "cast_f16_f32": lambda: gradient.copy_(half),
        "clip_scale_f32": lambda: torch._foreach_mul_([gradient], coefficient),
        "clip_scale_f16": lambda: torch._foreach_mul_([half], coefficient),
        "unscale_norm_f32": unscale_and_norm,
        "adamw_f32": adamw.step,
        "sgd_momentum_f32": sgd.step,
    }


def main():
    torch.set_num_threads(1)
    known = operations(int(sys.argv[1]), [int(fd) for fd in sys.argv[2:]])
    print(" ".join(known), flush=True)
    for line in sys.stdin:
        operation = known[line.strip()]
        start = time.perf_counter()
        # The optimizers switch gradients on for themselves.
        with torch.no_grad():
            operation()
        print((time.perf_counter() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()
