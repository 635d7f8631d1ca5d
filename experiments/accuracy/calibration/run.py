"""Can one believe the probabilities? Maps from scores to probabilities, fitted on held-out samples, measured on the test split.

    python experiments/accuracy/calibration/run.py FOLDER --out runs/calibration [--sets bibtex:3 delicious:3 tate:3 eurlex57k:1]

FOLDER holds folders of XC-repository text; NAME:n trains n seeds. Maps are fitted on the dev split, or where there is none on a
tenth of the train split that was held out. Prints Markdown tables and draws calibration.svg.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

import mach
from mach.calibration import fit, naive, thresholds_for
from mach.compare.rows import this_machine
from mach.data import take, take_rows
from mach.inspect.reliability import draw_bins
from mach.metrics import hits
from mach.parallel.calibrating import PRECISIONS
from mach.reliability import Reliability
from mach.train.loop import held_out_rows

DEPTHS = (1, 5, 100)
RANKS = (0, 1, 2, 5, 20, 100)  # cuts of the places, where each has a map of its own
MASS = 10  # labels whose probabilities tell how many labels a sample seems to have
MIN_RIGHT = 20  # for a threshold of a label's own
WANTED = 0.9


@dataclass(frozen=True)
class Pairs:
    """Labels found for some samples: ids, scores and whether they are right (N, k), and how many there were to find."""

    labels: np.ndarray
    s: np.ndarray
    y: np.ndarray
    n_true: int

    @classmethod
    def of(cls, model, split, rows=None):
        """Find the 100 best labels of some rows of a split."""
        rows = np.arange(split.n_samples) if rows is None else rows
        features, truth = take(split.features, rows), take_rows(split.labels, rows)
        top = model.predict_topk(features, min(100, model.sizes.n_labels))
        return cls(top.labels, top.scores.astype(np.float64), hits(top.labels, truth), truth.nnz)

    def half(self, i):
        """Give every other sample."""
        return Pairs(self.labels[i::2], self.s[i::2], self.y[i::2], 0)


def logit(p):
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))


def linear(a: Pairs, b: Pairs, features: Callable, **options):
    """Fit a logistic regression of some features of the scores on `a`; give its outputs on both."""
    fitted = LogisticRegression(C=1e6, **options).fit(features(a.s), a.y.ravel())
    return [fitted.decision_function(features(x.s)).reshape(x.s.shape) for x in (a, b)]


def isotonic(s, y, at):
    return IsotonicRegression(out_of_bounds="clip").fit(s.ravel(), y.ravel()).predict(at.ravel()).reshape(at.shape)


def temperature(a, b):
    return 1 / (1 + np.exp(-linear(a, b, lambda s: s.reshape(-1, 1), fit_intercept=False)[1]))


def platt(a, b):
    return 1 / (1 + np.exp(-linear(a, b, lambda s: s.reshape(-1, 1))[1]))


def by_rank(a, b):
    p = np.empty_like(b.s)
    for low, high in pairwise(RANKS):
        p[:, low:high] = isotonic(a.s[:, low:high], a.y[:, low:high], b.s[:, low:high])
    return p


def by_mass(a, b):
    def features(s):
        p = isotonic(a.s, a.y, s)
        mass = np.broadcast_to(np.log(p[:, :MASS].sum(1, keepdims=True)), p.shape)
        return np.stack([logit(p).ravel(), mass.ravel()], 1)

    of_a, of_b = linear(a, b, features)
    return isotonic(of_a, a.y, of_b)


def ours(a, b):
    scores, probabilities = fit(a.s, a.y)
    return mach.Calibration(knot_scores=scores, knot_probabilities=probabilities).probabilities(b.s)


BEFORE, OURS = "before: sigmoid of the mean logit", "isotonic (mach calibrate)"
MAPS = {
    OURS: ours,
    "temperature": temperature,
    "Platt (slope and shift)": platt,
    "isotonic, a map a rank": by_rank,
    "isotonic, with the sample's mass": by_mass,
}


def crossed(way, a):
    """Give the probabilities of each half of the samples by the map of the other."""
    p = np.empty(a.s.shape)
    for i in (0, 1):
        p[1 - i :: 2] = way(a.half(i), a.half(1 - i))
    return p


def measure(p, y):
    found = {}
    for depth in DEPTHS:
        reliability = Reliability()
        reliability.update(p[:, :depth], y[:, :depth])
        found |= {f"ECE@{depth}": reliability.ece(), f"Brier@{depth}": reliability.brier()}
    return found | {"bins": [[b.n, b.probability, b.right] for b in reliability.table()]}


def own_thresholds(a: Pairs, b: Pairs, score: float) -> tuple[list[float], list[float], int]:
    """Compare one threshold for all labels with one a label, where a label was right often enough: on `b`.

    Gives for both: precision, recall, share of such labels with at least the wanted precision less 0.05; and how many these are.
    """
    n_labels = 1 + max(a.labels.max(), b.labels.max())
    n_right = np.bincount(a.labels[a.y], minlength=n_labels)
    frequent = np.flatnonzero(n_right >= MIN_RIGHT)
    least_K = np.full(n_labels, score)
    order = np.argsort(a.labels.ravel(), kind="stable")
    sorted_labels = a.labels.ravel()[order]
    for k in frequent:
        of_k = order[slice(*np.searchsorted(sorted_labels, [k, k + 1]))]
        (own,) = thresholds_for(a.s.ravel()[of_k, None], a.y.ravel()[of_k, None], 1, [WANTED])
        least_K[k] = score if own.score is None else own.score

    def judge(is_kept):
        right = np.bincount(b.labels[is_kept & b.y], minlength=n_labels)[frequent]
        kept = np.bincount(b.labels[is_kept], minlength=n_labels)[frequent]
        good = (right[kept > 0] / kept[kept > 0] >= WANTED - 0.05).mean()
        return [b.y[is_kept].mean(), (is_kept & b.y).sum() / b.n_true, good]

    return judge(b.s >= score), judge(b.s >= least_K[b.labels]), len(frequent)


def run_one(folder: Path, out: Path, seed: int):
    """Train, calibrate and measure once.

    Gives {map: errors} on the held-out samples, cross-fitted, and on the test split; the thresholds' rows; the two kinds of
    thresholds; the number of held-out samples.
    """
    dataset = mach.prepare(folder, out / f"{folder.name}-data")
    has_dev = "dev" in dataset.split_names
    config = mach.Config(seed=seed, validation=0.0 if has_dev else 0.1)
    where = out / f"{folder.name}-{seed}"
    model = mach.train(config, dataset, where)
    calibration = mach.calibrate(where, dataset, split="dev" if has_dev else "validation")
    held = None if has_dev else held_out_rows(config, dataset)
    a, b = Pairs.of(model, dataset.split("dev" if has_dev else "train"), held), Pairs.of(model, dataset.split("test"))
    assert np.array_equal(ours(a, b), calibration.probabilities(b.s))
    found = {}
    for where, pairs, of in (("held out", a, crossed), ("test", b, lambda way, pairs: way(a, pairs))):
        found[where] = {BEFORE: measure(naive(pairs.s, "logits", len(model.repetitions)), pairs.y)}
        found[where] |= {name: measure(of(way, pairs), pairs.y) for name, way in MAPS.items()}
    rows = []
    for threshold in calibration.thresholds:
        if threshold.score is not None:
            is_kept = b.s >= threshold.score
            rows.append((threshold.wanted, b.y[is_kept].mean(), (is_kept & b.y).sum() / b.n_true, is_kept.any(1).mean()))
    score = next((t.score for t in calibration.thresholds if t.wanted == WANTED), None)
    return found, rows, None if score is None else own_thresholds(a, b, score), len(a.s)


def spread(values, scale=100.0) -> str:
    """Write the mean of some runs and, of several, how far they lie apart."""
    values = scale * np.array(values)
    return f"{values.mean():.2f}" + (f" ± {np.ptp(values) / 2:.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["bibtex:3", "delicious:3", "tate:3", "eurlex57k:1"], metavar="NAME:n")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    drawn = {}
    for name, _, seeds in (text.partition(":") for text in args.sets):
        runs = [run_one(args.folder / name, args.out, seed) for seed in range(int(seeds or 1))]
        drawn[name] = runs[0][0]["test"]
        print(f"\n## {name}, fitted on {runs[0][3]:,} samples, seeds: {len(runs)}")
        keys = [key for key in drawn[name][OURS] if key != "bins"]
        for where in runs[0][0]:
            print(f"\n| {where} | {' | '.join(keys)} |\n|---{'|---' * len(keys)}|")
            for way in (BEFORE, *MAPS):
                cells = [spread([found[where][way][key] for found, *_ in runs]) for key in keys]
                print(f"| {way} | {' | '.join(cells)} |", flush=True)
        thresholds = defaultdict(list)
        for _, rows, *_ in runs:
            for wanted, *values in rows:
                thresholds[wanted].append(values)
        print("\n| wanted precision | precision | recall | coverage | found in |\n|---|---|---|---|---|")
        for wanted in PRECISIONS:
            if wanted in thresholds:
                cells = [spread(column) for column in zip(*thresholds[wanted], strict=True)]
                print(f"| {100 * wanted:g} | {' | '.join(cells)} | {len(thresholds[wanted])} of {len(runs)} |")
        print(f"\n| threshold for {100 * WANTED:g} | precision | recall | labels with at least {MIN_RIGHT} right: near it |")
        print("|---|---|---|---|")
        for i, way in enumerate(("one for all labels", "one a label")):
            cells = [spread(column) for column in zip(*[own[i] for _, _, own, _ in runs if own], strict=True)]
            print(f"| {way} | {' | '.join(cells)} |")
        print(f"\nlabels with a threshold of their own: {[own[2] for _, _, own, _ in runs if own]}", flush=True)
    draw(drawn, args.out / "calibration.svg")


def draw(found: dict, path: Path) -> None:
    """Draw a reliability diagram a set: test split, all labels found, seed 0."""
    figure, panels = plt.subplots(
        1, len(found), figsize=(3.4 * len(found), 3.6), constrained_layout=True, sharey=True, squeeze=False
    )
    for panel, (name, ways) in zip(panels[0], found.items(), strict=True):
        shown = {
            "before": BEFORE,
            "Platt": "Platt (slope and shift)",
            "isotonic": OURS,
        }
        draw_bins(panel, {text: ways[way]["bins"] for text, way in shown.items()})
        panel.set(title=name, xlabel="probability")
    panels[0][0].set_ylabel("share that is right")
    figure.savefig(path)
    print(f"\ndrawn: {path}")


if __name__ == "__main__":
    main()
