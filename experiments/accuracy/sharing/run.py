"""Should repetitions share an encoder? And are many small ones better than few large ones, or a mixture of both.

    python experiments/accuracy/sharing/run.py DATA [DATA ...] --out runs/sharing [--seeds 0] [--epochs 6] [--hidden 512]

DATA are folders of XC-repository text. Judged on dev.txt if there is one, else on a tenth of train.txt that is held out; test
splits are not read. Eight repetitions of the defaults' B = b buckets, --hidden wide, are what the others are held against:

- One encoder for all: the labels of a sample become the R B buckets they fall into, r B + h_r(label), and a full head learns
  these. Its outputs, (N, 1, R B), are read as (N, R, B) and decoded by the same table. Of the same width, outputs cost as many
  products as apart; D R (F + B) / (F + R B) wide, encoder and head have as many weights as apart.
- R B = 8 b for other R, as wide, or so wide that there are as many weights.
- Halves of two such ensembles, of other hashes: their logits are added up for all K labels.

With --only, none but the ways whose name holds a TEXT. Prints a Markdown table for each set, means over the seeds; a second call
trains only what is left.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

import mach
from mach.compare.rows import this_machine
from mach.data import CSR, Dataset, take, take_rows, write_dataset
from mach.decoding import TopK, decode_topk
from mach.decoding.rerank import DEFAULT_WEIGHT, Reranker, fit_margins
from mach.hashing import LabelTable
from mach.metrics import Evaluator, propensities
from mach.parallel.rerank import DEFAULT_COST
from mach.store import Run
from mach.train.loop import held_out_rows

REPETITIONS = 8
DEPTH, LISTED = 20, 100
ROWS = 512  # decoded at a time where logits of all labels are added up
KEYS = ("P@1", "P@3", "P@5")


@dataclass(frozen=True, slots=True)
class Way:
    """One ensemble: apart or behind one encoder, `n` repetitions from `first` on, and another one whose logits are added."""

    name: str
    repetitions: int = REPETITIONS
    times: float = 1.0  # of b
    shared: bool = False
    same_weights: bool = False  # else as wide as the eight
    first: int = 0
    n: int | None = None
    other: Way | None = None


WAYS = (
    Way("R = 8, B = b: the defaults"),
    Way("R = 8, B = b, one encoder, as wide", shared=True),
    Way("R = 8, B = b, one encoder, as many weights", shared=True, same_weights=True),
    Way("R = 2, B = 4 b", 2, 4),
    Way("R = 4, B = 2 b", 4, 2),
    Way("R = 16, B = b / 2", 16, 0.5),
    Way("R = 4, B = 2 b, as many weights", 4, 2, same_weights=True),
    Way("R = 16, B = b / 2, as many weights", 16, 0.5, same_weights=True),
    Way("mixed: 4 of B = b, 1 of B = 4 b", n=4, other=Way("", 2, 4, first=1, n=1)),
    Way("mixed: 4 of B = b, 2 of B = 2 b", n=4, other=Way("", 4, 2, first=2, n=2)),
    Way("mixed: 4 of B = b, 8 of B = b / 2", n=4, other=Way("", 16, 0.5, first=8, n=8)),
    Way("mixed: 2 of B = 2 b, 8 of B = b / 2", 4, 2, n=2, other=Way("", 16, 0.5, first=8, n=8)),
)


@dataclass(frozen=True, slots=True)
class Part:
    """Trained repetitions and their table."""

    model: mach.Model
    table: LabelTable
    weights: int
    products: float  # a sample
    seconds: float

    def logits(self, features: CSR) -> np.ndarray:
        """Give the outputs (N, R, B)."""
        return self.model.bucket_logits(features).reshape(len(features), self.table.n_repetitions, self.table.n_buckets)


def union(dataset: Dataset, table: LabelTable, path: Path) -> Dataset:
    """Write the data set again with the R B buckets as its labels, or open what was written."""
    if (path / "manifest.json").exists():
        return Dataset.open(path)
    R, B = table.n_repetitions, table.n_buckets
    columns_RK, splits = table.array().astype(np.int64) + B * np.arange(R)[:, None], {}
    for name in ("train", "dev"):
        if name in dataset.split_names:
            split = dataset.split(name)
            rows = np.repeat(np.arange(split.n_samples), np.diff(split.labels.indptr))
            columns = columns_RK[:, split.labels.indices]
            ones = np.ones(columns.size, np.float32)
            buckets = sp.csr_array((ones, (np.tile(rows, R), columns.ravel())), shape=(split.n_samples, R * B))
            splits[name] = (split.features.to_scipy(), buckets)
    return write_dataset(path, splits)


def train(way: Way, dataset: Dataset, out: Path, config: mach.Config) -> Part:
    """Train an ensemble, or open it where it is trained."""
    F, b, R = dataset.n_features, config.n_buckets(dataset.n_labels), way.repetitions
    B, shared = max(2, min(dataset.n_labels, round(way.times * b))), way.shared
    if not way.same_weights:
        D = config.hidden
    else:
        D = round(config.hidden * REPETITIONS * (F + b) / ((F + R * B) if shared else R * (F + B)))
    path = out / f"{'one' if shared else 'each'}-{R}-{B}-{D}"
    if shared:
        table = LabelTable.hashed(dataset.n_labels, B, R, seed=config.seed)
        apart = {"table": "identity", "head_precision": "float32", "head_optimizer": "adamw", "rerank": 0}
        model = mach.train(config.replace(hidden=D, **apart), union(dataset, table, path.with_suffix(".data")), path)
    else:
        model = mach.train(config.replace(hidden=D, repetitions=R, buckets=B), dataset, path)
        table = model.table
    records = Run.open(path).records()
    seconds, n = sum(record["train_s"] for record in records.values()), 1 if shared else R
    share = 1.0
    if way.n is not None:
        table = table.select(range(way.first, way.first + way.n))
        model, share, n = model.select(table.repetitions), way.n / R, way.n
    outputs, nnz = R * B if shared else B, dataset.split("train").features.nnz / dataset.split("train").n_samples
    return Part(model, table, n * (D * (F + outputs + 1) + outputs), n * D * (nnz + outputs), seconds * share)


def decode(parts: Sequence[Part], features: CSR, k: int) -> TopK:
    """Give the k labels of the largest sums of logits over all parts."""
    found = []
    for rows in np.array_split(np.arange(len(features)), max(1, -(-len(features) // ROWS))):
        some = take_rows(features, rows)
        if len(parts) == 1:
            found.append(decode_topk(parts[0].logits(some), parts[0].table, k, loss="logistic", estimator="logits"))
            continue
        sums_NK = np.zeros((len(some), parts[0].table.n_labels), np.float32)
        for part in parts:
            logits_NRB = part.logits(some)
            for r, buckets_K in enumerate(part.table.array()):
                sums_NK += logits_NRB[:, r, buckets_K]
        identity = LabelTable.identity(sums_NK.shape[1])
        found.append(decode_topk(sums_NK[:, None], identity, k, loss="logistic", estimator="logits"))
    return TopK(np.concatenate([top.labels for top in found]), np.concatenate([top.scores for top in found]))


def measure(way: Way, dataset: Dataset, out: Path, config: mach.Config) -> dict[str, float]:
    """Train, decode and order anew; give every figure."""
    parts = [train(each, dataset, out, config) for each in (way, way.other) if each is not None]
    has_dev, split = "dev" in dataset.split_names, dataset.split("train")
    held, judged = held_out_rows(config, dataset), dataset.split("dev") if has_dev else split
    rows = np.arange(judged.n_samples) if has_dev else held
    features, truth = take(judged.features, rows), take_rows(judged.labels, rows)
    fitted = np.setdiff1d(np.arange(split.n_samples), held)
    R, mean = sum(part.table.n_repetitions for part in parts), math.ceil(split.labels.nnz / split.n_samples)
    weights_K = propensities(np.bincount(split.labels.indices, minlength=dataset.n_labels), split.n_samples)

    def figures(labels_Nk: np.ndarray) -> dict[str, float]:
        evaluator = Evaluator(dataset.n_labels, propensities=weights_K)
        evaluator.update(labels_Nk, None, truth)
        return {name: 100 * value for name, value in evaluator.result().items()}

    top = decode(parts, features, min(LISTED, dataset.n_labels))
    lists = decode(parts, take(split.features, fitted), min(DEPTH + mean, dataset.n_labels)).labels
    weights = fit_margins(split.features, split.labels, lambda: [(fitted, lists)], costs=(DEFAULT_COST,))[0]
    second = Reranker(weights, DEPTH, DEFAULT_WEIGHT)
    found = figures(top.labels)
    found |= {f"both {name}": value for name, value in figures(second.rerank(features, top, LISTED, R).labels).items()}
    found["weights"] = sum(part.weights for part in parts)
    found["products"] = sum(part.products for part in parts)
    return found | {"seconds": sum(part.seconds for part in parts)}


def line(way: Way, each: list[dict[str, float]], base: list[dict[str, float]]) -> str:
    """Make a row of the table out of the figures of every seed."""
    mean = {name: float(np.mean([figures[name] for figures in each])) for name in each[0]}
    cells = [way.name, f"{mean['weights'] / 1e6:.1f}", f"{mean['products'] / 1e6:.1f}", f"{mean['seconds']:.0f}"]
    for prefix in ("", "both "):
        cells.append(" / ".join(f"{mean[prefix + name]:.2f}" for name in KEYS))
        if each is base:
            cells.append("")
            continue
        gains = [[a[prefix + name] - b[prefix + name] for a, b in zip(each, base, strict=True)] for name in KEYS]
        spread = [f" ±{np.std(gain, ddof=1):.2f}" if len(each) > 1 else "" for gain in gains]
        cells.append(" / ".join(f"{np.mean(gain):+.2f}{more}" for gain, more in zip(gains, spread, strict=True)))
    cells += [" / ".join(f"{mean[name]:.2f}" for name in names) for names in (("PSP@1", "PSP@5"), ("R@10", "R@100"))]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=mach.Config().epochs)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    for source in args.data:
        dataset = mach.prepare(source, args.out / f"{source.name}.data")
        b = mach.Config().n_buckets(dataset.n_labels)
        print(f"\n## {source.name}: b = {b:,}, D = {args.hidden}, {args.epochs} epochs, seeds {args.seeds}\n")
        print("| ensemble | weights, million | products a sample, million | train s | one stage: P@1 / P@3 / P@5 ", end="")
        print("| to the defaults | both stages: P@1 / P@3 / P@5 | to the defaults | PSP@1 / PSP@5 | R@10 / R@100 |")
        print("|" + "---|" * 10)
        base: list[dict[str, float]] = []
        for way in WAYS:
            if way is not WAYS[0] and not any(text in way.name for text in args.only):
                continue
            each = []
            for seed in map(int, args.seeds.split(",")):
                out = args.out / f"{source.name}-{seed}-{args.epochs}-{args.hidden}"
                known = out / f"{WAYS.index(way)}.json"
                if not known.exists():
                    has_dev = "dev" in dataset.split_names
                    fixed = {"rerank": 0, "validation": 0.0 if has_dev else 0.1}
                    config = mach.Config(seed=seed, epochs=args.epochs, hidden=args.hidden, **fixed)
                    found = measure(way, dataset, out, config)
                    known.write_text(json.dumps(found))
                each.append(json.loads(known.read_text()))
            base = base or each
            print(line(way, each, base), flush=True)


if __name__ == "__main__":
    main()
