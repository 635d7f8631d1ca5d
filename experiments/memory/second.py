"""Does the second stage take what is reckoned with? Peak memory, weights and room on the disk beside real runs.

    python experiments/memory/second.py DATA... --out runs/second

DATA are prepared data sets. Each is trained for one epoch in a fresh process, all else by default. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mach
from mach.parallel import rerank
from mach.parallel.memory import group_bytes
from mach.parallel.second import CPU, Samples, second_stage
from mach.store.folder import sizes_of
from mach.store.reranker import reranker_record
from mach.train.memory import peak_bytes

CONFIG = mach.Config(epochs=1)


def train(data: str, out: Path) -> tuple[int, int]:
    """Train here; give the peak and the size of the shortlists in bytes."""
    sizes, fit = [], rerank.fit_margins

    def fitted(*args, **kwargs):
        sizes.append((out / rerank.SHORTLISTS).stat().st_size)
        return fit(*args, **kwargs)

    rerank.fit_margins = fitted
    mach.train(CONFIG, mach.Dataset.open(data), out, device="cpu")
    return peak_bytes(CPU), sizes[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print("| data | training reckoned MB | both reckoned MB | peak MB | both / peak | shortlists | weights |")
    print("|---|---|---|---|---|---|---|")
    for data in args.data:
        dataset, out = mach.Dataset.open(data), args.out / Path(data).name
        sizes = sizes_of(CONFIG, dataset)
        trained = group_bytes(CONFIG, sizes, CONFIG.n_repetitions(sizes.n_labels, sizes.labels_a_sample), device=CPU)
        found = second_stage(CONFIG, sizes, Samples.of(dataset))
        assert found is not None, "the data set has dense features"
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peak, lists = pool.submit(train, data, out).result()
        weights = (reranker_record(out) or {})["parameters"]
        both = max(trained, found.peak_bytes)
        figures = f"{trained / 1e6:,.0f} | {both / 1e6:,.0f} | {peak / 1e6:,.0f} | {both / peak:.2f}"
        shares = f"{found.lists_bytes / lists:.2f} | {found.parameters / weights:.2f}"
        print(f"| {out.name} | {figures} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
