"""Trains the network of tests/strategy/model.rs with PyTorch's DDP over Gloo and compares it with annulus' `Ddp`.

    python3 tests/pytorch/ddp.py FOLDER

FOLDER (written by `tests/pytorch_ddp.rs`) holds run.json, initial.safetensors and final.safetensors. Prints one line a
comparison and exits with 1 if one is beyond its bound.
"""

import json
import os
import pathlib
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ops import load

# Both run in f32 and differ in the order of sums and in tanh; ten times what was seen with torch 2.15.
BOUND_LOSS = 3e-6  # relative (3.1e-7 seen)
BOUND_NORM = 3e-6  # relative (2.2e-7 seen)
BOUND_WEIGHTS = 2e-6  # absolute, weights of the order of 1 (1.8e-7 seen)

NAMES = ["hidden.weight", "hidden.bias", "output.weight", "output.bias", "idle"]


class Mlp(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.weights = torch.nn.ParameterDict(
            {name.replace(".", "_"): torch.nn.Parameter(tensors[f"model.{name}"].clone()) for name in NAMES}
        )

    def forward(self, inputs):
        w = self.weights
        hidden = torch.tanh(inputs @ w["hidden_weight"].T + w["hidden_bias"])
        # The idle parameter takes part with a gradient of zero, as annulus gives it one.
        return hidden @ w["output_weight"].T + w["output_bias"] + 0.0 * w["idle"].sum()


def train(rank, run, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=run["ranks"]
    )
    tensors, _ = load(folder / "initial.safetensors")
    model = torch.nn.parallel.DistributedDataParallel(Mlp(tensors))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["lr"], weight_decay=run["weight_decay"])
    inputs, targets = torch.tensor(run["inputs"]), torch.tensor(run["targets"])
    losses, norms = [], []
    for step in range(run["steps"]):
        first = (step * run["ranks"] + rank) * run["batch"]
        batch = [(first + i) % len(inputs) for i in range(run["batch"])]
        optimizer.zero_grad()
        loss = 0.5 * (model(inputs[batch]) - targets[batch]).square().sum() / len(batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), run["max_norm"]).item())
        optimizer.step()
        losses.append(loss.item())
    weights = {name: model.module.weights[name.replace(".", "_")].detach().numpy() for name in NAMES}
    results.put((rank, losses, norms, weights))
    results.join()
    dist.destroy_process_group()


def compare(what, difference, bound):
    # Written so that NaN fails.
    within = difference <= bound
    print(f"{'ok  ' if within else 'FAIL'} {what:<32} {difference:9.2e}  bound {bound:.1e}")
    return within


def largest_relative(ours, theirs):
    pairs = list(zip(ours, theirs, strict=True))
    return max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs)


def main():
    folder = pathlib.Path(sys.argv[1])
    run = json.loads((folder / "run.json").read_text())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = mp.get_context("spawn")
    results = context.JoinableQueue()
    ranks = [context.Process(target=train, args=(rank, run, folder, results)) for rank in range(run["ranks"])]
    for process in ranks:
        process.start()
    collected = []
    for _ in ranks:
        collected.append(results.get(timeout=120))
    for _ in ranks:
        results.task_done()
    for process in ranks:
        process.join(60)
    final, _ = load(folder / "final.safetensors")
    within = True
    for rank, losses, norms, weights in sorted(collected, key=lambda result: result[0]):
        within &= compare(f"losses of rank {rank}", largest_relative(run["losses"][rank], losses), BOUND_LOSS)
        within &= compare(f"norms of rank {rank}", largest_relative(run["norms"], norms), BOUND_NORM)
        for name in NAMES:
            difference = (final[f"model.{name}"] - torch.from_numpy(weights[name])).abs().max().item()
            within &= compare(f"{name} of rank {rank}", difference, BOUND_WEIGHTS)
    if run["losses"][0][-1] > 0.5 * run["losses"][0][0]:
        within = False
        print("FAIL the network has not learnt anything")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
