"""Does a group take the memory that is reckoned with? The estimate beside the peak of real trainings, each in a fresh process.

    python experiments/memory/groups.py --out runs/groups

Planted data of 3,000 samples, so that a run is short; one epoch, which ends with storing. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

import mach
from mach.compare.rows import this_machine
from mach.parallel.memory import PROCESS_BYTES, group_bytes
from mach.store.folder import sizes_of
from mach.train.memory import peak_bytes

CPU = torch.device("cpu")
CASES = [
    {"n_features": 20_000, "repetitions": 1, "hidden": 128, "buckets": 256},
    {"n_features": 20_000, "repetitions": 1, "hidden": 128, "buckets": 256, "grouped": 1.0},
    {"n_features": 20_000, "repetitions": 8, "hidden": 512, "buckets": 1024},
    {"n_features": 20_000, "repetitions": 8, "hidden": 512, "buckets": 1024, "precision": "float32"},
    {"n_features": 20_000, "repetitions": 8, "hidden": 512, "buckets": 1024, "layers": 2},
    {"n_features": 20_000, "repetitions": 8, "hidden": 512, "buckets": 1024, "batch_size": 2048},
    {"n_features": 20_000, "repetitions": 4, "hidden": 512, "buckets": 16_384},
    {"n_features": 100_000, "repetitions": 8, "hidden": 512, "buckets": 1024},
    {"n_features": 100_000, "repetitions": 8, "hidden": 512, "buckets": 1024, "feature_buckets": 20_000},
    {"n_features": 20_000, "table": "identity", "hidden": 512},
]


def train(data: str, config: mach.Config) -> int:
    """Train here; give the peak in bytes."""
    mach.train(config, mach.Dataset.open(data))
    return peak_bytes(CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in this_machine().items()))
    print(f"A process without a model is reckoned with {PROCESS_BYTES / 1e6:.0f} MB.\n")
    print("| setting | reckoned MB | peak MB | reckoned / peak |\n|---|---|---|---|")
    for case in CASES:
        n_features = int(str(case["n_features"]))
        config = mach.Config(epochs=1).replace(**{key: value for key, value in case.items() if key != "n_features"})
        path = args.out / f"data-{n_features}"
        if not (path / "manifest.json").exists():
            rng = np.random.default_rng(0)
            X = sp.random_array((3000, n_features), density=50 / n_features, rng=rng, dtype=np.float32).tocsr()
            Y = sp.random_array((3000, 50_000), density=3 / 50_000, rng=rng, dtype=np.float32).tocsr()
            mach.write_dataset(path, {"train": (X, Y)})
        sizes = sizes_of(config, mach.Dataset.open(path))
        n_repetitions = config.n_repetitions(sizes.n_labels, sizes.labels_a_sample)
        reckoned = group_bytes(config, sizes, n_repetitions, device=CPU)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(train, str(path), config).result()
        said = ", ".join(f"{key} {value}" for key, value in case.items())
        print(f"| {said} | {reckoned / 1e6:,.0f} | {peak / 1e6:,.0f} | {reckoned / peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
