"""How much quicker is the certified search than the scan, and where does it stop to pay? Prints the tables of RESULTS.md.

python experiments/exact/run.py compare   K = 670,091, R = 32, B = 10,000: search, scan, plain gather, reading the scores
python experiments/exact/run.py trained RUN DATA [--labels 670091] [--only-search]   on a trained model's scores of test samples
python experiments/exact/run.py large     K = 50,000,000, B = 20,000: time and memory of a query
python experiments/exact/run.py grow      cost against K, R, B, k and flatness, drawn into exact.svg
python experiments/exact/run.py fit       the constants of mach/decoding/exact.py

All on one core. But for `trained`, scores are made: `trained_like` tells how.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import nnls

from mach.config import Estimator
from mach.data import Dataset, take
from mach.decoding.coarse import LANES, coarse_topk
from mach.decoding.estimators import bucket_scores
from mach.decoding.exact import COSTS, exact_topk, first_depth
from mach.decoding.pruned import Costs
from mach.decoding.scan import AGGREGATES, SUM, scan_topk
from mach.decoding.topk import GROUP
from mach.hashing.table import LabelTable
from mach.store.folder import Run

ONLY_SEARCH = COSTS._replace(scan=1e9, median=1e9, coarse=1e9)


def trained_like(table: LabelTable, n_samples: int, *, flatness: float = 1.0, n_related: int = 200, seed: int = 0) -> np.ndarray:
    """Make logits like those of sigmoid heads: 200 related labels of falling strength over a normal background.

    The j-th related label has logit 3 - 1.6 ln j (more or less 0.5 a sample, 0.3 a label), seen by each repetition with noise of
    0.7; labels that share a bucket add their odds. Background: mean -8, deviation 1.3. Flatness divides how far related labels
    stand above the mean of the background, not the noise.
    """
    rng = np.random.default_rng(seed)
    logits_NRB = rng.normal(-8, 1.3, (n_samples, table.n_repetitions, table.n_buckets)).astype(np.float32)
    n_related = min(n_related, table.n_labels)
    for n in range(n_samples):
        labels = rng.integers(table.n_labels, size=n_related)
        strengths = 11 + rng.normal(0, 0.5) - 1.6 * np.log(np.arange(1, n_related + 1)) + rng.normal(0, 0.3, n_related)
        for r in range(table.n_repetitions):
            seen = (strengths / flatness - 8 + rng.normal(0, 0.7, n_related)).astype(np.float32)
            np.logaddexp.at(logits_NRB[n, r], table.buckets(labels, r), seen)
    return logits_NRB


def scores_of(table: LabelTable, n_samples: int, estimator: Estimator, **how: Any) -> np.ndarray:
    return bucket_scores(trained_like(table, n_samples, **how), loss="logistic", estimator=estimator)


def quickest(calls: list[Callable[[], object]], rounds: int = 5) -> list[float]:
    """Call each in turn, several times, and give the shortest time of each, s; what is compared is timed in the same rounds.

    Time of this thread on its core, not of the clock: others' work on the machine disturbs it less.
    """
    best = [np.inf] * len(calls)
    for _ in range(rounds + 1):
        for i, call in enumerate(calls):
            start = time.thread_time()
            call()
            best[i] = min(best[i], time.thread_time() - start)
    return best


def gather(scores_RB: np.ndarray, table_RK: np.ndarray, k: int) -> np.ndarray:
    """Do it plainly: K sums, gathered with an int64 table, then a partial sort."""
    sums_K = scores_RB[0][table_RK[0]]
    for r in range(1, len(table_RK)):
        sums_K += scores_RB[r][table_RK[r]]
    best = np.argpartition(-sums_K, k - 1)[:k]
    return sums_K[best]


def compare() -> None:
    table = LabelTable.hashed(670_091, 10_000, 32)
    compare_on(table, lambda estimator: scores_of(table, 64, estimator), (1, 5, 20, 100, 1000))


def trained(run: str, data: str, n_labels: int, only_search: bool) -> None:
    """Do the same on a trained model's scores of the first 64 test samples, in its own table or one of so many made-up labels.

    A made-up table has the R and B of the model, and none of the labels it was trained on: the scores of the buckets are a
    trained model's, but which labels fall together into the good ones is left to chance.
    """
    model, features = Run.open(run).load(), Dataset.open(data).split("test").features
    table = LabelTable.hashed(n_labels, model.table.n_buckets, model.table.n_repetitions, seed=1) if n_labels else model.table
    logits_NRB = model.bucket_logits(take(features, np.arange(64)))
    print(f"K={table.n_labels} R={table.n_repetitions} B={table.n_buckets}, loss {model.config.loss}\n")

    def scores(estimator: Estimator) -> np.ndarray:
        return bucket_scores(logits_NRB.copy(), loss=model.config.loss, estimator=estimator)

    compare_on(table, scores, (5, 100), ONLY_SEARCH if only_search else COSTS)


def compare_on(table: LabelTable, scores: Callable[[Estimator], np.ndarray], ks: tuple[int, ...], costs: Costs = COSTS) -> None:
    """Check that search, scan and, for sums, the scan in bytes agree to the bit; time them and print a line each."""
    table_int64_RK = table.array().astype(np.int64)
    columns = (
        "estimator | k | search, us | scan of 64 | in bytes | scan of 1 | gather | reading | scanned | depth | touched | scored"
    )
    print(f"| {columns} |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for estimator in get_args(Estimator):
        scores_NRB = scores(estimator)
        n_samples, is_sum = len(scores_NRB), AGGREGATES[estimator] == SUM
        for k in ks:
            how = {"estimator": estimator, "n_threads": 1}
            search = partial(exact_topk, scores_NRB, table, k, **how, costs=costs)
            found, proof = search()
            scans = [scan_topk(scores_NRB, table.array(), k, **how)]
            scans += [coarse_topk(scores_NRB, table.array(), k, n_threads=1)] if is_sum else []
            for other in scans:
                assert np.array_equal(found.labels, other.labels)
                assert np.array_equal(found.scores, other.scores)
            search_s, read_s, scan_s, one_s, *rest = quickest(
                [
                    search,
                    scores_NRB.max,
                    partial(scan_topk, scores_NRB, table.array(), k, **how),
                    partial(scan_topk, scores_NRB[:1], table.array(), k, **how),
                    partial(coarse_topk, scores_NRB, table.array(), k, n_threads=1),
                    partial(gather, scores_NRB[0], table_int64_RK, k),
                ][: None if is_sum else 4],
                3,
            )
            each = search_s / n_samples
            bytes_x, gather_x = (f"{rest[0] / search_s:.1f} x", f"{rest[1] / each:.0f} x") if is_sum else ("", "")
            depth, n_touched, n_scored = [int(np.median(x)) for x in (proof.depth, proof.n_touched, proof.n_scored)]
            print(
                f"| {estimator} | {k} | {each * 1e6:.0f} | {scan_s / search_s:.1f} x | {bytes_x} | {one_s / each:.0f} x | "
                f"{gather_x} | {search_s / read_s:.1f} | {proof.scanned.mean():.0%} | {depth} | {n_touched:,} | {n_scored} |",
                flush=True,
            )


def large() -> None:
    small = LabelTable.hashed(30_000, 20_000, 32)
    exact_topk(scores_of(small, 1, "mean"), small, 5, estimator="mean", n_threads=1, costs=ONLY_SEARCH)  # compiled
    table = LabelTable.hashed(50_000_000, 20_000, 32)
    print("| estimator | k | ms a query | depth | labels touched | scored | peak MiB, all |\n|---|--:|--:|--:|--:|--:|--:|")
    for estimator in ("mean", "logits"):
        scores_NRB = scores_of(table, 8, estimator)
        for k in (1, 5, 20):
            search = partial(exact_topk, scores_NRB, table, k, estimator=estimator, n_threads=1, costs=ONLY_SEARCH)
            proof = search()[1]
            (taken_s,) = quickest([search], 3)
            peak_MiB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of all, the interpreter and the scores too
            assert not proof.scanned.any()
            print(
                f"| {estimator} | {k} | {taken_s / 8 * 1e3:.2f} | {np.median(proof.depth):.0f} | "
                f"{np.median(proof.n_touched):,.0f} | {np.median(proof.n_scored):.0f} | {peak_MiB:.0f} |",
                flush=True,
            )


def grow() -> None:
    """Vary one size at a time around K = 10**6, R = 16, B = 10,000, k = 5, flatness 1; scans up to K = 10**6."""
    base = {"K": 10**6, "R": 16, "B": 10_000, "k": 5, "flatness": 1.0}
    axes: dict[str, list[float]] = {
        "K": [10**4, 10**5, 10**6, 3 * 10**6, 10**7, 5 * 10**7],
        "R": [1, 2, 4, 8, 16, 32, 64],
        "B": [100, 300, 1000, 3000, 10_000, 30_000],
        "k": [1, 5, 20, 100, 300, 1000],
        "flatness": [1, 1.3, 1.7, 2.2, 3, 5, 30],
    }
    figure, plots = plt.subplots(1, len(axes), figsize=(18, 3.4), sharey=True, layout="constrained")
    print("| | N | " + " | ".join(base) + " | exact_topk, us | scan, us | of the scan | scanned |\n|" + "---|" * 11)
    for plot, (name, values) in zip(plots, axes.items(), strict=True):
        for n_samples in (32, 1):
            times: list[tuple[float, float]] = []
            for value in values:
                sizes = {**base, name: value}
                K, R, k = int(sizes["K"]), int(sizes["R"]), int(sizes["k"])
                table = LabelTable.hashed(K, min(int(sizes["B"]), K), R)
                scores_NRB = scores_of(table, n_samples, "mean", flatness=sizes["flatness"])
                how: dict[str, Any] = {"estimator": "mean", "n_threads": 1}
                proof = exact_topk(scores_NRB, table, k, **how)[1]
                calls: list[Callable[[], object]] = [partial(exact_topk, scores_NRB, table, k, **how)]
                if K <= 10**6:
                    calls.append(partial(scan_topk, scores_NRB, table.array(), k, **how))
                search_us, scan_us = ([1e6 * s / n_samples for s in quickest(calls, 3)] + [np.nan])[:2]
                times.append((search_us, scan_us))
                row = " | ".join(f"{v:g}" for v in sizes.values())
                print(
                    f"| {name} | {n_samples} | {row} | {search_us:.0f} | {scan_us:.0f} | {search_us / scan_us:.2f} | "
                    f"{proof.scanned.mean():.0%} |",
                    flush=True,
                )
            style = "-" if n_samples > 1 else ":"
            plot.loglog(values, [t[0] for t in times], "C0o" + style, label=f"exact_topk, N = {n_samples}")
            plot.loglog(values, [t[1] for t in times], "C1s" + style, label=f"scan, N = {n_samples}")
        plot.set_xlabel(name)
        plot.grid(alpha=0.3)
    plots[0].set_ylabel("µs a sample, one core")
    plots[0].legend(fontsize=7)
    figure.savefig(Path(__file__).with_name("exact.svg"), metadata={"Date": None})


def fit() -> None:
    """Fit times of searches to their counts, each weighed by its time; measure the others directly."""
    rows, times_ns = [], []
    for K, B, R in (
        (30_000, 3000, 8),
        (100_000, 10_000, 32),
        (670_091, 10_000, 32),
        (670_091, 3000, 16),
        (5_000_000, 20_000, 32),
    ):
        table = LabelTable.hashed(K, B, R)
        pairs = [(estimator, k) for estimator in ("mean", "logits", "min") for k in (1, 5, 20, 60, 100)]
        for estimator, k in pairs:
            scores_NRB = scores_of(table, 16, estimator)
            search = partial(exact_topk, scores_NRB, table, k, estimator=estimator, n_threads=1, costs=ONLY_SEARCH)
            proof = search()[1]
            (taken_s,) = quickest([search])
            depth = max(first_depth(k, B), float(proof.depth.mean()) if estimator != "min" else 0)
            rows.append([R * B, R * depth, proof.n_touched.mean(), R * proof.n_scored.mean(), 1 / 16])
            times_ns.append(taken_s / 16 * 1e9)
    weights = 1 / np.array(times_ns)
    fitted, _ = nnls(np.array(rows) * weights[:, None], np.ones(len(rows)))
    errors = np.abs(np.array(rows) @ fitted * weights - 1)
    print("read, open, touch, score, ns:", fitted[:4].round(3), f"| a call: {fitted[4] / 1e3:.0f} us")
    print(f"median error {np.median(errors):.0%}, worst {errors.max():.0%}")
    table, R, B = LabelTable.hashed(670_091, 10_000, 32), 32, 10_000
    parts = [np.ascontiguousarray(table.array()[:, :K]) for K in (167_523, 670_091)]
    for name, call in {
        "scan and lay": partial(scan_topk, estimator="mean"),
        "median": partial(scan_topk, estimator="median"),
        "coarse and pack": coarse_topk,
    }.items():
        n_samples = LANES if call is coarse_topk else GROUP
        scores_NRB = scores_of(table, n_samples, "logits" if call is coarse_topk else call.keywords["estimator"])
        few_s, all_s = quickest([partial(call, scores_NRB, part_RK, 5, n_threads=1) for part_RK in parts])
        label_ns = (all_s - few_s) / R / (670_091 - 167_523) * 1e9
        print(f"{name}: {label_ns:.2f}, {(all_s * 1e9 - label_ns * R * 670_091) / n_samples / R / B:.2f} ns")
    sorted_table = LabelTable.hashed(670_091, 10_000, 4, family="multiply-shift")
    start = time.perf_counter()
    _ = sorted_table.inverse
    print(f"invert {(time.perf_counter() - start) / 4 / 670_091 * 1e9:.1f} ns")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, function in {"compare": compare, "large": large, "grow": grow, "fit": fit}.items():
        commands.add_parser(name).set_defaults(call=lambda a, function=function: function())
    of_model = commands.add_parser("trained")
    of_model.add_argument("run", help="a run folder")
    of_model.add_argument("data", help="a data set with a test split")
    of_model.add_argument("--labels", type=int, default=0, metavar="K", help="K made-up labels instead of the model's")
    of_model.add_argument("--only-search", action="store_true", help="scan only what the search gives up for want of memory")
    of_model.set_defaults(call=lambda a: trained(a.run, a.data, a.labels, a.only_search))
    arguments = parser.parse_args()
    arguments.call(arguments)
