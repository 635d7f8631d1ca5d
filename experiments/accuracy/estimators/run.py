"""Is a fitted combination of the repetitions' logits better than their sum? Weights a repetition, the least, the spread, a prior.

    python experiments/accuracy/estimators/run.py DATA [DATA ...] --out runs/rerank [--seeds 0,1,2]

DATA are folders of XC-repository text; --out may be that of experiments/accuracy/rerank, whose ensembles are the same. Judged on
dev.txt if there is one, else on a tenth of train.txt that is held out. A logistic regression of "is right" on what describes a
label of a sample's 100 best, fitted on one half of these samples, judged on the other, both ways. Prints a table for each: means
of the seeds, and of precision how far it lies from that of the sum, with half the range of that over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import mach
from mach.compare.rows import this_machine
from mach.data import take, take_rows
from mach.metrics import Evaluator, hits, propensities
from mach.train.loop import held_out_rows

DEPTH = 100
METRICS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "R@10")
SUM = "nothing: the sum of logits"


def measure(source: Path, out: Path, seed: int) -> dict[str, np.ndarray]:
    """Give the metrics of each way to combine the logits, in percent."""
    dataset = mach.prepare(source, out / f"{source.name}.data")
    has_dev = "dev" in dataset.split_names
    config = mach.Config(seed=seed, rerank=0, validation=0.0 if has_dev else 0.1)
    model = mach.train(config, dataset, out / f"{source.name}-{seed}")
    train = dataset.split("train")
    judged = dataset.split("dev") if has_dev else train
    rows = np.arange(judged.n_samples) if has_dev else held_out_rows(config, dataset)
    features, truth = take(judged.features, rows), take_rows(judged.labels, rows)
    buckets_RK, parts = model.table.array(), []
    for some in np.array_split(np.arange(len(rows)), -(-len(rows) // 2048)):
        logits_NRB = model.bucket_logits(take(features, some))
        labels_Nk = model.predict_topk(take(features, some), min(DEPTH, dataset.n_labels)).labels
        parts.append(
            (
                labels_Nk,
                np.stack([np.take_along_axis(logits_NRB[:, r], row[labels_Nk], 1) for r, row in enumerate(buckets_RK)], -1),
            )
        )
    labels_Nk, z_NkR = (np.concatenate(each) for each in zip(*parts, strict=True))
    right_Nk, counts_K = hits(labels_Nk, truth), np.bincount(train.labels.indices, minlength=dataset.n_labels)
    weights_K = propensities(counts_K, train.n_samples)
    prior_Nk, mean_Nk = np.log1p(counts_K)[labels_Nk], z_NkR.mean(-1)
    sure_NkR = -np.logaddexp(0, -z_NkR)
    ways = {
        "weights a repetition": z_NkR,
        "mean and least logit": np.stack([mean_Nk, z_NkR.min(-1)], -1),
        "mean and spread of the logits": np.stack([mean_Nk, z_NkR.std(-1)], -1),
        "mean logit and mean log-probability": np.stack([mean_Nk, sure_NkR.mean(-1)], -1),
        "mean logit and log count of the label": np.stack([mean_Nk, prior_Nk], -1),
        "all of these": np.concatenate([z_NkR, np.stack([z_NkR.min(-1), z_NkR.std(-1), sure_NkR.mean(-1), prior_Nk], -1)], -1),
    }

    def metrics(scores_Nk: np.ndarray) -> np.ndarray:
        order = np.argsort(-scores_Nk, axis=1, kind="stable")
        evaluator = Evaluator(dataset.n_labels, propensities=weights_K)
        evaluator.update(np.take_along_axis(labels_Nk, order, 1), None, truth)
        found = evaluator.result()
        return np.array([100 * found[name] for name in METRICS])

    results = {SUM: metrics(mean_Nk)}
    half = np.arange(len(rows)) % 2 == 0
    for name, x in ways.items():
        scores_Nk = np.zeros(mean_Nk.shape)
        for fit in (half, ~half):
            scaler = StandardScaler().fit(x[fit].reshape(-1, x.shape[-1]))
            regression = LogisticRegression(C=10.0, max_iter=300).fit(
                scaler.transform(x[fit].reshape(-1, x.shape[-1])), right_Nk[fit].ravel()
            )
            scores_Nk[~fit] = regression.decision_function(scaler.transform(x[~fit].reshape(-1, x.shape[-1]))).reshape(
                scores_Nk[~fit].shape
            )
        results[name] = metrics(scores_Nk)
    for weight in (0.1, 0.3):
        results[f"nothing: mean logit less {weight:g} log count (for the tail)"] = metrics(mean_Nk - weight * prior_Nk)
    return results


def show(results: list[dict[str, np.ndarray]]) -> None:
    """Print a table of the means over seeds."""
    print(f"| fitted on | {' | '.join(METRICS)} | P@1 / P@3 / P@5 to the sum's |\n|" + "---|" * (len(METRICS) + 2))
    for name in results[0]:
        each = np.stack([found[name] for found in results])
        gains = np.stack([found[name] - found[SUM] for found in results])[:, :3]
        cells = [f"{x:.2f}" for x in each.mean(0)]
        text = " / ".join(f"{x:+.2f} ±{half:.2f}" for x, half in zip(gains.mean(0), np.ptp(gains, 0) / 2, strict=True))
        print(f"| {name} | {' | '.join(cells)} | {text if name != SUM else ''} |", flush=True)


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
