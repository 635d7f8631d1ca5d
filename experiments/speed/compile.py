"""Does torch.compile pay? The head's step as it is, beside the same arithmetic compiled; on a GPU in CUDA graphs, too.

    python experiments/speed/compile.py [--device cpu|cuda:0] [--rounds 30]

R = 8, B = 1,024, D = 512, batches of 256, logistic loss, no update in either. All ways in turn, ratios of medians. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mach.compare.rows import this_machine
from mach.heads import LinearHead, Positives

R, N, B, D = 8, 256, 1024, 512
MODES = {"cpu": ["default"], "cuda": ["default", "reduce-overhead"]}  # the latter captures CUDA graphs


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, hits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of hidden vectors, weights and biases, as functions of torch that a compiler can see through."""
    z = torch.baddbmm(bias.unsqueeze(1), hidden, weight.transpose(1, 2))
    at_hits = -torch.sigmoid(-z.view(-1)[hits].float()).to(z.dtype)
    g = torch.sigmoid(z).view(-1).index_copy(0, hits, at_hits).view_as(z)
    return torch.bmm(g, weight).float() / N, torch.bmm(g.transpose(1, 2), hidden) / N, g.sum(1, dtype=torch.float32) / N


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time one call."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    device, rng = args.device, np.random.default_rng(0)
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    print("\n| products in | way | step, ms | of ours | first call, s |\n|---|---|---|---|---|")
    indptr = np.arange(0, 3 * N + 1, 3)
    buckets = [(indptr, np.sort(np.stack([rng.choice(B, 3, False) for _ in range(N)]), 1).ravel()) for _ in range(R)]
    positives = Positives.of(buckets, device)
    hits = (positives.repetitions * N + positives.samples) * B + positives.buckets
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, bias = (torch.randn(shape, device=device) for shape in ((R, N, D), (R, B, D), (R, B)))
        low = [x.to(dtype) for x in (hidden, weight, bias)]
        head = LinearHead(low[1], bias)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda head=head, low=low: head.step(
                low[0], positives, loss="logistic", update=lambda *_: None, want_loss=False
            ),
            "the same arithmetic, not compiled": lambda low=low: plain(*low, hits),
        }
        for mode in MODES[device.type]:
            compiled = torch.compile(plain, mode=mode)
            ways[f"compiled, {mode}"] = lambda compiled=compiled, low=low: compiled(*low, hits)
        first = {way: seconds_of(call, device) for way, call in ways.items()}
        each: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, call in ways.items():
                each[way].append(seconds_of(call, device))
        ours = statistics.median(each["ours"])
        for way, times in each.items():
            median = statistics.median(times)
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {way} | {1e3 * median:.1f} | {median / ours:.2f} | {first[way]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
