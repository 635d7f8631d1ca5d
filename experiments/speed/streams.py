"""Is memory flat and time linear in the number of training samples? Planted data of 10^5 to 10^7 samples, trained for one epoch.

    python experiments/speed/streams.py --out runs/streams [--samples 100000,1000000,10000000]

Each label adds its own four features to a sample, so that there is something to learn. The data set lies on disk and is mapped;
each training runs in a fresh process, which a thread watches: its own memory, and the pages of files that happen to be mapped,
which the system takes back when it needs them. Prints a table and draws streams.svg beside this file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import scipy.sparse as sp

import mach
from mach.compare.rows import this_machine

matplotlib.use("svg")
import matplotlib.pyplot as plt

N_LABELS, N_FEATURES, N_SIGNATURE, N_LABELS_EACH = 20_000, 30_000, 4, 2
CONFIG = mach.Config(buckets=512, repetitions=2, hidden=64, epochs=1, batch_size=1024)


def planted(n: int, seed: int) -> tuple[sp.csr_array, sp.csr_array]:
    """Draw n samples of two labels each."""
    signatures = np.random.default_rng(7).integers(0, N_FEATURES, (N_LABELS, N_SIGNATURE), dtype=np.int32)
    labels = np.random.default_rng(seed).integers(0, N_LABELS, (n, N_LABELS_EACH), dtype=np.int32)
    features = signatures[labels].reshape(n, -1)
    X, Y = (
        sp.csr_array((np.ones(x.size, np.float32), x.ravel(), np.arange(0, x.size + 1, x.shape[1])), shape=(n, width))
        for x, width in ((features, N_FEATURES), (labels, N_LABELS))
    )
    return X, Y


def write(path: str, n: int) -> None:
    """Write a data set of n training samples, unless it is there."""
    if not (Path(path) / "manifest.json").exists():
        mach.write_dataset(path, {"train": planted(n, 1), "test": planted(2000, 2)})


def train(data: str, out: str) -> tuple[float, float, float, float, float]:
    """Train here; give the seconds, the most of own memory and of mapped files in MB, the data set's MB, and P@1."""
    most, done = [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
            for i, key in enumerate(("RssAnon", "RssFile")):
                most[i] = max(most[i], int(lines[key].split()[0]))

    threading.Thread(target=watch, daemon=True).start()
    dataset, began = mach.Dataset.open(data), time.perf_counter()
    model = mach.train(CONFIG, dataset, out)
    seconds = time.perf_counter() - began
    done.set()
    test = dataset.split("test")
    found = model.predict_topk(test.features, 1).labels
    return seconds, most[0] / 1e3, most[1] / 1e3, dataset_mb(Path(data)), mach.precision_at_k(found, test.labels, 1)


def dataset_mb(path: Path) -> float:
    """Give the megabytes of a data set on disk."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", default="100000,300000,1000000,3000000,10000000")
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    print("| N | data set MB | seconds | samples / s | own memory, most MB | mapped files, most MB | P@1 |")
    print("|---|---|---|---|---|---|---|")
    context, rows = multiprocessing.get_context("spawn"), []
    for n in map(int, args.samples.split(",")):
        data, out = str(args.out / f"data-{n}"), str(args.out / f"run-{n}")
        for function, arguments in ((write, (data, n)), (train, (data, out))):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found = pool.submit(function, *arguments).result()
        seconds, own, mapped, disk, precision = found
        rows.append((n, seconds, own, mapped))
        print(
            f"| {n:,} | {disk:.0f} | {seconds:.1f} | {n / seconds:,.0f} | {own:.0f} | {mapped:.0f} | {100 * precision:.1f} |",
            flush=True,
        )
    draw(rows, Path(__file__).with_name("streams.svg"))


def draw(rows: list[tuple[int, float, float, float]], path: Path) -> None:
    """Draw memory and time against the number of samples."""
    ns, seconds, own, mapped = zip(*rows, strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    left.plot(ns, own, "o-", label="the process's own")
    left.plot(ns, mapped, "s--", label="pages of mapped files")
    left.set(xscale="log", ylim=(0, None), xlabel="training samples N", ylabel="most memory, MB", title="Memory")
    left.legend(frameon=False)
    right.plot(ns, seconds, "o-", label="measured")
    right.plot(ns, [seconds[-1] * n / ns[-1] for n in ns], ":", label="in proportion to N")
    right.set(xscale="log", yscale="log", xlabel="training samples N", ylabel="seconds", title="One epoch")
    right.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
