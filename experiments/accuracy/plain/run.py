"""What would other encoders and recipes bring? A plain torch loop of the ensemble, easy to change, one change at a time.

    python experiments/accuracy/plain/run.py DATA [DATA ...] --out runs/plain [--seeds 0,1,2] [--only wide ...]

DATA are folders of XC-repository text; judged without a second stage on a tenth of train.txt that is held out, test splits are
not read. Small ensembles (two repetitions of width 256, three epochs), as the loop takes ten times the time of `mach train`.
The changes:

    linear     a sparse linear layer into the buckets alone
    wide       that, beside the encoder (Cheng et al. 2016, DLRS)
    smooth     positives at 0.9 (Szegedy et al. 2016, CVPR)
    average    of the weights of the last epoch (Izmailov et al. 2018, UAI)
    constant   the step size stays at its peak
    line       it falls along a line instead of a cosine
    zero       biases begin at 0, not at the buckets' mean share
    tf-idf     features times the log of how rare they are
    alone      the 16 most frequent labels have buckets of their own
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import mach
from mach.compare.rows import this_machine
from mach.data import CSR, take_rows
from mach.decoding import decode_topk
from mach.hashing import LabelTable
from mach.train.loop import held_out_rows

CHANGES = ("linear", "wide", "smooth", "average", "constant", "line", "zero", "tf-idf", "alone")
R, D, EPOCHS, BATCH, DROPOUT, WARMUP = 2, 256, 3, 256, 0.3, 0.05
RATE, ROW_RATE, BETA, EPSILON, N_ALONE = 4e-3, 6e-2, 0.999, 1e-8, 16


class Rows:
    """Rows of weights for sparse features, moved by row-wise Adam without momentum."""

    def __init__(self, n: int, width: int, std: float, generator: torch.Generator):
        self.weight = (torch.randn(n, width, generator=generator) * std).requires_grad_()
        self.second, self.step = torch.zeros(n), 0

    def __call__(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Add up the rows of each sample's features, (N, width)."""
        features, offsets, values = batch
        return F.embedding_bag(features, self.weight, offsets, mode="sum", per_sample_weights=values, sparse=True)

    def update(self, rate: float) -> None:
        """Take the step of the gradient that has gathered."""
        self.step += 1
        assert self.weight.grad is not None
        gradient = self.weight.grad.coalesce()
        rows, change = gradient.indices()[0], gradient.values()
        self.second[rows] = self.second[rows].lerp(change.square().mean(1), 1 - BETA)
        scale = rate / ((self.second[rows] / (1 - BETA**self.step)).sqrt() + EPSILON)
        with torch.no_grad():
            self.weight.index_add_(0, rows, change * scale[:, None], alpha=-1)
        self.weight.grad = None


def share_of(change: str, step: int, n_steps: int) -> float:
    """Give the share of the peak step size."""
    rise = max(1, round(WARMUP * n_steps))
    done = (step - rise) / max(1, n_steps - rise)
    if step < rise:
        return (step + 1) / rise
    return {"constant": 1.0, "line": 1 - done}.get(change, 0.5 * (1 + math.cos(math.pi * done)))


