"""How long does the full head's top-k take, and what does it hold? All outputs of a few samples at once, and chunk by chunk.

    python experiments/full_head/decode.py [--labels 670091] [--hidden 256] [--samples 1024] [--k 100] [--rounds 3]

Random weights. "At once" is `decode_topk` on the outputs of as many samples as 64 MiB hold, "by chunks" is `Packed.full_topk`;
the floor is one bare product of all samples and labels, whose outputs are held. Prints Markdown: seconds a thousand queries, the
median of rounds taken in turn, their ratio to the floor of the same round, and the peak of resident memory beyond the weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from measure import MIB, in_turn, machine, ratio, resident_growth

from mach.config import Config, Estimator
from mach.decoding import TopK, decode_topk
from mach.encoders import make_batch
from mach.hashing import LabelTable
from mach.model import INPUT, Batch, Packed, chunk_rows


def head_of(n_labels: int, hidden: int) -> Packed:
    """Give a full head of random weights behind an input layer that passes its features on."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, n_labels, hidden, generator=generator).div_(hidden**0.5)
    parameters = {INPUT: torch.eye(hidden).unsqueeze(1), "input.bias": torch.zeros(1, hidden)}
    parameters |= {"head.weight": weight, "head.bias": torch.zeros(1, n_labels)}
    return Packed(parameters, config=Config(table="identity", normalize=False), features="dense")


def at_once(packed: Packed, features: np.ndarray, k: int, estimator: Estimator, batch_of: Callable[..., Batch]) -> TopK:
    """Decode the outputs of as many samples as 64 MiB hold, all of their labels at once."""
    n_labels, parts = packed.head.weight.shape[1], []
    n, table = chunk_rows(1, n_labels), LabelTable.identity(n_labels)
    for start in range(0, len(features), n):
        outputs = packed.logits(batch_of(features[start : start + n]))
        parts.append(decode_topk(outputs, table, k, loss="logistic", estimator=estimator))
    return TopK(np.concatenate([p.labels for p in parts]), np.concatenate([p.scores for p in parts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, default=670_091)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    packed = head_of(args.labels, args.hidden)
    features = np.abs(np.random.default_rng(1).normal(size=(args.samples, args.hidden))).astype(np.float32)
    batch_of = partial(make_batch, normalize=False, device=torch.device("cpu"))
    batch = batch_of(features)
    hidden, weight = torch.from_numpy(features), packed.parameters["head.weight"][0]

    def product() -> None:
        torch.mm(hidden, weight.T)

    def old(estimator: Estimator) -> TopK:
        return at_once(packed, features, args.k, estimator, batch_of)

    def new(estimator: Estimator) -> TopK:
        return packed.full_topk(batch, args.k, estimator=estimator)

    calls: dict[str, Callable[[], object]] = {"one bare product": product}
    estimators: tuple[Estimator, ...] = ("logits", "mean")
    for estimator in estimators:
        ours, theirs = new(estimator), old(estimator)
        share = float((ours.labels == theirs.labels).mean())  # products of other shapes round otherwise
        print(f"{estimator}: {100 * share:.3f} % of labels in the same place, greatest difference of scores "
              f"{abs(ours.scores - theirs.scores).max():.1e}")  # fmt: skip
        calls |= {f"at once, {estimator}": partial(old, estimator), f"by chunks, {estimator}": partial(new, estimator)}
    seconds = in_turn(calls, args.rounds)
    print(f"\nK = {args.labels:,}, D = {args.hidden}, N = {args.samples}, k = {args.k}; {machine()}\n")
    print("| top-k | s / 1,000 queries | times the bare product | peak MiB beyond weights |")
    print("|---|---|---|---|")
    for name, call in calls.items():
        a_thousand = 1000 * statistics.median(seconds[name]) / args.samples
        peak = resident_growth(call) / MIB
        print(f"| {name} | {a_thousand:.2f} | {ratio(seconds[name], seconds['one bare product'])} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
