"""Do short dense label vectors order the first labels better than sparse linear weights? Instead of them, and beside them.

    python experiments/accuracy/lowrank/run.py DATA [DATA ...] --out runs/sharing [--seeds 0] [--epochs 6] [--hidden 512]

DATA are folders of XC-repository text; --out may be that of experiments/accuracy/sharing, whose first ensemble is the same.
Judged on dev.txt if there is one, else on a tenth of train.txt that is held out; test splits are not read. A label's score is
u_k . h(x) + b_k with 32 or 64 numbers, trained by logistic loss on the ensemble's own shortlists of training samples, and

- features: h is the sum of the rows of a small table that belong to the sample's features, learnt at the same time;
- hidden, fixed: the first principal components of the hidden vectors of all repetitions, one behind the other;
- hidden, learnt: a linear layer over the first 512 of these, learnt at the same time.

The mean logit, the margin of the sparse weights and this score are added up with the weights of a logistic regression, fitted on
one half of the judged samples for the other half, both ways. Prints a Markdown table for each set, means over the seeds; a second
call computes only what is left.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.utils.extmath import randomized_svd

import mach
from mach.compare.rows import this_machine
from mach.config import REPETITIONS
from mach.data import CSR, Dataset, take, take_rows
from mach.decoding import TopK
from mach.decoding.rerank import fit_margins
from mach.encoders import make_batch
from mach.kernels import jit
from mach.metrics import Evaluator, hits, propensities
from mach.parallel.rerank import DEFAULT_COST
from mach.train.loop import held_out_rows

COMPONENTS, SAMPLES = 512, 20_000  # of hidden vectors, and the samples that they are found with
KEYS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5", "R@10", "R@100")


@dataclass(frozen=True, slots=True)
class Kind:
    """How label vectors are made."""

    source: str  # features, fixed or learnt
    width: int
    passes: int
    rate: float
    depths: tuple[int, ...] = (20, 100, 1000)

    @property
    def name(self) -> str:
        """Give what stands in the table."""
        return f"{'features' if self.source == 'features' else f'hidden, {self.source}'}, {self.width}"


KINDS = (  # passes and rates: the best of nine each on tate, seed 0, depth 20
    Kind("features", 32, 3, 0.1, (100,)),
    Kind("features", 64, 3, 0.1),
    Kind("fixed", 64, 8, 0.3),
    Kind("learnt", 32, 8, 0.1, (100,)),
    Kind("learnt", 64, 8, 0.1, (20, 100)),
)


@jit
def _pass(
    order: np.ndarray, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, listed_Nm: np.ndarray,
    true_indptr: np.ndarray, true_indices: np.ndarray, table_FW: np.ndarray, vectors_KW: np.ndarray, bias_K: np.ndarray,
    squares_F: np.ndarray, squares_K: np.ndarray, squares_bias_K: np.ndarray, rate: float, learns: bool,
) -> float:  # fmt: skip
    """Visit every sample once: its true labels, then those of its list that are not; row-wise Adagrad. Give the loss a sample."""
    W, m = table_FW.shape[1], listed_Nm.shape[1]
    h, grad, total = np.zeros(W, np.float32), np.zeros(W, np.float32), 0.0
    for n in order:
        h[:] = 0
        grad[:] = 0
        for i in range(indptr[n], indptr[n + 1]):
            for w in range(W):
                h[w] += values[i] * table_FW[indices[i], w]
        length = np.float32(0)
        for w in range(W):
            length += h[w] * h[w]
        low, high = true_indptr[n], true_indptr[n + 1]
        for j in range(high - low + m):
            is_true = j < high - low
            k = np.int64(true_indices[low + j]) if is_true else np.int64(listed_Nm[n, j - (high - low)])
            if not is_true:
                at = low + np.searchsorted(true_indices[low:high], k)
                if at < high and true_indices[at] == k:
                    continue
            z = bias_K[k]
            for w in range(W):
                z += h[w] * vectors_KW[k, w]
            slope = np.float32(1 / (1 + math.exp(-z)) - (1.0 if is_true else 0.0))
            total += math.log1p(math.exp(-abs(z))) + max(0.0, -z if is_true else z)
            squares_K[k] += slope * slope * length / W
            squares_bias_K[k] += slope * slope
            step = np.float32(rate) * slope / np.sqrt(squares_K[k] + np.float32(1e-8))
            for w in range(W):
                grad[w] += slope * vectors_KW[k, w]
                vectors_KW[k, w] -= step * h[w]
            bias_K[k] -= np.float32(rate) * slope / np.sqrt(squares_bias_K[k] + np.float32(1e-8))
        if learns:
            length = np.float32(0)
            for w in range(W):
                length += grad[w] * grad[w]
            for i in range(indptr[n], indptr[n + 1]):
                f = indices[i]
                squares_F[f] += values[i] * values[i] * length / W
                step = np.float32(rate) * values[i] / np.sqrt(squares_F[f] + np.float32(1e-8))
                for w in range(W):
                    table_FW[f, w] -= step * grad[w]
    return total / len(order)


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """u (K, W), b (K,), and what makes h (W,) of a sample: rows (F, W)."""

    table_FW: np.ndarray
    vectors_KW: np.ndarray
    bias_K: np.ndarray
    seconds: float

    @classmethod
    def fit(cls, kind: Kind, samples: CSR, labels: CSR, listed_Nm: np.ndarray, seed: int) -> Vectors:
        """Train on N samples, all of their labels and what is wrong in their lists."""
        assert samples.values is not None
        began, random, W, K = time.perf_counter(), np.random.default_rng(seed), kind.width, labels.n_columns
        table = random.standard_normal((samples.n_columns, W)).astype(np.float32) / np.float32(math.sqrt(W))
        if kind.source == "fixed":
            table = np.eye(W, dtype=np.float32)
        positive = np.bincount(labels.indices, minlength=K)
        often = np.bincount(listed_Nm.ravel(), minlength=K)
        bias = np.log((positive + 0.5) / (np.maximum(often - positive, 0) + 1.0)).astype(np.float32)
        vectors, squares = np.zeros((K, W), np.float32), np.full(len(table), 1e-4, np.float32)
        moments = (squares, np.full(K, 1e-4, np.float32), np.full(K, 1e-4, np.float32))
        for _ in range(kind.passes):
            order = random.permutation(len(samples))
            arrays = (order, samples.indptr, samples.indices, samples.values, listed_Nm, labels.indptr, labels.indices)
            _pass(*arrays, table, vectors, bias, *moments, kind.rate, kind.source != "fixed")
        return cls(table, vectors, bias, time.perf_counter() - began)

    def stored(self, form: str) -> Vectors:
        """Give what is left of the label vectors in bfloat16 or int8 with a scale a label."""
        if form == "bf16":
            bits = self.vectors_KW.view(np.uint32).astype(np.uint64)
            near = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)).astype(np.uint32)
            return Vectors(self.table_FW, near.view(np.float32), self.bias_K, self.seconds)
        scale = np.maximum(np.abs(self.vectors_KW).max(1, keepdims=True), 1e-12) / 127
        return Vectors(self.table_FW, np.rint(self.vectors_KW / scale).astype(np.float32) * scale, self.bias_K, self.seconds)

    def scores(self, samples: CSR, labels_Nk: np.ndarray) -> np.ndarray:
        """Give u_k . h + b_k of the labels of each sample."""
        h_NW = np.asarray(samples.to_scipy() @ self.table_FW, np.float32)
        scores = self.bias_K[labels_Nk]
        for rows in np.array_split(np.arange(len(h_NW)), max(1, labels_Nk.size // (1 << 20))):
            scores[rows] += np.einsum("nw,nkw->nk", h_NW[rows], self.vectors_KW[labels_Nk[rows]])
        return scores


def chunks(n_samples: int, size: int = 2048) -> Iterator[np.ndarray]:
    yield from np.array_split(np.arange(n_samples), max(1, -(-n_samples // size)))


def hidden(model: mach.Model, features: CSR) -> Iterator[np.ndarray]:
    """Yield the hidden vectors of all repetitions, one behind the other, (n, R D)."""
    for rows in chunks(len(features)):
        batch = make_batch(take_rows(features, rows), normalize=model.config.normalize, device=model.device)
        yield np.concatenate([each.mlp.forward(each.input.forward(batch))[0].numpy() for each in model.repetitions], 1)


def components(model: mach.Model, features: CSR, others: CSR, seed: int) -> tuple[CSR, CSR]:
    """Give the first principal components of the hidden vectors of samples and of others, as rows without zeros."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(features))[:SAMPLES])
    sample = np.concatenate(list(hidden(model, take_rows(features, drawn))))
    mean = sample.mean(0)
    _, _, axes = randomized_svd(sample - mean, COMPONENTS, n_oversamples=10, n_iter=2, random_state=seed)
    found = [np.concatenate([(part - mean) @ axes.T for part in hidden(model, each)]) for each in (features, others)]
    scale = np.float32(1 / math.sqrt(np.square(found[0]).sum(1).mean()))
    return as_rows(found[0] * scale), as_rows(found[1] * scale)


