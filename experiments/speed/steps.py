"""What a training step costs: packed repetitions against a plain torch loop and against one process a repetition.

    python experiments/speed/steps.py DATA [DATA ...] --out runs/speed [--steps 60]

DATA are folders of XC-repository text. R = 8, B = 1,024, D = 512, batches of 256, each way in fresh processes, best of three
rounds that take turns. Prints samples x repetitions a second, the seconds of a step by part, and what share of a step its matrix
products would take alone, at the rate of bare products of the same shapes in the same run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mach
from mach.compare.rows import this_machine
from mach.config import Config
from mach.data import take, take_rows
from mach.hashing import LabelTable
from mach.kernels import array_of, in_threads, jit_sums
from mach.store.folder import sizes_of, table_of
from mach.train.loop import Group

R, WARM_UP, ROUNDS = 8, 8, 3
WAYS = {  # products in, input rows in
    "float32, float32": {"precision": "float32"},
    "float32, bfloat16": {"precision": "float32", "input_precision": "bfloat16"},
    "bfloat16, float32": {"precision": "bfloat16", "input_precision": "float32"},
    "bfloat16, bfloat16": {"precision": "bfloat16"},
}
CPU = torch.device("cpu")
D = 512
CONFIG = Config(buckets=1024, repetitions=R, hidden=D)


def packed_s(
    data: str, repetitions: tuple[int, ...], settings: dict[str, str], n_threads: int, n_steps: int
) -> tuple[float, dict[str, float]]:
    """Train packed repetitions; give the seconds of a step, all and by part."""
    torch.set_num_threads(n_threads)
    dataset, config = mach.Dataset.open(data), CONFIG.replace(**settings)
    sizes = sizes_of(config, dataset)
    group = Group(config, dataset, sizes, table_of(config, sizes, repetitions, dataset.label_names), CPU)
    steps = group.steps(lambda r: None)
    for _ in range(WARM_UP):
        next(steps)
    group.clock.read()
    began = time.perf_counter()
    for _ in range(n_steps):
        next(steps)
    seconds = (time.perf_counter() - began) / n_steps
    return seconds, {part: s / n_steps for part, s in group.clock.read().items()}


def plain_s(data: str, n_threads: int, n_steps: int) -> float:
    """Train one repetition with EmbeddingBag, dense targets and Adam over everything; give the seconds of a step."""
    torch.set_num_threads(n_threads)
    dataset = mach.Dataset.open(data)
    split = dataset.split("train")
    table = torch.from_numpy(LabelTable.hashed(dataset.n_labels, 1024, 1).array()[0].astype(np.int64))
    bag = torch.nn.EmbeddingBag(dataset.n_features, D, mode="sum")
    rest = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Dropout(CONFIG.share_dropped(split.n_samples)), torch.nn.Linear(D, 1024))
    optimizer = torch.optim.Adam([*bag.parameters(), *rest.parameters()], lr=1e-3)
    order = np.random.default_rng(0).permutation(split.n_samples)

    def step(i: int) -> None:
        rows = order[i * CONFIG.batch_size : (i + 1) * CONFIG.batch_size]
        X, Y = take(split.features, rows), take_rows(split.labels, rows)
        targets = torch.zeros(len(rows), 1024)
        samples = torch.from_numpy(np.repeat(np.arange(len(rows)), np.diff(Y.indptr)))
        targets[samples, table[torch.from_numpy(Y.indices.astype(np.int64))]] = 1
        indices, offsets, values = (torch.from_numpy(x) for x in (X.indices.astype(np.int64), X.indptr[:-1], X.values))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            rest(bag(indices, offsets, per_sample_weights=values)), targets, reduction="sum"
        )
        optimizer.zero_grad()
        (loss / len(rows)).backward()
        optimizer.step()

    for i in range(WARM_UP):
        step(i)
    began = time.perf_counter()
    for i in range(n_steps):
        step(WARM_UP + i)
    return (time.perf_counter() - began) / n_steps


def products_s(dtype: torch.dtype, n_threads: int) -> float:
    """Time the three products of a step alone, R of each in one call; give their seconds."""
    torch.set_num_threads(n_threads)
    N, B = CONFIG.batch_size, 1024
    hidden, weight, z = (torch.randn(shape).to(dtype) for shape in ((R, N, D), (R, B, D), (R, N, B)))
    gradient = torch.empty_like(weight)
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        torch.bmm(hidden, weight.transpose(1, 2), out=z)
        torch.bmm(z, weight)
        torch.bmm(z.transpose(1, 2), hidden, out=gradient)
        best = min(best, time.perf_counter() - began)
    return best


def rows_s(data: str, dtype: torch.dtype, n_threads: int) -> float:
    """Time the least that a step's input rows ask of memory: each touched row read once, then read and written once; seconds."""
    torch.set_num_threads(n_threads)
    split = mach.Dataset.open(data).split("train")
    rng, best = np.random.default_rng(0), float("inf")
    weight = array_of(torch.zeros(split.features.n_columns, R * D, dtype=dtype))
    for _ in range(10):
        features = np.unique(take(split.features, np.sort(rng.choice(split.n_samples, CONFIG.batch_size, False))).indices)
        parts = np.array_split(features, 8 * n_threads)
        sums = np.zeros(len(parts), weight.dtype)
        began = time.perf_counter()
        in_threads(read_rows, [(weight, part, sums[i : i + 1]) for i, part in enumerate(parts)], n_threads)
        in_threads(touch_rows, [(weight, part, sums[0]) for part in parts], n_threads)
        best = min(best, time.perf_counter() - began)
    return best


