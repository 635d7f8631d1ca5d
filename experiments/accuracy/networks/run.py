"""Measure what networks and near labels add to the second stage, and how many held-out samples they need.

    python experiments/accuracy/networks/run.py DATA [DATA ...] --out runs/networks [--repetitions 4]

DATA are folders of XC-repository text. Of their dev.txt, or of a tenth of train.txt that is held out, one half chooses and
trains, the other is measured on, and the other way round. Test splits are not read. Prints a Markdown table: recall of the
candidates, P@1 / P@3 / P@5 of the usual sum (cost 0.2, weight 1.5), and what is gained over it by the best sum and by networks,
over what is decoded: without the votes of the nearest training samples, and with them; then with the labels these vote for
among the candidates; then by networks of fewer samples.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

import mach
from mach.compare.rows import this_machine
from mach.data import CSR, Split, take, take_rows
from mach.decoding import TopK
from mach.decoding.rerank import DEFAULT_WEIGHT, Evidence, Neighbours, SparseWeights, fit_margins, fit_prototypes, hear
from mach.decoding.rerank.neighbours import Found
from mach.metrics import hits
from mach.parallel import judge
from mach.parallel.rerank import COSTS, NEAR_ENTRIES, n_listed
from mach.train.loop import held_out_rows

DEPTH, SAMPLES = 20, (500, 2000)
KS = (1, 3, 5)
COLUMNS = (("decoded", "sum"), ("decoded", "networks"), ("votes", "networks"), ("near", "sum"), ("near", "networks"))


def shortlists(model: mach.Model, features: CSR, k: int) -> TopK:
    """Decode samples in parts: labels and mean logits."""
    parts = [
        model.predict_topk(take(features, rows), k)
        for rows in np.array_split(np.arange(len(features)), -(-len(features) // 4096))
    ]
    scores = np.concatenate([part.scores for part in parts])
    return TopK(np.concatenate([part.labels for part in parts]), scores / np.float32(len(model.repetitions)))


def precision(choice: judge.Choice, some: judge.Judge, fits: list[SparseWeights], heard: judge.Heard) -> np.ndarray:
    """Give P@1, P@3 and P@5 in points of samples that are ordered as was chosen."""
    labels, logits = some.top.labels[:, :DEPTH], some.top.scores[:, :DEPTH]
    near = heard.near if choice.network is not None else heard.near[:, :0]
    opinions, is_candidate = hear(some.features, labels, logits, heard.found, near, fits[choice.which], heard.evidence)
    if choice.network is None:
        scores = opinions[:, :, 0] + choice.weight * opinions[:, :, 1]
    else:
        scores = choice.network.scores(opinions)
    order = np.argsort(-np.where(is_candidate, scores, -np.inf), axis=1, kind="stable")[:, : max(KS)]
    right = hits(np.take_along_axis(np.concatenate([labels, near], 1), order, 1), some.truth)
    return np.array([100 * right[:, :k].mean() for k in KS])


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One data set's held-out samples, what is known around them, and what margins are fitted on."""

    name: str
    held: judge.Judge  # all held-out samples
    evidence: Evidence
    found: Found
    near: np.ndarray  # (N, DEPTH)
    train: Split
    fitted: np.ndarray  # rows of train
    lists: np.ndarray  # their shortlists
    beside: np.ndarray  # what is near to them and not on these

    @classmethod
    def of(cls, source: Path, out: Path, repetitions: int) -> Case:
        """Train the first stage, and look around."""
        dataset = mach.prepare(source, out / f"{source.name}.data")
        has_dev = "dev" in dataset.split_names
        config = mach.Config(rerank=0, repetitions=repetitions, validation=0.0 if has_dev else 0.1)
        model = mach.train(config, dataset, out / source.name)
        train, held = dataset.split("train"), held_out_rows(config, dataset)
        used, judged = np.ones(train.n_samples, bool), dataset.split("dev") if has_dev else train
        used[held] = False
        fitted, rows = np.flatnonzero(used), np.arange(judged.n_samples) if has_dev else held
        features, truth = take(judged.features, rows), take_rows(judged.labels, rows)
        top = shortlists(model, features, min(2 * DEPTH, dataset.n_labels))
        neighbours, n = Neighbours.of(train.features, train.labels, used), n_listed(model.sizes, DEPTH)
        lists = shortlists(model, take(train.features, fitted), n).labels
        around = neighbours.find(take_rows(train.features, fitted), np.arange(len(fitted)), entries=NEAR_ENTRIES)
        found = neighbours.find(features)
        return cls(
            name=source.name,
            held=judge.Judge("dev" if has_dev else "train", features, truth, top, DEPTH),
            evidence=Evidence(*fit_prototypes(train.features, train.labels, used), neighbours),
            found=found,
            near=neighbours.near(found, DEPTH, top.labels[:, :DEPTH]),
            train=train,
            fitted=fitted,
            lists=lists,
            beside=neighbours.near(around, n, lists),
        )

    def fits(self, lists: np.ndarray) -> list[SparseWeights]:
        """Fit margins against what is listed, at each cost."""
        return fit_margins(self.train.features, self.train.labels, lambda: [(self.fitted, lists)], costs=COSTS)

    def part(self, some: np.ndarray) -> judge.Judge:
        """Give some of the held-out samples."""
        held = self.held
        top = TopK(held.top.labels[some], held.top.scores[some])
        return dataclasses.replace(held, features=take_rows(held.features, some), truth=take_rows(held.truth, some), top=top)

    def heard(self, some: np.ndarray, evidence: Evidence, near: np.ndarray) -> judge.Heard:
        """Give what is heard around some of them."""
        return judge.Heard(evidence, Found(self.found.rows[some], self.found.cosines[some]), near[some])


