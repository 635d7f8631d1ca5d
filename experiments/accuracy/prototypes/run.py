"""Do prototypes add to the second stage, and how many samples are enough to choose by? Five draws of held-out samples.

    python experiments/accuracy/prototypes/run.py DATA [DATA ...] --out runs/prototypes [--repetitions 4]

DATA are folders of XC-repository text. From one half of their dev.txt, or of a tenth of train.txt that is held out, samples are
drawn to choose by; the other half is measured on. Test splits are not read. Prints a Markdown table: P@1 / P@3 / P@5 of the usual
settings, what is gained by those that 250 to 2,000 samples choose, without and with prototypes, and what the most chose.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import mach
from mach.compare.rows import this_machine
from mach.data import CSR, take, take_rows
from mach.decoding.rerank import DEFAULT_WEIGHT, add_prototypes, best_mix, fit_prototypes, fit_reranker
from mach.decoding.rerank.weight import Mix
from mach.metrics import hits
from mach.parallel.rerank import COSTS, n_listed
from mach.train.loop import held_out_rows

DEPTH, DRAWS, SAMPLES = 20, 5, (250, 500, 1000, 2000)
KS = (1, 3, 5)


def shortlists(model: mach.Model, features: CSR, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode samples in parts: labels and mean logits."""
    parts = [
        model.predict_topk(take(features, rows), k)
        for rows in np.array_split(np.arange(len(features)), -(-len(features) // 4096))
    ]
    scores = np.concatenate([part.scores for part in parts])
    return np.concatenate([part.labels for part in parts]), scores / len(model.repetitions)


def measure(source: Path, out: Path, repetitions: int) -> None:
    dataset = mach.prepare(source, out / f"{source.name}.data")
    has_dev = "dev" in dataset.split_names
    config = mach.Config(rerank=0, repetitions=repetitions, validation=0.0 if has_dev else 0.1)
    model = mach.train(config, dataset, out / source.name)
    train, held = dataset.split("train"), held_out_rows(config, dataset)
    fitted, judged = np.setdiff1d(np.arange(train.n_samples), held), dataset.split("dev") if has_dev else train
    rows = np.arange(judged.n_samples) if has_dev else held
    features, truth = take(judged.features, rows), take_rows(judged.labels, rows)
    lists, _ = shortlists(model, take(train.features, fitted), n_listed(model.sizes, DEPTH))
    labels, logits = shortlists(model, features, DEPTH)
    right, n_true = hits(labels, truth).astype(bool), np.diff(truth.indptr)

    fits = [
        fit_reranker(train.features, train.labels, lambda: [(fitted, lists)], cost=cost, depth=DEPTH, weight=0.0)
        for cost in COSTS
    ]
    margins = [each.margins(features, labels) for each in fits]
    prototypes = fit_prototypes(train.features, train.labels, np.isin(np.arange(train.n_samples), fitted), depth=DEPTH)
    likeness = prototypes.margins(features, labels)

    def precision(picked: np.ndarray, mix: Mix) -> np.ndarray:
        scores = logits[picked] + mix.weight * (margins[mix.which][picked] + mix.prototype * likeness[picked])
        found = np.take_along_axis(right[picked], np.argsort(-scores, axis=1, kind="stable"), 1)
        return np.array([100 * found[:, :k].mean() for k in KS])

    usual, gains, chosen = [], {(n, with_it): [] for n in SAMPLES for with_it in (False, True)}, []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(rows))
        choose, rest = np.split(order, [len(order) // 2])
        usual.append(precision(rest, Mix(0, DEFAULT_WEIGHT, 0.0)))
        for (n, with_it), found in gains.items():
            if n > len(choose):
                continue
            some = choose[:n]
            given = (logits[some], [m[some] for m in margins], likeness[some] * with_it, right[some], n_true[some])
            mix = best_mix(*given)
            found.append(precision(rest, mix) - usual[-1])
            if with_it and n == max(size for size in SAMPLES if size <= len(choose)):
                chosen.append(mix)
    cells = [" / ".join(f"{x:.2f}" for x in np.mean(usual, 0))]
    cells += [" / ".join(f"{x:+.2f}" for x in np.mean(found, 0)) if found else "" for found in gains.values()]
    if not chosen:
        raise SystemExit(f"{source}: {len(rows)} samples to choose by and to measure on are too few: {2 * SAMPLES[0]} at least")
    middle = sorted(chosen, key=lambda mix: (mix.weight * mix.prototype, mix.weight))[len(chosen) // 2]
    both = add_prototypes(fits[middle.which], prototypes, middle.prototype)
    cells += [f"{COSTS[middle.which]:g}, {middle.weight:g}, {middle.prototype:g}"]
    cells += [f"{fits[0].n_parameters / 1e6:.2f} -> {both.n_parameters / 1e6:.2f}"]
    print(f"| {source.name} | {len(rows):,} of {'dev' if has_dev else 'train'} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=4)
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()), "\n")
    columns = [f"{n:,}{' with' if with_it else ''}" for n in SAMPLES for with_it in (False, True)]
    print(f"| data | samples | usual | {' | '.join(columns)} | cost, weight, prototype | weights, million |\n|{'---|' * 13}")
    for source in args.data:
        measure(source, args.out, args.repetitions)


if __name__ == "__main__":
    main()
