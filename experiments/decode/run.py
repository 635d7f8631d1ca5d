"""How long does the exact scan take a sample, against gathering and summing with torch? Prints RESULTS.md's table.

python experiments/decode/run.py [--labels 670091] [--buckets 10000] [--samples 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numba
import numpy as np
import torch

from mach.decoding.scan import scan_topk, score_labels
from mach.hashing.table import LabelTable
from mach.kernels import N_THREADS


def gather_topk(scores_NRB: np.ndarray, table_RK: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum scores[:, r, table[r]] over r, then torch.topk, in chunks of 8 samples: 21 MiB of scores at K = 670,091."""
    found = []
    for chunk_nRB in torch.split(torch.from_numpy(scores_NRB), 8):
        sum_nK = chunk_nRB[:, 0].index_select(1, table_RK[0])
        for r in range(1, len(table_RK)):
            sum_nK += chunk_nRB[:, r].index_select(1, table_RK[r])
        found.append(torch.topk(sum_nK, k))
    return torch.cat([f.indices for f in found]).numpy(), torch.cat([f.values for f in found]).numpy()


def alternating_ms(calls: list[Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
    """Time the calls in turn, so that a busy moment of the machine hits all; give each one's median and spread (IQR), ms."""
    times_ms: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken_ms in zip(calls, times_ms, strict=True):
            start = time.perf_counter()
            call()
            taken_ms.append((time.perf_counter() - start) * 1e3)
    quartiles = [statistics.quantiles(taken_ms, n=4) for taken_ms in times_ms]
    return [(q[1], q[2] - q[0]) for q in quartiles]


def compare(n_labels: int, n_buckets: int, n_samples: int, n_repetitions: int, k: int, rounds: int) -> str:
    """Check that scan and gather agree, time both and give a line of the table."""
    table_RK = LabelTable.hashed(n_labels, n_buckets, n_repetitions).array()
    table_int64_RK = torch.from_numpy(table_RK.astype(np.int64))
    scores_NRB = np.random.default_rng(0).standard_normal((n_samples, n_repetitions, n_buckets), dtype=np.float32)
    found = scan_topk(scores_NRB, table_RK, k, estimator="logits")
    labels_Nk, values_Nk = gather_topk(scores_NRB, table_int64_RK, k)
    assert np.array_equal(found.scores, values_Nk), "scores differ"
    assert np.array_equal(score_labels(scores_NRB, table_RK, labels_Nk, estimator="logits"), values_Nk), "labels differ"
    calls: list[Callable[[], object]] = [
        lambda: scan_topk(scores_NRB, table_RK, k, estimator="logits"),
        lambda: gather_topk(scores_NRB, table_int64_RK, k),
        lambda: scan_topk(scores_NRB[:1], table_RK, k, estimator="logits"),
        lambda: scan_topk(scores_NRB, table_RK, k, estimator="median"),
    ]
    (scan, scan_iqr), (gather, gather_iqr), (one, _), (median, _) = alternating_ms(calls, rounds)
    lookups_G = n_samples * n_repetitions * n_labels / scan / 1e6
    return (
        f"| {n_repetitions} | {k} | {scan / n_samples:.2f} ({scan_iqr / n_samples:.2f}) | "
        f"{gather / n_samples:.2f} ({gather_iqr / n_samples:.2f}) | {gather / scan:.1f} | {lookups_G:.1f} | "
        f"{one:.1f} | {median / n_samples:.2f} |"
    )


def main() -> None:
    """Print the machine, the versions and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"labels": 670_091, "buckets": 10_000, "samples": 64, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}, numpy {np.__version__}"
    print(
        f"K={a.labels} B={a.buckets} N={a.samples} float32, {N_THREADS} threads (torch {torch.get_num_threads()}), {versions}\n"
    )
    print("| R | k | scan, ms a sample (IQR) | torch, ms a sample (IQR) | torch/scan | 10^9 look-ups/s | N=1, ms | median, ms |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for n_repetitions in (16, 32):
        for k in (5, 100):
            print(compare(a.labels, a.buckets, a.samples, n_repetitions, k, a.rounds), flush=True)


if __name__ == "__main__":
    main()