def bags(features: CSR, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Give ids, offsets and values of rows scaled to length 1."""
    part = take_rows(features, rows)
    values = np.ones(part.nnz, np.float32) if part.values is None else part.values
    squares = np.add.reduceat(np.append(values**2, 0), part.indptr[:-1]) * (np.diff(part.indptr) > 0)
    scaled = values / np.repeat(np.sqrt(np.maximum(squares, 1e-12)), np.diff(part.indptr))
    return (
        torch.from_numpy(part.indices.astype(np.int64)),
        torch.from_numpy(part.indptr[:-1]),
        torch.from_numpy(scaled.astype(np.float32)),
    )


def train(
    change: str, features: CSR, labels: CSR, buckets_K: np.ndarray, B: int, seed: int, repetition: int
) -> Callable[[np.ndarray, CSR], np.ndarray]:
    """Train one repetition; give what computes its outputs for rows of features."""
    generator = torch.Generator().manual_seed(1000 * seed + repetition)
    encoder = None if change == "linear" else Rows(features.n_columns, D, features.n_columns**-0.5, generator)
    wide = Rows(features.n_columns, B, 0.0, generator) if change in ("linear", "wide") else None
    shares = np.bincount(buckets_K[labels.indices], minlength=B) / len(labels)
    prior = np.log(np.clip(shares, 1e-9, 0.5) / (1 - np.clip(shares, 1e-9, 0.5)))
    bias = torch.zeros(B) if change == "zero" else torch.from_numpy(np.full(B, prior.mean())).float()
    dense = [bias, torch.zeros(D), torch.randn(B, D, generator=generator) * D**-0.5]
    for weight in dense:
        weight.requires_grad_()
    adam = torch.optim.AdamW(dense, lr=RATE, weight_decay=0.0)
    mean: list[Tensor] = []

    def outputs(batch: tuple[Tensor, Tensor, Tensor], training: bool) -> Tensor:
        z = dense[0] if wide is None else dense[0] + wide(batch)
        if encoder is None:
            return z
        return z + F.dropout(torch.relu(encoder(batch) + dense[1]), DROPOUT, training) @ dense[2].T

    torch.manual_seed(1000 * seed + repetition)
    per_epoch = -(-len(labels) // BATCH)
    for step in range(EPOCHS * per_epoch):
        epoch, place = divmod(step, per_epoch)
        rows = np.random.default_rng([seed, epoch]).permutation(len(labels))[place * BATCH : (place + 1) * BATCH]
        positives = take_rows(labels, rows)
        target = torch.zeros(len(rows), B)
        target[np.repeat(np.arange(len(rows)), np.diff(positives.indptr)), buckets_K[positives.indices]] = 1
        target *= 0.9 if change == "smooth" else 1
        share = share_of(change, step, EPOCHS * per_epoch)
        adam.param_groups[0]["lr"] = share * RATE
        loss = F.binary_cross_entropy_with_logits(outputs(bags(features, rows), True), target, reduction="sum") / len(rows)
        loss.backward()
        adam.step()
        adam.zero_grad()
        tables = [table for table in (encoder, wide) if table is not None]
        for table in tables:
            table.update(share * ROW_RATE)
        if change == "average" and epoch == EPOCHS - 1:
            now = [*dense, *(table.weight for table in tables)]
            mean = mean or [torch.zeros_like(weight) for weight in now]
            for total, weight in zip(mean, now, strict=True):
                total += weight.detach() / (per_epoch)
            if place == per_epoch - 1:
                for weight, total in zip(now, mean, strict=True):
                    weight.data.copy_(total)

    def predict(rows: np.ndarray, of: CSR) -> np.ndarray:
        with torch.no_grad():
            return outputs(bags(of, rows), False).numpy()

    return predict


def with_own_buckets(table_RK: np.ndarray, labels: CSR, B: int) -> np.ndarray:
    """Give the most frequent labels a bucket each, the last ones; the others share the rest."""
    frequent = np.argsort(-np.bincount(labels.indices, minlength=table_RK.shape[1]), kind="stable")[:N_ALONE]
    table_RK = table_RK % (B - N_ALONE)
    table_RK[:, frequent] = B - N_ALONE + np.arange(N_ALONE)
    return table_RK


def weighed(features: CSR, weight_F: np.ndarray) -> CSR:
    """Multiply each feature's values with its weight."""
    values = 1 if features.values is None else features.values
    return replace(features, values=(values * weight_F[features.indices]).astype(np.float32))


def measure(change: str, dataset: mach.Dataset, seed: int) -> str:
    config = mach.Config(seed=seed, validation=0.1)
    split, held = dataset.split("train"), held_out_rows(config, dataset)
    rows = np.setdiff1d(np.arange(split.n_samples), held)
    features, labels = take_rows(split.features, rows), take_rows(split.labels, rows)
    judged, truth = take_rows(split.features, held), take_rows(split.labels, held)
    if change == "tf-idf":
        rarity_F = np.log(len(rows) / np.maximum(1, np.bincount(features.indices, minlength=features.n_columns)))
        features, judged = weighed(features, rarity_F), weighed(judged, rarity_F)
    B = config.n_buckets(dataset.n_labels)
    table = LabelTable.hashed(dataset.n_labels, B, R, seed=seed)
    table_RK = np.array(table.array())
    if change == "alone":
        table_RK = with_own_buckets(table_RK, labels, B)
        table = table.with_given({r: table_RK[r] for r in range(R)})
    began = time.perf_counter()
    models = [train(change, features, labels, table_RK[r].astype(np.int64), B, seed, r) for r in range(R)]
    seconds = time.perf_counter() - began
    found = []
    for some in np.array_split(np.arange(len(held)), 16):
        outputs = np.stack([model(some, judged) for model in models], 1)
        found.append(decode_topk(outputs, table, 5, loss="logistic", estimator="logits").labels)
    figures = " / ".join(f"{100 * mach.precision_at_k(np.concatenate(found), truth, k):.2f}" for k in (1, 3, 5))
    return f"| {change or 'nothing'} | {seed} | {figures} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", nargs="+", default=list(CHANGES), choices=CHANGES)
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    for source in args.data:
        dataset = mach.prepare(source, args.out / f"{source.name}.data")
        print(f"\n## {source.name}\n\n| changed | seed | P@1 / P@3 / P@5 | train s |\n|---|---|---|---|")
        for change in ("", *args.only):
            for seed in map(int, args.seeds.split(",")):
                print(measure(change, dataset, seed), flush=True)


if __name__ == "__main__":
    main()
