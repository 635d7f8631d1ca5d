"""What does the second stage bring, and which settings suit it? Ensembles of the defaults, a grid of re-rankers on each.

    python experiments/accuracy/rerank/run.py DATA [DATA ...] --out runs/rerank [--seeds 0,1,2]

DATA are folders of XC-repository text. Measured on their dev.txt if there is one, else on a tenth of train.txt that is held out
of everything. Test splits are not read. Prints a Markdown table for each: P@1 / P@3 / P@5 by cost, labels listed and weight, the
means of the seeds.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

import mach
from mach.compare.rows import this_machine
from mach.data import CSR, Dataset, take, take_rows
from mach.decoding import TopK
from mach.decoding.rerank import Reranker, fit_margins, ndcg
from mach.metrics import hits
from mach.parallel import judge
from mach.train.loop import held_out_rows

DEPTH = 20
COSTS = (0.1, 0.2, 1.0)
WEIGHTS = (0.5, 1.0, 1.5, 2.0, 4.0)


def shortlists(model: mach.Model, features: CSR, k: int) -> TopK:
    """Decode samples in parts."""
    parts = [
        model.predict_topk(take(features, rows), k)
        for rows in np.array_split(np.arange(len(features)), -(-len(features) // 4096))
    ]
    return TopK(np.concatenate([part.labels for part in parts]), np.concatenate([part.scores for part in parts]))


def precision(labels: np.ndarray, truth: CSR) -> np.ndarray:
    return np.array([100 * mach.precision_at_k(labels, truth, k) for k in (1, 3, 5)])


def measure(source: Path, out: Path, seed: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Give the precision of decoding alone, what each row of the grid is, and its numbers.

    These are million weights, seconds, the chosen weight, and precision by each of the weights and by the chosen one.
    """
    dataset: Dataset = mach.prepare(source, out / f"{source.name}.data")
    has_dev = "dev" in dataset.split_names
    config = mach.Config(seed=seed, rerank=0, validation=0.0 if has_dev else 0.1)
    model = mach.train(config, dataset, out / f"{source.name}-{seed}")
    train, held = dataset.split("train"), held_out_rows(config, dataset)
    measured = dataset.split("dev") if has_dev else train
    rows = np.arange(measured.n_samples) if has_dev else held
    features, truth = take(measured.features, rows), take_rows(measured.labels, rows)
    fitted = np.setdiff1d(np.arange(train.n_samples), held)
    R, mean = len(model.repetitions), math.ceil(model.sizes.labels_a_sample)
    top = shortlists(model, features, min(100, dataset.n_labels))
    long = shortlists(model, take(train.features, fitted), min(2 * DEPTH + mean, dataset.n_labels)).labels
    right = hits(top.labels[:, :DEPTH], truth).astype(bool)
    names, grid = [], []
    for cost in COSTS:
        for listed in (DEPTH, DEPTH + mean, 2 * DEPTH + mean):
            lists = long[:, : min(listed, long.shape[1])]
            began = time.perf_counter()
            found = fit_margins(train.features, train.labels, lambda lists=lists: [(fitted, lists)], costs=(cost,))[0]
            seconds = time.perf_counter() - began
            margins = found.margins(features, top.labels[:, :DEPTH])
            scores, n_true = top.scores[:, :DEPTH] / R, np.diff(truth.indptr)
            gained = {weight: ndcg(scores + weight * margins, right, n_true).mean() for weight in judge.WEIGHTS}
            best = max(gained, key=gained.__getitem__)
            ordered = [Reranker(found, DEPTH, weight).rerank(features, top, 5, R).labels for weight in (*WEIGHTS, best)]
            figures = [precision(labels, truth) for labels in ordered]
            names.append(f"{cost:g} | {listed}")
            grid.append(np.concatenate([[found.n_parameters / 1e6, seconds, best], *figures]))
    return precision(top.labels, truth), names, np.stack(grid)


def show(results: list[tuple[np.ndarray, list[str], np.ndarray]]) -> None:
    """Print a table of the means over seeds."""

    def cell(figures: np.ndarray) -> str:
        return " / ".join(f"{x:.2f}" for x in figures)

    print(f"| cost | listed | weights, million | s | {' | '.join(f'weight {w:g}' for w in WEIGHTS)} | chosen weight |")
    print("|" + "---|" * (len(WEIGHTS) + 5))
    alone, (_, names, _), grid = np.mean([each[0] for each in results], 0), results[0], np.mean([each[2] for each in results], 0)
    print(f"| decoding alone | | | | {' | '.join([cell(alone)] + [''] * len(WEIGHTS))} |")
    for name, (million, seconds, best, *figures) in zip(names, grid, strict=True):
        cells = [cell(each) for each in np.reshape(figures, (-1, 3))]
        print(f"| {name} | {million:.2f} | {seconds:.1f} | {' | '.join(cells)} (at {best:.2f}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    for source in args.data:
        print(f"\n## {source.name}, seeds {args.seeds}\n")
        show([measure(source, args.out, seed) for seed in map(int, args.seeds.split(","))])


if __name__ == "__main__":
    main()
