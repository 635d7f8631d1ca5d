"""How far is a step of the head from the floor of its three products, and from a plain autograd head? On a CPU.

    python experiments/full_head/steps.py [--labels 131072] [--rounds 7] [--quick]

The floor: outputs, gradient of the hidden vectors and gradient of the weights as three bare products of the whole shapes, in the
type of the products, into memory that is there already. Traffic: one pass that reads and writes the weights as they are stored,
which no update can do without. Plain: nn.Linear, binary cross-entropy with logits against dense
targets, summed over outputs, and torch's optimiser, in bfloat16 by autocast. All are timed in turn within a round; ratios are of
one round, their median and range are printed as Markdown. The loss is told by the plain head only, as it needs it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping

import torch
from heads import positives, stepping, weights
from measure import in_turn, machine, ratio
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from mach.config import HeadOptimizer

WAYS: list[tuple[str, HeadOptimizer]] = [  # weights in, optimiser
    ("float32", "sgd"), ("float32", "adamw"), ("bfloat16", "sgd"), ("bfloat16", "rowwise-adam"), ("float8", "rowwise-adam")
]  # fmt: skip


def products_of(hidden_ND: Tensor, weight_KD: Tensor) -> Callable[[], None]:
    """Give the three products alone."""
    weight = weight_KD.to(hidden_ND.dtype)
    z_NK, grad_ND, grad_KD = (
        hidden_ND.new_empty(len(hidden_ND), len(weight)),
        torch.empty_like(hidden_ND),
        torch.empty_like(weight),
    )

    def call() -> None:
        torch.mm(hidden_ND, weight.T, out=z_NK)
        torch.mm(z_NK, weight, out=grad_ND)
        torch.mm(z_NK.T, hidden_ND, out=grad_KD)

    return call


def plain_of(hidden_ND: Tensor, parameters: Mapping[str, Tensor], targets_NK: Tensor, kind: str) -> Callable[[], None]:
    """Give a step as most would write it."""
    layer = nn.Linear(*reversed(parameters["head.weight"].shape[1:]))
    layer.weight.data.copy_(parameters["head.weight"][0])
    layer.bias.data.copy_(parameters["head.bias"][0])
    make = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
    optimizer = make(layer.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    hidden = hidden_ND.float().clone().requires_grad_()

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        hidden.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=hidden_ND.dtype == torch.bfloat16):
            z_NK = layer(hidden)
        loss = binary_cross_entropy_with_logits(z_NK.float(), targets_NK, reduction="sum") / len(hidden)
        loss.backward()
        optimizer.step()

    return call


def traffic_of(stored: Tensor) -> Callable[[], object]:
    """Give one pass that reads and writes the weights."""
    bits = stored.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[stored.element_size()])
    return lambda: bits.add_(0)


def measure(n_labels: int, width: int, n_samples: int, products: torch.dtype, n_rounds: int) -> None:
    """Print a row for each storage and optimiser."""
    of, hidden = positives(n_samples, n_labels), torch.randn(n_samples, width, generator=torch.Generator().manual_seed(1))
    hidden, targets = hidden.relu().to(products), torch.zeros(n_samples, n_labels)
    targets[of.samples, of.buckets] = 1
    wide = weights(n_labels, width, "float32")
    calls: dict[str, Callable[[], object]] = {"floor": products_of(hidden, wide["head.weight"][0])}
    for kind in ("sgd", "adamw"):
        calls[f"plain, {kind}"] = plain_of(hidden, wide, targets, kind)
    for storage, optimizer in WAYS:
        own = weights(n_labels, width, storage)
        calls[f"traffic, {storage}"] = traffic_of(own["head.weight"])
        calls[f"{storage}, {optimizer}"] = stepping(own, hidden.unsqueeze(0), of, optimizer)
    seconds = in_turn(calls, n_rounds)
    for storage, optimizer in WAYS:
        ours, plain = seconds[f"{storage}, {optimizer}"], seconds[f"plain, {'sgd' if optimizer == 'sgd' else 'adamw'}"]
        floor, traffic = seconds["floor"], seconds[f"traffic, {storage}"]
        times = " | ".join(f"{1e3 * statistics.median(each):,.0f}" for each in (floor, traffic, ours, plain))
        print(
            f"| {width} | {n_samples} | {str(products).removeprefix('torch.')} | {storage}, {optimizer} | {times} "
            f"| {ratio(ours, floor)} | {ratio(plain, floor)} | {ratio(plain, ours)} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one size, three rounds")
    args = parser.parse_args()
    print(f"K = {args.labels:,}; {machine()}\n")
    print("| D | N | products in | weights in, optimiser | floor ms | traffic ms | ours ms | plain ms ", end="")
    print("| ours / floor | plain / floor | plain / ours |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for width in (256,) if args.quick else (256, 768):
        for n_samples in (128,) if args.quick else (128, 256):
            for products in (torch.float32, torch.bfloat16):
                measure(args.labels, width, n_samples, products, 3 if args.quick else args.rounds)


if __name__ == "__main__":
    main()
