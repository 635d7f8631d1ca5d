"""Is `mach prepare` as fast as scikit-learn's loader, and is its memory the same for larger files? Prints RESULTS.md's table.

python experiments/data/run.py [--mib 100] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import scipy
import sklearn
from sklearn.datasets import load_svmlight_file

from mach.data import Dataset, prepare

N_FEATURES, N_LABELS, PER_ROW = 100_000, 20_000, 80
MIB = 1 << 20


def write_source(path: Path, mib: int) -> None:
    """Write an XC file of about `mib` MiB: 80 features of 5 digits and 1 to 8 labels a sample, 4 MiB of them over and over."""
    rng = np.random.default_rng(0)
    lines = []
    for n_labels in rng.integers(1, 9, 4 * MIB // 1000):
        labels = ",".join(map(str, np.sort(rng.choice(N_LABELS, n_labels, replace=False))))
        features = np.sort(rng.choice(N_FEATURES, PER_ROW, replace=False))
        lines.append(f"{labels} {' '.join(f'{f}:{v:.5f}' for f, v in zip(features, rng.random(PER_ROW), strict=True))}\n")
    part = "".join(lines).encode()
    times = max(1, mib * MIB // len(part))
    with open(path, "wb") as file:
        file.write(f"{times * len(lines)} {N_FEATURES} {N_LABELS}\n".encode())
        for _ in range(times):
            file.write(part)


def read_with(reader: str, source: Path, out: Path) -> None:
    """Read a file with one of the two readers: to a data set on disk, or to matrices in memory."""
    if reader == "mach":
        prepare(source, out)
        return
    with open(source, "rb") as file:
        file.readline()
        load_svmlight_file(file, n_features=N_FEATURES, dtype=np.float32, multilabel=True, zero_based=True)


def peak_mib() -> float:
    """Give this process's largest resident size so far; getrusage would give a child its parent's where that is larger."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(reader: str, source: Path) -> None:
    """In a process of its own: read a small file to warm up, then the source; print seconds and peak MiB before and after."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        small = Path(folder) / "small.txt"
        small.write_text(f"1 {N_FEATURES} {N_LABELS}\n1 1:2 2:3\n")
        read_with(reader, small, Path(folder) / "small")
        before_mib = peak_mib()
        start = time.perf_counter()
        read_with(reader, source, Path(folder) / "out")
        wall_s = time.perf_counter() - start
    print(json.dumps({"wall_s": wall_s, "before_mib": before_mib, "peak_mib": peak_mib()}))


def child(reader: str, source: Path) -> dict[str, float]:
    """Measure in a child process."""
    command = [sys.executable, __file__, "--child", reader, str(source)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def check_equal(source: Path) -> None:
    """Compare what the two readers make of a file, entry by entry."""
    split = Dataset.open(prepare(source, source.with_suffix("")).path).split("train")
    with open(source, "rb") as file:
        file.readline()
        X, labels = load_svmlight_file(file, n_features=N_FEATURES, dtype=np.float32, multilabel=True, zero_based=True)
    assert np.array_equal(split.features.indptr, X.indptr) and np.array_equal(split.features.indices, X.indices)
    assert np.array_equal(split.features.values, X.data), "values differ"
    assert split.labels.indices.tolist() == [int(label) for row in labels for label in row], "labels differ"


def main() -> None:
    """Check, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        measure(args.child[0], Path(args.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        sources = {factor: Path(folder) / f"{factor}x.txt" for factor in (0, 1, 4)}
        for factor, path in sources.items():
            write_source(path, factor * args.mib)
        check_equal(sources[0])
        runs: dict[str, list[dict[str, float]]] = {"mach": [], "scikit-learn": []}
        for _ in range(args.rounds):
            for reader, taken in runs.items():
                taken.append(child(reader, sources[1]))
        large = {reader: child(reader, sources[4]) for reader in runs}
        mib = {factor: path.stat().st_size / MIB for factor, path in sources.items()}
    print(f"Python {platform.python_version()}, numpy {np.__version__}, numba {numba.__version__}, ", end="")
    print(f"scipy {scipy.__version__}, scikit-learn {sklearn.__version__}\n")
    print("| reader | file | s, median (all) | MiB/s | peak MiB (of them before) |\n|--|--|--|--|--|")
    medians = {reader: statistics.median(run["wall_s"] for run in taken) for reader, taken in runs.items()}
    rows = [(reader, 1, medians[reader], taken) for reader, taken in runs.items()] + [
        (reader, 4, run["wall_s"], [run]) for reader, run in large.items()
    ]
    for reader, factor, wall_s, taken in rows:
        each = ", ".join(f"{run['wall_s']:.2f}" for run in taken)
        peak = max(taken, key=lambda run: run["peak_mib"])
        memory = f"{peak['peak_mib']:.0f} ({peak['before_mib']:.0f})"
        print(f"| {reader} | {mib[factor]:.0f} MiB | {wall_s:.2f} ({each}) | {mib[factor] / wall_s:.0f} | {memory} |")
    print(f"\nmach is {medians['scikit-learn'] / medians['mach']:.1f} times as fast.")


if __name__ == "__main__":
    main()