@jit_sums
def read_rows(weight_FX: np.ndarray, features: np.ndarray, out: np.ndarray) -> None:
    """Read each row once."""
    total = weight_FX[0, 0] * 0
    for f in features:
        row = weight_FX[f]
        for x in range(len(row)):
            total += row[x]
    out[0] = total


@jit_sums
def touch_rows(weight_FX: np.ndarray, features: np.ndarray, zero: float) -> None:
    """Read and write each row once."""
    for f in features:
        row = weight_FX[f]
        for x in range(len(row)):
            row[x] += zero


def in_fresh_processes(n: int, function: Any, *args: Any) -> list[Any]:
    """Call a function in n processes at once, each new."""
    with ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(function, *args) for _ in range(n)]]


def measure(data: str, n_steps: int) -> None:
    """Print the rows of one data set."""
    n_threads, name = torch.get_num_threads(), Path(data).parent.name
    best: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {}

    def note(way: str, rate: float) -> bool:
        is_better = rate > best.get(way, 0.0)
        best[way] = max(rate, best.get(way, 0.0))
        return is_better

    for _ in range(ROUNDS):
        (plain,) = in_fresh_processes(1, plain_s, data, n_threads, n_steps)
        note("plain torch loop, a repetition after the other", CONFIG.batch_size / plain)
        alone = in_fresh_processes(n_threads, packed_s, data, (0,), {}, 1, n_steps)
        note(f"a process a repetition, {n_threads} at a time", sum(CONFIG.batch_size / seconds for seconds, _ in alone))
        share = tuple(range(R // n_threads))
        apart = in_fresh_processes(n_threads, packed_s, data, share, {}, 1, n_steps)
        rates = [len(share) * CONFIG.batch_size / seconds for seconds, _ in apart]
        note(f"{n_threads} processes of {len(share)} packed repetitions", sum(rates))
        for way, settings in WAYS.items():
            ((seconds, by_part),) = in_fresh_processes(1, packed_s, data, tuple(range(R)), settings, n_threads, n_steps)
            if note(f"packed; products, rows in {way}", R * CONFIG.batch_size / seconds):
                parts[way] = by_part
    first = next(iter(best.values()))
    print(f"\n## {name}\n\n| way | samples x repetitions / s | against the plain loop |\n|---|---|---|")
    for way, rate in best.items():
        print(f"| {way} | {rate:,.0f} | {rate / first:.1f} |")
    print(
        "\n| products, rows in | step, ms | bare products, ms | their share of the step | rows read, read and written once, ms "
        "| ms by part |\n|---|---|---|---|---|---|"
    )
    for way, by_part in parts.items():
        products, rows = (getattr(torch, name) for name in way.split(", "))
        bare, seconds = products_s(products, n_threads), R * CONFIG.batch_size / best[f"packed; products, rows in {way}"]
        rate = f"{3 * 2 * R * CONFIG.batch_size * 1024 * D / bare / 1e9:.0f} GFLOP/s"
        listed = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in sorted(by_part.items(), key=lambda item: -item[1]) if s > 1e-4)
        cells = way, f"{1e3 * seconds:.1f}", f"{1e3 * bare:.1f} ({rate})", f"{bare / seconds:.0%}"
        print(f"| {' | '.join(cells)} | {1e3 * rows_s(data, rows, n_threads):.1f} | {listed} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    for source in args.data:
        dataset = mach.prepare(source, args.out / source.name / "data")
        measure(str(dataset.path), args.steps)


if __name__ == "__main__":
    main()
