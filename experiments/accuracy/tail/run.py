"""What helps labels with few samples? Their names as samples, or the average of their samples as a prior.

    python experiments/accuracy/tail/run.py DATA [DATA ...] --out runs/sharing [--seeds 0] [--epochs 6] [--hidden 512] [--quick]

DATA are folders of XC-repository text; --out may be that of experiments/accuracy/sharing, whose first ensemble is the same.
Judged on dev.txt if there is one, else on a tenth of train.txt that is held out; test splits are not read.

- Names become samples where labels.txt is there and features are words: those of features.txt, or, without one, the words of
  train_text.txt that two documents hold, in order, when they give back the features of train.txt. They are weighted by
  (1 + ln tf) ln(1 + N / df) in the second case, by 1 in the first, and such a sample has its label alone. They are given to the
  second stage, to the ensemble, or to both; an ensemble without them that is trained for as many steps tells what is theirs.
- Priors: the cosine between a sample and the mean of a label's samples, of their features or of their hidden vectors, or the
  label's name, for labels below n training samples. A logistic regression of "is right" on mean logit, sparse margin, the prior
  and whether there is one gives the sum, fitted on one half of the judged samples for the other half, both ways.

Prints a Markdown table for each set, means over the seeds; a second call computes only what is left.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression

import mach
from mach.compare.rows import this_machine
from mach.config import REPETITIONS
from mach.data import CSR, Dataset, take, take_rows, write_dataset
from mach.decoding import TopK
from mach.decoding.rerank import DEFAULT_WEIGHT, Reranker, SparseWeights, fit_margins
from mach.encoders import make_batch
from mach.metrics import Evaluator, hits, propensities
from mach.parallel.rerank import DEFAULT_COST
from mach.train.loop import held_out_rows

DEPTHS = (20, 100)
BELOW = (5, 20, None)  # training samples; None: every label
LISTED = 100
HIDDEN_BYTES = 1 << 30  # of the means of hidden vectors, which are left out beyond
KEYS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "R@10")
Figures = dict[str, dict[str, float]]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def name_features(source: Path, dataset: Dataset) -> tuple[CSR | None, str]:
    """Give the label names in the space of the features, (K, F), rows of length 1; or None and why not."""
    F, names = dataset.n_features, source / "labels.txt"
    if not names.is_file():
        return None, "there is no labels.txt"
    texts = names.read_text(encoding="utf-8").split("\n")[: dataset.n_labels]
    features = dataset.split("train").features
    if (source / "features.txt").is_file():
        known = {word: i for i, word in enumerate((source / "features.txt").read_text(encoding="utf-8").split("\n")[:F])}
        weights = np.ones(F)
    elif (source / "train_text.txt").is_file():
        documents = [words(line) for line in (source / "train_text.txt").read_text(encoding="utf-8").split("\n")[: len(features)]]
        counts = collections.Counter(word for document in documents for word in set(document))
        known = {word: i for i, word in enumerate(sorted(word for word, count in counts.items() if count > 1))}
        if len(known) != F:
            return None, f"there is no features.txt, and train_text.txt has {len(known):,} words for {F:,} features"
        weights = np.log(1 + len(documents) / np.array([counts[word] for word in known]))
        again, some = of_length_one(bags(documents[:200], known, weights)), take_rows(features, np.arange(200))
        if abs(again.to_scipy() - of_length_one(some).to_scipy()).max() > 0.01:
            return None, "there is no features.txt, and the words of train_text.txt do not give the features"
    else:
        return None, "there is neither features.txt nor train_text.txt"
    return of_length_one(bags([words(text) for text in texts], known, weights)), ""


def bags(documents: list[list[str]], known: dict[str, int], weights_F: np.ndarray) -> CSR:
    """Weigh the words of documents."""
    rows, columns, values = [], [], []
    for n, document in enumerate(documents):
        for f, count in collections.Counter(known[word] for word in document if word in known).items():
            rows.append(n)
            columns.append(f)
            values.append((1 + math.log(count)) * weights_F[f])
    return CSR.from_scipy(sp.csr_array((values, (rows, columns)), shape=(len(documents), len(weights_F))))


def of_length_one(features: CSR) -> CSR:
    rows = features.to_scipy()
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    values = rows.data / np.repeat(np.where(norms > 0, norms, 1), np.diff(rows.indptr))
    return CSR(np.array(features.indptr), np.array(features.indices), values.astype(np.float32), features.n_columns)


def joined(above: CSR, below: CSR) -> CSR:
    return CSR.from_scipy(sp.vstack([above.to_scipy(), below.to_scipy()]))


def chunks(n_samples: int, size: int = 2048) -> Iterator[np.ndarray]:
    yield from np.array_split(np.arange(n_samples), max(1, -(-n_samples // size)))


def decode(model: mach.Model, features: CSR, k: int) -> TopK:
    parts = [model.predict_topk(take_rows(features, rows), k) for rows in chunks(len(features))]
    return TopK(np.concatenate([p.labels for p in parts]), np.concatenate([p.scores for p in parts]))


def hidden(model: mach.Model, features: CSR) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows and the hidden vectors of all repetitions, one behind the other, scaled to length 1."""
    for rows in chunks(len(features)):
        batch = make_batch(take_rows(features, rows), normalize=model.config.normalize, device=model.device)
        found = np.concatenate([each.mlp.forward(each.input.forward(batch))[0].numpy() for each in model.repetitions], 1)
        yield rows, found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def as_scorer(rows_KF: sp.csr_array) -> SparseWeights:
    """Hold sparse vectors of labels so that their cosines with samples are margins."""
    rows = CSR.from_scipy(rows_KF)
    assert rows.values is not None
    bits = (rows.values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return SparseWeights(rows.indptr, rows.indices, bits, np.zeros(len(rows), np.float32), rows.n_columns)


def hidden_cosines(model: mach.Model, train: CSR, labels: CSR, features: CSR, top: TopK) -> np.ndarray | None:
    """Give the cosine of samples and the mean hidden vector of each label listed."""
    K, width = labels.n_columns, model.config.hidden * len(model.repetitions)
    if 4 * K * width > HIDDEN_BYTES:
        return None
    sums_KW, members = np.zeros((K, width), np.float32), labels.to_scipy()
    for rows, found in hidden(model, train):
        part = members[rows].T.tocsr()
        touched = np.flatnonzero(np.diff(part.indptr))
        sums_KW[touched] += part[touched] @ found
    sums_KW /= np.maximum(np.linalg.norm(sums_KW, axis=1, keepdims=True), 1e-12)
    out = np.empty(top.labels.shape, np.float32)
    for rows, found in hidden(model, features):
        for n, vector in zip(rows, found, strict=True):
            out[n] = sums_KW[top.labels[n]] @ vector
    return out


def measure(dataset: Dataset, names: CSR | None, out: Path, config: mach.Config, quick: bool) -> Figures:
    """Give the figures of every line of the table; if quick, without those of other ensembles."""
    has_dev, split, K = "dev" in dataset.split_names, dataset.split("train"), dataset.n_labels
    path = f"each-{config.repetitions}-{config.n_buckets(K)}-{config.hidden}"
    model = mach.train(config, dataset, out / path)
    held, judged = held_out_rows(config, dataset), dataset.split("dev") if has_dev else split
    rows = np.arange(judged.n_samples) if has_dev else held
    fitted = np.setdiff1d(np.arange(split.n_samples), held)
    train, labels = of_length_one(take(split.features, fitted)), take_rows(split.labels, fitted)
    features, truth = of_length_one(take(judged.features, rows)), take_rows(judged.labels, rows)
    counts_K = np.bincount(labels.indices, minlength=K)
    weights_K = propensities(np.bincount(split.labels.indices, minlength=K), split.n_samples)
    R, listed, found = len(model.repetitions), min(K, DEPTHS[0] + math.ceil(model.sizes.labels_a_sample)), {}

    def figures(labels_Nk: np.ndarray) -> dict[str, float]:
        evaluator = Evaluator(K, propensities=weights_K)
        evaluator.update(labels_Nk, None, truth)
        return {name: 100 * value for name, value in evaluator.result().items() if name in KEYS}

    def second_stage(model: mach.Model, X: CSR, Y: CSR, depth: int = DEPTHS[0]) -> Reranker:
        lists = decode(model, X, min(K, listed - DEPTHS[0] + depth)).labels
        return Reranker(fit_margins(X, Y, lambda: [(np.arange(len(X)), lists)], costs=(DEFAULT_COST,))[0], depth, DEFAULT_WEIGHT)

    top = decode(model, features, min(LISTED, K))
    found["one stage"] = figures(top.labels)
    linear = second_stage(model, train, labels)
    found["both stages"] = figures(linear.rerank(features, top, LISTED if K > LISTED else K, R).labels)
    if names is not None:
        has_words = np.flatnonzero(np.diff(names.indptr))
        own = CSR(np.arange(K + 1, dtype=np.int64), np.arange(K, dtype=np.int32), None, K)
        X, Y = joined(train, take_rows(names, has_words)), joined(labels, take_rows(own, has_words))
        again = second_stage(model, X, Y)
        found["names in the second stage"] = figures(again.rerank(features, top, top.labels.shape[1], R).labels)
    if names is not None and not quick:
        data = out / "named.data"
        if not (data / "manifest.json").exists():
            write_dataset(data, {"train": (X.to_scipy(), Y.to_scipy())})
        named = mach.train(config.replace(validation=0.0), Dataset.open(data), out / f"named-{path}")
        epochs = round(int(config.epochs) * len(X) / len(train))
        longer = mach.train(config.replace(epochs=epochs), dataset, out / f"{epochs}-{path}")
        for each, what, pairs in (
            (named, "names in the ensemble", {"both stages": (train, labels), "both stages, in the second too": (X, Y)}),
            (longer, "no names, as many steps", {"both stages": (train, labels)}),
        ):
            new = decode(each, features, min(LISTED, K))
            found[f"{what}, one stage"] = figures(new.labels)
            for stages, pair in pairs.items():
                again = second_stage(each, *pair)
                found[f"{what}, {stages}"] = figures(again.rerank(features, new, new.labels.shape[1], R).labels)
    members = labels.to_scipy()
    priors = {"mean of the features": as_scorer(of_length_one(CSR.from_scipy(members.T @ train.to_scipy())).to_scipy())}
    cosines = {name: scorer.margins(features, top.labels) for name, scorer in priors.items()}
    by_hidden = hidden_cosines(model, train, labels, features, top)
    if by_hidden is not None:
        cosines["mean of the hidden vectors"] = by_hidden
    if names is not None:
        cosines["name"] = as_scorer(names.to_scipy()).margins(features, top.labels)
    right, half = hits(top.labels, truth), np.arange(len(rows)) % 2 == 0
    for depth in sorted({min(depth, K) for depth in DEPTHS}):
        first = dataclasses.replace(linear if depth == DEPTHS[0] else second_stage(model, train, labels, depth), depth=depth)
        chosen, margins = top.labels[:, :depth], first.weights.margins(features, np.ascontiguousarray(top.labels[:, :depth]))

        def ordered(*columns: np.ndarray, depth: int = depth, chosen: np.ndarray = chosen) -> dict[str, float]:
            x, scores = np.stack([top.scores[:, :depth] / R, *columns], -1).astype(np.float64), np.zeros(chosen.shape)
            for fit in (half, ~half):
                regression = LogisticRegression(C=1e3, max_iter=300)
                regression.fit(x[fit].reshape(-1, x.shape[-1]), right[fit, :depth].ravel())
                scores[~fit] = x[~fit] @ regression.coef_[0]
            order = np.argsort(-scores, axis=1, kind="stable")
            return figures(np.concatenate([np.take_along_axis(chosen, order, 1), top.labels[:, depth:]], 1))

        found[f"fitted, the first {depth}: margin"] = ordered(margins)
        for below in BELOW:
            rare = counts_K[chosen] < (split.n_samples if below is None else below)
            if not rare.any():
                continue
            whom = "all labels" if below is None else f"labels below {below}"
            flag = [] if below is None else [rare]
            if below is not None:
                found[f"fitted, the first {depth}: margin, whether it is of {whom}"] = ordered(margins, *flag)
            for name, cosine in cosines.items():
                found[f"fitted, the first {depth}: margin, {name} of {whom}"] = ordered(margins, cosine[:, :depth] * rare, *flag)
            every = [cosine[:, :depth] * rare for cosine in cosines.values()]
            found[f"fitted, the first {depth}: margin, all of these of {whom}"] = ordered(margins, *every, *flag)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="train no ensemble on names")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    for source in args.data:
        dataset = mach.prepare(source, args.out / f"{source.name}.data")
        names, why = name_features(source, dataset)
        each: list[Figures] = []
        for seed in map(int, args.seeds.split(",")):
            out = args.out / f"{source.name}-{seed}-{args.epochs}-{args.hidden}"
            known = out / f"tail-{args.repetitions}{'-quick' if args.quick else ''}.json"
            if not known.exists():
                fixed = {"rerank": 0, "validation": 0.0 if "dev" in dataset.split_names else 0.1}
                fixed["buckets"] = mach.Config().n_buckets(dataset.n_labels)
                config = mach.Config(seed=seed, epochs=args.epochs, hidden=args.hidden, repetitions=args.repetitions, **fixed)
                known.write_text(json.dumps(measure(dataset, names, out, config, args.quick)))
            each.append(json.loads(known.read_text()))
        print(f"\n## {source.name}: R = {args.repetitions}, D = {args.hidden}, {args.epochs} epochs, seeds {args.seeds}\n")
        if names is None:
            print(f"No names as samples: {why}.\n")
        else:
            share = np.mean(np.diff(names.indptr) > 0)
            print(f"{100 * share:.0f} % of the names hold a known word, {names.nnz / len(names):.1f} of them on average.\n")
        print("| what orders the labels | P@1 / P@3 / P@5 | to both stages | PSP@1 / PSP@3 / PSP@5 | to both stages | R@10 |")
        print("|" + "---|" * 6)
        for name in each[0]:
            cells = [name]
            for keys in (KEYS[:3], KEYS[3:6]):
                cells.append(" / ".join(f"{np.mean([one[name][key] for one in each]):.2f}" for key in keys))
                gains = [[one[name][key] - one["both stages"][key] for one in each] for key in keys]
                spread = [f" ±{np.std(gain, ddof=1):.2f}" if len(each) > 1 else "" for gain in gains]
                cells.append(" / ".join(f"{np.mean(gain):+.2f}{more}" for gain, more in zip(gains, spread, strict=True)))
            cells.append(f"{np.mean([one[name]['R@10'] for one in each]):.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
