"""Does peak memory grow with N or K? Trains, predicts and decodes on growing parts of one data set, each in a fresh process.

    python experiments/memory/run.py DATA --out runs/memory [--hashed 0.25,1] [--full 0.05,0.2] [--hidden 64]

DATA is a folder of XC-repository text. One epoch each. Prints the parameters' bytes, the peak of
each process, and what a dense N x K matrix of float32 would take.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import mach
from mach.compare.rows import this_machine
from mach.data import take_rows
from mach.store.predictions import write_predictions
from mach.train.memory import peak_bytes


def peak_mb() -> float:
    """Give the most memory this process has held."""
    return peak_bytes(torch.device("cpu")) / 1e6


def part_of(dataset: mach.Dataset, share: float, path: Path) -> Path:
    """Write a data set of the first share of every split."""
    if not (path / "manifest.json").exists():
        splits = {}
        for name in ("train", "test"):
            split = dataset.split(name)
            rows = np.arange(round(share * split.n_samples))
            splits[name] = tuple(take_rows(x, rows).to_scipy() for x in (split.features, split.labels))
        mach.write_dataset(path, splits)
    return path


def train(path: str, run: str, config: mach.Config) -> tuple[float, float, float]:
    """Train in this process; give its seconds, its peak before and at the end."""
    dataset, before, began = mach.Dataset.open(path), peak_mb(), time.perf_counter()
    mach.train(config, dataset, run, resume=True)
    return time.perf_counter() - began, before, peak_mb()


def predict(path: str, run: str, out: str) -> tuple[float, float, float]:
    """Predict the test split in this process; give its seconds, its peak before and at the end."""
    dataset, before = mach.Dataset.open(path), peak_mb()
    model, began = mach.load(run), time.perf_counter()
    write_predictions(model, dataset, "test", out, k=100, estimator="logits", run_key="memory")
    return time.perf_counter() - began, before, peak_mb()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hashed", default="0.25,1", help="shares of the data set for the hashed ensemble")
    parser.add_argument("--full", default="0.05,0.2", help="shares of the data set for the full head")
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args()
    whole = mach.prepare(args.data, args.out / "data")
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    print(
        "| N train / test | K | head | weights MB | train s | start -> peak MB | predict s | start -> peak MB | dense N K, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for table, shares in (("hashed", args.hashed), ("identity", args.full)):
        for share in map(float, shares.split(",")):
            measure(part_of(whole, share, args.out / f"part-{share}"), table, args.out / f"{table}-{share}", args.hidden)


def measure(path: Path, table: str, run: Path, hidden: int) -> None:
    """Train and predict one table on one part, each in a fresh process; print a row."""
    dataset = mach.Dataset.open(path)
    n_train, n_test = (dataset.split(name).n_samples for name in ("train", "test"))
    config = mach.Config(table=table, hidden=hidden, epochs=1, grouped=0.0, rerank="auto" if table == "hashed" else 0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        t = pool.submit(train, str(path), str(run), config).result()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        p = pool.submit(predict, str(path), str(run), f"{run}.parquet").result()
    weights = sum(file.stat().st_size for file in run.glob("*.safetensors")) / 1e6
    dense = 4 * (n_train + n_test) * dataset.n_labels / 1e6
    figures = [f"{weights:.0f}", *(x for s, low, high in (t, p) for x in (f"{s:.0f}", f"{low:.0f} -> {high:.0f}"))]
    print(f"| {n_train:,} / {n_test:,} | {dataset.n_labels:,} | {table} | {' | '.join(figures)} | {dense:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