def measure(source: Path, out: Path, repetitions: int) -> None:
    case = Case.of(source, out, repetitions)
    N, truth, labels, near = len(case.near), case.held.truth, case.held.top.labels, case.near
    halves = np.array_split(np.random.default_rng(0).permutation(N), 2)
    recalls = [
        100 * hits(np.ascontiguousarray(each), truth).sum() / truth.nnz
        for each in (labels[:, :DEPTH], labels, np.concatenate([labels[:, :DEPTH], near], 1))
    ]
    deaf = dataclasses.replace(case.evidence, neighbours=None)
    fewer = [n for n in SAMPLES if n < len(halves[0])]
    better = "near" if recalls[2] > recalls[1] else "votes"
    gains: dict[object, list[np.ndarray]] = {}
    usual = []
    for what, lists, known, around in (
        ("decoded", case.lists, deaf, near[:, :0]),
        ("votes", case.lists, case.evidence, near[:, :0]),
        ("near", np.concatenate([case.lists, case.beside], 1), case.evidence, near),
    ):
        if what != "votes":  # margins are the same as before
            fits = case.fits(lists)
        for choose, rest in (halves, halves[::-1]):
            given = case.part(rest), fits, case.heard(rest, known, around)
            if what == "decoded":
                usual.append(precision(judge.Choice(0, DEFAULT_WEIGHT, None), *given))
            for size in (*(fewer if what == better else ()), len(choose)):
                some = choose[:size]
                tried = case.part(some).tried(fits, DEFAULT_WEIGHT, case.heard(some, known, around))
                for kind in ("sum", "networks"):
                    of_kind = [
                        t for t in tried if (t[0].network is not None and t[0].network.first.size > 0) == (kind == "networks")
                    ]
                    best, _ = max(of_kind, key=lambda t: t[1].mean())
                    key = (what, kind) if size == len(choose) else (what, kind, size)
                    gains.setdefault(key, []).append(precision(best, *given))
    base = np.mean(usual, 0)
    columns = [(what, kind) for what, kind in COLUMNS]
    columns += [(better, "networks", size) for size in SAMPLES]
    cells = [f"{N:,} of {case.held.name}", " / ".join(f"{r:.1f}" for r in recalls)]
    cells += [" / ".join(f"{x:.2f}" for x in base)]
    cells += [" / ".join(f"{x:+.2f}" for x in np.mean(gains[c], 0) - base) if c in gains else "" for c in columns]
    print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=4)
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()), "\n")
    columns = [
        "data",
        "samples",
        "R of 20, 40, 20 and 20 near",
        "usual",
        "sum",
        "networks",
        "votes, networks",
        "near, sum",
        "near, networks",
    ]
    columns += [f"by {n:,}" for n in SAMPLES]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for source in args.data:
        measure(source, args.out, args.repetitions)


if __name__ == "__main__":
    main()