def as_rows(dense: np.ndarray) -> CSR:
    n, m = dense.shape
    return CSR(np.arange(n + 1, dtype=np.int64) * m, np.tile(np.arange(m, dtype=np.int32), n), dense.ravel(), m)


def first(rows: CSR, width: int) -> CSR:
    """Give the first columns of rows without zeros."""
    assert rows.values is not None
    return as_rows(np.ascontiguousarray(rows.values.reshape(len(rows), -1)[:, :width]))


def of_length_one(features: CSR) -> CSR:
    """Give the samples scaled to length 1, in memory."""
    rows = features.to_scipy()
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    values = rows.data / np.repeat(np.where(norms > 0, norms, 1), np.diff(rows.indptr))
    return CSR(np.array(features.indptr), np.array(features.indices), values.astype(np.float32), features.n_columns)


def decode(model: mach.Model, features: CSR, k: int) -> TopK:
    parts = [model.predict_topk(take_rows(features, rows), k) for rows in chunks(len(features))]
    return TopK(np.concatenate([p.labels.astype(np.int32) for p in parts]), np.concatenate([p.scores for p in parts]))


def measure(dataset: Dataset, out: Path, config: mach.Config, depths: list[int]) -> dict[str, dict[str, float]]:
    """Give the figures of every line of the table."""
    has_dev, split = "dev" in dataset.split_names, dataset.split("train")
    B, seed = config.n_buckets(dataset.n_labels), config.seed
    model = mach.train(config, dataset, out / f"each-{config.repetitions}-{B}-{config.hidden}")
    held, judged = held_out_rows(config, dataset), dataset.split("dev") if has_dev else split
    rows = np.arange(judged.n_samples) if has_dev else held
    fitted = np.setdiff1d(np.arange(split.n_samples), held)
    train, labels = of_length_one(take(split.features, fitted)), take_rows(split.labels, fitted)
    features, truth = of_length_one(take(judged.features, rows)), take_rows(judged.labels, rows)
    R, mean = len(model.repetitions), math.ceil(model.sizes.labels_a_sample)
    weights_K = propensities(np.bincount(split.labels.indices, minlength=dataset.n_labels), split.n_samples)
    longest = max(depths)
    lists = decode(model, train, min(longest + mean, dataset.n_labels)).labels
    top = decode(model, features, min(max(longest, 100), dataset.n_labels))
    inputs = {"features": (train, features), "learnt": components(model, train, features, seed)}
    inputs["fixed"] = tuple(first(each, 64) for each in inputs["learnt"])
    half, found = np.arange(len(rows)) % 2 == 0, {}

    def figures(labels_Nk: np.ndarray) -> dict[str, float]:
        evaluator = Evaluator(dataset.n_labels, propensities=weights_K)
        evaluator.update(labels_Nk, None, truth)
        result = evaluator.result()
        return {name: 100 * result.get(name, math.nan) for name in KEYS}

    def ordered(depth: int, columns: list[np.ndarray]) -> dict[str, float]:
        """Order the first labels by a sum whose weights are fitted on the other half."""
        labels_Nk, right = top.labels[:, :depth], hits(top.labels[:, :depth], truth)
        x, scores = np.stack([top.scores[:, :depth] / R, *columns], -1).astype(np.float64), np.zeros(labels_Nk.shape)
        for fit in (half, ~half):
            regression = LogisticRegression(C=1e3).fit(x[fit].reshape(-1, x.shape[-1]), right[fit].ravel())
            scores[~fit] = x[~fit] @ regression.coef_[0]
        order = np.argsort(-scores, axis=1, kind="stable")
        return figures(np.concatenate([np.take_along_axis(labels_Nk, order, 1), top.labels[:, depth:]], 1))

    def alone(depth: int, scores: np.ndarray) -> dict[str, float]:
        order = np.argsort(-scores, axis=1, kind="stable")
        return figures(np.concatenate([np.take_along_axis(top.labels[:, :depth], order, 1), top.labels[:, depth:]], 1))

    found["decoding alone"] = figures(top.labels)
    for depth in depths:
        depth = min(depth, dataset.n_labels)
        listed = np.ascontiguousarray(lists[:, : depth + mean])
        began = time.perf_counter()

        def parts(listed: np.ndarray = listed) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for some in chunks(len(listed), 1 << 15):
                yield some, listed[some].astype(np.int64)

        linear = fit_margins(train, labels, parts, costs=(DEFAULT_COST,))[0]
        seconds = time.perf_counter() - began
        margins = linear.margins(features, top.labels[:, :depth].astype(np.int64))
        bytes_ = 6 * len(linear.values) + 4 * len(linear.bias) + linear.indptr.nbytes
        found[f"{depth} | sparse"] = {"MB": bytes_ / 1e6, "s": seconds, **ordered(depth, [margins])}
        for kind in KINDS:
            if depth not in kind.depths:
                continue
            fit, judge = inputs[kind.source]
            vectors = Vectors.fit(kind, fit, labels, listed, seed)
            F = dataset.n_features if kind.source == "features" else R * config.hidden
            n_label, n_table = vectors.vectors_KW.size, F * kind.width
            for form, size in (("fp32", 4), ("bf16", 2), ("int8", 1)):
                if form != "fp32" and (kind.width, kind.source) != (64, "features"):
                    continue
                scales = 2 if form == "int8" else 1  # and biases, 4 bytes each; the table in bfloat16 beside shorter vectors
                mb = (size * n_label + 4 * scales * dataset.n_labels + max(2, size) * n_table) / 1e6
                scores = (vectors if form == "fp32" else vectors.stored(form)).scores(judge, top.labels[:, :depth])
                facts = {"MB": mb, "s": vectors.seconds}
                name = f"{depth} | {kind.name}, {form}"
                if form == "fp32":
                    found[f"{name}, alone"] = {**facts, **alone(depth, scores)}
                found[name] = {**facts, **ordered(depth, [scores])}
                if form == "fp32":
                    found[f"{name}, and sparse"] = {"MB": mb + bytes_ / 1e6, "s": vectors.seconds + seconds}
                    found[f"{name}, and sparse"] |= ordered(depth, [margins, scores])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=mach.Config().epochs)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--depths", nargs="+", type=int, default=[20, 100, 1000])
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    for source in args.data:
        dataset = mach.prepare(source, args.out / f"{source.name}.data")
        each = []
        for seed in map(int, args.seeds.split(",")):
            out = args.out / f"{source.name}-{seed}-{args.epochs}-{args.hidden}"
            known = out / f"lowrank-{'-'.join(map(str, args.depths))}.json"
            if not known.exists():
                fixed = {"rerank": 0, "repetitions": REPETITIONS, "validation": 0.0 if "dev" in dataset.split_names else 0.1}
                fixed["buckets"] = mach.Config().n_buckets(dataset.n_labels)
                config = mach.Config(seed=seed, epochs=args.epochs, hidden=args.hidden, **fixed)
                known.write_text(json.dumps(measure(dataset, out, config, args.depths)))
            each.append(json.loads(known.read_text()))
        full = dataset.n_labels * args.hidden * 2 / 1e6
        print(f"\n## {source.name}: D = {args.hidden}, {args.epochs} epochs, seeds {args.seeds}\n")
        print(f"A full head of that width takes {full:.1f} MB in bfloat16.\n")
        print("| depth | added to the mean logit | MB | s | P@1 / P@3 / P@5 | to decoding alone | PSP@1 / PSP@5 | R@10 / R@100 |")
        print("|" + "---|" * 8)
        for name, figures in each[0].items():
            mean = {key: float(np.mean([one[name][key] for one in each])) for key in figures}
            base = each[0]["decoding alone"] if len(each) == 1 else None
            cells = [name if "|" in name else f"| {name}"]
            cells += [f"{mean['MB']:.1f}", f"{mean['s']:.1f}"] if "MB" in mean else ["", ""]
            cells.append(" / ".join(f"{mean[key]:.2f}" for key in KEYS[:3]))
            gains = [[one[name][key] - one["decoding alone"][key] for one in each] for key in KEYS[:3]]
            spread = ["" if base else f" ±{np.std(gain, ddof=1):.2f}" for gain in gains]
            cells.append(" / ".join(f"{np.mean(gain):+.2f}{more}" for gain, more in zip(gains, spread, strict=True)))
            cells += [" / ".join(f"{mean[key]:.2f}" for key in keys) for keys in (KEYS[3:5], KEYS[5:])]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
