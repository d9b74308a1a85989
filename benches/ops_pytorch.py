"""PyTorch's CPU versions of what `benches/ops.rs` times, on one thread, driven by it so that both are timed by turns.

    python3 benches/ops_pytorch.py 100000000

Prints the names of the operations it has on one line; then, for each name read from standard input, runs that operation once
and prints its milliseconds. In place where annulus works in place, preallocated outputs elsewhere, so that no allocation is
timed; the optimizers are PyTorch's fused ones.
"""

import sys
import time

import torch


def operations(len_elems):
    gradient = torch.rand(len_elems) * 2 - 1
    model = torch.ones(len_elems, dtype=torch.bfloat16)
    half = torch.ones(len_elems, dtype=torch.float16)
    weight = torch.nn.Parameter(gradient * 0.1)
    weight.grad = gradient
    coefficient = torch.tensor(0.9999999)
    adamw = torch.optim.AdamW([weight], lr=1e-4, fused=True)
    sgd = torch.optim.SGD([weight], lr=1e-4, momentum=0.9, weight_decay=0.01, fused=True)

    def unscale_and_norm():
        torch._foreach_mul_([gradient], coefficient)
        torch._foreach_norm([gradient], 2)

    return {
        "norm_l2_f32": lambda: torch._foreach_norm([gradient], 2),
        "norm_inf_f32": lambda: torch._foreach_norm([gradient], float("inf")),
        "norm_p3.5_f32": lambda: torch._foreach_norm([gradient], 3.5),
        "norm_l2_bf16": lambda: torch._foreach_norm([model], 2),
        "cast_f32_bf16": lambda: model.copy_(gradient),
        "cast_bf16_f32": lambda: gradient.copy_(model),
        "cast_f32_f16": lambda: half.copy_(gradient),
        "cast_f16_f32": lambda: gradient.copy_(half),
        "clip_scale_f32": lambda: torch._foreach_mul_([gradient], coefficient),
        "unscale_norm_f32": unscale_and_norm,
        "adamw_f32": adamw.step,
        "sgd_momentum_f32": sgd.step,
    }


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    known = operations(int(sys.argv[1]))
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
