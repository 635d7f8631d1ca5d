"""Do groups learnt from data beat random ones? Tables of several kinds, in some or all of the R repetitions.

    python experiments/accuracy/groups/run.py DATA --out runs/groups [--labels 0.5] [--kinds random,similar] [--seeds 0,1,2]

DATA is a folder of XC-repository text, or one that `mach prepare` made; only its train split is read: nine tenths train, a tenth
is held out and measured. With --labels, a share of the labels is drawn and only their samples are kept, so that a table of many
kinds is a matter of minutes. Repetitions share nothing, so each kind is trained once, in all R, and mixes are decoded: a mix of
a quarter takes R / 4 repetitions of the kind, the others random. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from making import (
    apart,
    as_scored,
    companion_vectors,
    even_loads,
    frequent_alone,
    instance_vectors,
    random_for,
    similar_order,
    strata,
    tail_together,
    together,
)  # fmt: skip

import mach
from mach.compare.evaluate import evaluator_for
from mach.data import CSR, Dataset, take, take_rows
from mach.decoding import decode_topk
from mach.hashing import LabelTable
from mach.hashing.grouping import LabelSums, group_labels
from mach.model import Model, Packed
from mach.store.folder import sizes_of
from mach.train.loop import Group

KEYS = ("P@1", "P@3", "P@5", "R@10", "R@100", "PSP@1", "PSP@5")
KINDS = ("random", "grouped", "similar:256", "tail:32", "strata:32", "companions", "apart", "alone", "even", "scored", "full")
SHARES = (0.25, 0.5, 1.0)
TEST_SAMPLES = 4000
SCORED, CHOICES, SAMPLES = 16, 5, 50_000  # best buckets kept of a sample, choices of a label, samples asked


def given(rows_RK: np.ndarray, n_buckets: int) -> LabelTable:
    """Make a table of the buckets given."""
    R, K = rows_RK.shape
    return LabelTable.hashed(K, n_buckets, R).with_given(dict(enumerate(rows_RK)))


def held_out(data: Path, out: Path, share: float) -> Dataset:
    """Write the train split again as nine tenths and one, perhaps of a share of the labels; give it prepared."""
    if not (out / "p" / "manifest.json").exists():
        whole = Dataset.open(data) if (data / "manifest.json").exists() else mach.prepare(data, out / "whole")
        train = whole.split("train")
        X, labels = train.features.to_scipy(), train.labels
        Y = sp.csr_matrix(
            (np.ones(len(labels.indices), np.float32), labels.indices, labels.indptr), (len(labels), whole.n_labels)
        )
        random = np.random.default_rng(12345)
        chosen = np.sort(random.permutation(whole.n_labels)[: round(share * whole.n_labels)])
        Y = Y[:, chosen]
        rows = random.permutation(np.flatnonzero(np.diff(Y.indptr)))
        X = X[:, np.unique(X[rows].indices)]
        n = len(rows) // 10
        for name, part in (("test", np.sort(rows[:n])), ("train", np.sort(rows[n:]))):
            out.joinpath("xc").mkdir(parents=True, exist_ok=True)
            with open(out / "xc" / f"{name}.txt", "w") as file:
                file.write(f"{len(part)} {X.shape[1]} {Y.shape[1]}\n")
                for x, y in zip(X[part], Y[part], strict=True):
                    values = " ".join(f"{i}:{v:.6g}" for i, v in zip(x.indices, x.data, strict=True))
                    file.write(f"{','.join(map(str, y.indices))} {values}\n")
    return mach.prepare(out / "xc", out / "p")


class Bench:
    """One data set and one seed: trains a kind and keeps what its repetitions say of the test samples."""

    def __init__(self, dataset: Dataset, config: mach.Config, out: Path):
        self.dataset, self.config, self.out = dataset, config, out
        self.sizes = sizes_of(config, dataset)
        self.K, self.B, self.R = self.sizes.n_labels, self.sizes.n_buckets, int(config.repetitions)
        train = dataset.split("train")
        X, labels = train.features.to_scipy().astype(np.float32), train.labels
        lengths = np.sqrt(np.maximum(np.asarray(X.multiply(X).sum(1)).ravel(), 1e-30))
        self.X_NF = sp.csr_matrix(sp.diags((1 / lengths).astype(np.float32)) @ X)
        ones = np.ones(len(labels.indices), np.float32)
        self.Y_NK = sp.csr_matrix((ones, labels.indices, labels.indptr), (len(labels), self.K))
        self.counts_K = np.bincount(labels.indices, minlength=self.K)
        test = dataset.split("test")
        self.test_rows = np.arange(min(TEST_SAMPLES, test.n_samples))
        self.test, self.truth = take(test.features, self.test_rows), take_rows(test.labels, self.test_rows)

    def tables(self, kind: str) -> np.ndarray:
        """Give the R tables of a kind, (R, K)."""
        return np.stack([self.table(kind, r) for r in range(self.R)])

    def table(self, kind: str, r: int) -> np.ndarray:
        """Give one repetition's table, (K,): a function of the data, the seed and r."""
        name, _, option = kind.partition(":")
        seed, B, K = self.config.seed, self.B, self.K
        random = random_for(name, seed, r)
        if name in ("random", "scored"):
            return LabelTable.hashed(K, B, repetitions=[r], seed=seed).array()[0].astype(np.int64)
        if name in ("similar", "apart"):
            vectors = instance_vectors(self.X_NF, self.Y_NK, random, int(option or 48))
            if name == "similar":
                return together(similar_order(vectors, B, random), B)
            return apart(similar_order(vectors, K, random), B, random)
        if name == "grouped":
            sums = LabelSums(self.counts_K, seed=seed, repetition=r)
            X, Y = self.X_NF, self.Y_NK
            sums.add(X.indptr.astype(np.int64), X.indices, X.data, Y.indptr.astype(np.int64), Y.indices)
            return group_labels(sums, B, seed=seed, repetition=r)
        if name in ("tail", "strata"):  # :least samples of a label that is not of it
            vectors = instance_vectors(self.X_NF, self.Y_NK, random, 256)
            make = tail_together if name == "tail" else strata
            return make(vectors, self.counts_K < int(option or 32), B, random)
        if name == "companions":
            return together(similar_order(companion_vectors(self.Y_NK, random), B, random), B)
        if name == "alone":
            return frequent_alone(self.counts_K, B, round(float(option or 0.125) * B), random)
        return even_loads(self.counts_K, B, random)

    def outputs(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Give the tables (R, K) and the outputs for the test samples (N, R, B) of a kind, trained once, then kept."""
        path = self.out / f"{kind.replace(':', '_')}-{self.config.seed}"
        if not path.with_suffix(".outputs.npy").exists():
            began = time.perf_counter()
            rows_RK = self.tables(kind)
            made_s = time.perf_counter() - began
            table = given(rows_RK, self.B)
            group = Group(self.config, self.dataset, self.sizes, table, torch.device("cpu"))
            for record in group.steps(lambda r: None):
                if kind.startswith("scored") and record.step == group.steps_per_epoch:
                    rows_RK = self.moved(group, rows_RK, int(kind.partition(":")[2] or CHOICES))
                    group.table = table = given(rows_RK, self.B)
            found = self.asked(self.config, group, self.test)
            np.save(path.with_suffix(".table.npy"), rows_RK)
            np.save(path.with_suffix(".outputs.npy"), found)
            print(f"<!-- {path.name}: tables {made_s:.1f} s, all {time.perf_counter() - began:.0f} s -->", flush=True)
        return np.load(path.with_suffix(".table.npy")), np.load(path.with_suffix(".outputs.npy"), mmap_mode="r")

    def asked(self, config: mach.Config, group: Group, features: CSR) -> np.ndarray:
        """Give a group's outputs, (N, R, B)."""
        packed = [
            Packed.single(group.packed.repetition(r), config=config, features="sparse") for r in range(len(group.repetitions))
        ]
        model = Model(config=config, sizes=group.sizes, table=group.table, repetitions=packed, device=torch.device("cpu"))
        return np.concatenate([model.bucket_logits(rows) for rows in model.row_chunks(features)])

    def moved(self, group: Group, rows_RK: np.ndarray, n_choices: int) -> np.ndarray:
        """Give the tables in which each label moved to where its samples' scores are high."""
        rows = np.sort(np.random.default_rng(0).permutation(self.Y_NK.shape[0])[:SAMPLES])
        features, Y_NK = self.dataset.split("train").features, self.Y_NK[rows]
        best = [[] for _ in range(self.R)]
        for start in range(0, len(rows), 1024):
            z_NRB = self.asked(self.config, group, take(features, rows[start : start + 1024]))
            for r in range(self.R):
                found = np.argpartition(-z_NRB[:, r], SCORED, axis=1)[:, :SCORED]
                score = 1 / (1 + np.exp(-np.take_along_axis(z_NRB[:, r], found, 1)))
                at = np.arange(len(found) + 1) * SCORED
                best[r].append(sp.csr_matrix((score.ravel(), found.ravel(), at), (len(found), self.B)))
        return np.stack(
            [
                as_scored(
                    (Y_NK.T @ sp.vstack(best[r])).tocsr(), rows_RK[r], self.B, n_choices, random_for("move", self.config.seed, r)
                )
                for r in range(self.R)
            ]
        )

    def measure(self, parts: Sequence[tuple[str, Sequence[int]]]) -> dict[str, float]:
        """Decode some repetitions of some kinds together."""
        tables, outputs = [], []
        for kind, numbers in parts:
            rows_RK, z_NRB = self.outputs(kind)
            tables.append(rows_RK[list(numbers)])
            outputs.append(z_NRB[:, list(numbers)])
        z_NRB, table = np.ascontiguousarray(np.concatenate(outputs, 1)), given(np.concatenate(tables), self.B)
        evaluator = evaluator_for(self.dataset)
        for start in range(0, len(z_NRB), 500):
            top = decode_topk(z_NRB[start : start + 500], table, 100, loss=self.config.loss, estimator="logits")
            rows = np.arange(start, start + len(top.labels))
            evaluator.update(top.labels, top.scores, take_rows(self.truth, rows))
        return evaluator.result()

    def full(self) -> dict[str, float]:
        """Train the full head of the same encoder and measure it."""
        path = self.out / f"full-{self.config.seed}.json"
        if not path.exists():
            config = self.config.replace(table="identity")
            began, sizes = time.perf_counter(), sizes_of(config, self.dataset)
            group = Group(config, self.dataset, sizes, LabelTable.identity(self.K), torch.device("cpu"))
            for _ in group.steps(lambda r: None):
                pass
            packed = [Packed.single(group.packed.repetition(0), config=config, features="sparse")]
            model = Model(config=config, sizes=sizes, table=group.table, repetitions=packed, device=torch.device("cpu"))
            top = model.predict_topk(self.test, 100)
            evaluator = evaluator_for(self.dataset)
            evaluator.update(top.labels, top.scores, self.truth)
            path.write_text(json.dumps(evaluator.result()))
            print(f"<!-- full: {time.perf_counter() - began:.0f} s -->", flush=True)
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", type=float, default=1.0, help="share of the labels to keep")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--buckets", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = held_out(args.data, args.out, args.labels)
    for number, seed in enumerate(map(int, args.seeds.split(","))):
        config = mach.Config(
            epochs=args.epochs, hidden=args.hidden, repetitions=args.repetitions, seed=seed,
            buckets=args.buckets if args.buckets == "auto" else int(args.buckets),
        )  # fmt: skip
        bench = Bench(dataset, config, args.out)
        if number == 0:
            n = dataset.split("train").n_samples
            print(
                f"\n{args.data.name}: N = {n}, K = {bench.K}, {len(bench.Y_NK.indices) / bench.K:.1f} samples a label, "
                f"R = {bench.R}, B = {bench.B}, D = {config.hidden}, {config.epochs} epochs\n"
            )
            print(f"| seed | table | share | {' | '.join(KEYS)} |\n|---|---|---|{'---|' * len(KEYS)}", flush=True)
        for kind in args.kinds.split(","):
            if kind == "full":
                show(seed, "full head", "", bench.full())
                continue
            for share in (1.0,) if kind == "random" else SHARES:
                n_learnt = round(share * bench.R)
                parts = [(kind, range(n_learnt)), ("random", range(n_learnt, bench.R))]
                show(seed, kind, f"{share:g}", bench.measure([part for part in parts if len(part[1])]))


def show(seed: int, kind: str, share: str, metrics: dict[str, float]) -> None:
    """Print one row."""
    print(f"| {seed} | {kind} | {share} | {' | '.join(f'{100 * metrics[key]:.2f}' for key in KEYS)} |", flush=True)


if __name__ == "__main__":
    main()
