"""Is a GPU kept full? Eight packed repetitions, B = 20,000, D = 2,048: the step against the device's own matrix products.

    python experiments/speed/gpu.py [--batch 1024,4096] [--small]

Checks first that the device learns what the CPU learns, then times: bare products of the step's shapes in bfloat16, a copy of
memory, and the training step by part, on planted sparse data made here. `--small` runs the same on a CPU, to try the script.
Prints Markdown for RESULTS.md; about three minutes on one H200.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

import mach
from mach.compare.rows import this_machine
from mach.data import Dataset
from mach.metrics import precision_at_k
from mach.store.folder import sizes_of, table_of
from mach.train.loop import Group

R = 8


def planted(n: int, n_features: int, n_labels: int, each: int, seed: int) -> tuple[sp.csr_array, sp.csr_array]:
    """Draw samples of two labels; a label brings `each` features of its own."""
    signatures = np.random.default_rng(7).integers(0, n_features, (n_labels, each))
    labels = np.random.default_rng(seed).integers(0, n_labels, (n, 2))
    rows = np.arange(n)
    X, Y = (
        sp.coo_array((np.ones(x.size, np.float32), (np.repeat(rows, x.shape[1]), x.ravel())), shape=(n, width)).tocsr()
        for x, width in ((signatures[labels].reshape(n, -1), n_features), (labels, n_labels))
    )
    return X, Y


def seconds_of(call: Callable[[], object], device: torch.device, n: int = 20) -> float:
    """Give the seconds of a call, the mean of n after three."""
    for _ in range(3):
        call()
    _wait(device)
    began = time.perf_counter()
    for _ in range(n):
        call()
    _wait(device)
    return (time.perf_counter() - began) / n


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(device: torch.device, folder: Path) -> None:
    """Train a small problem in both precisions, on the device and on the CPU; print P@1 of each."""
    splits = {"train": planted(6000, 400, 300, 4, 0), "test": planted(1000, 400, 300, 4, 1)}
    dataset = mach.write_dataset(folder / "check", splits)
    print("| device | products in | P@1 |\n|---|---|---|")
    for name in dict.fromkeys((str(device), "cpu")):
        for precision in ("float32", "bfloat16"):
            config = mach.Config(hidden=128, repetitions=4, epochs=4, precision=precision)
            model = mach.train(config, dataset, device=name)
            found = model.predict_topk(dataset.split("test").features, 1).labels
            print(f"| {name} | {precision} | {100 * precision_at_k(found, dataset.split('test').labels, 1):.1f} |", flush=True)


def ceilings(device: torch.device, B: int, D: int, N: int) -> tuple[float, float]:
    """Give the seconds of a step's three products alone, and the bytes a second that a copy reads and writes."""
    low = torch.bfloat16
    hidden, weight, z = (torch.randn(shape, device=device).to(low) for shape in ((R, N, D), (R, B, D), (R, N, B)))

    def products() -> None:
        torch.bmm(hidden, weight.transpose(1, 2), out=z)
        torch.bmm(z, weight)
        torch.bmm(z.transpose(1, 2), hidden)

    return seconds_of(products, device), 2 * weight.nbytes / seconds_of(weight.clone, device)


def group_of(dataset: Dataset, device: torch.device, B: int, D: int) -> Group:
    """Give repetitions with their first weights, which take longer to draw than all the rest here."""
    config = mach.Config(buckets=B, hidden=D, repetitions=R, precision="bfloat16", epochs=1000, validation=0.0)
    sizes = sizes_of(config, dataset)
    return Group(config, dataset, sizes, table_of(config, sizes, range(R), dataset.label_names), device)


def measure(group: Group, N: int, n_steps: int) -> None:
    """Print the row of one batch size; the group trains on."""
    device, (_, B, D) = group.device, group.packed.parameters["head.weight"].shape
    (bare, bandwidth), flops = ceilings(device, B, D, N), 3 * 2 * R * N * B * D
    group.config = group.config.replace(batch_size=N)
    steps = group.steps(lambda r: None)
    for _ in range(5):
        next(steps)
    _wait(device)
    group.clock.read()
    began = time.perf_counter()
    for _ in range(n_steps):
        next(steps)
    _wait(device)
    step = (time.perf_counter() - began) / n_steps
    parts = {part: s / n_steps for part, s in group.clock.read().items()}
    steps.close()
    listed = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in sorted(parts.items(), key=lambda item: -item[1]) if s > 1e-5)
    cells = [
        f"{N:,}", f"{flops / bare / 1e12:.3g}", f"{bandwidth / 1e9:,.0f}", f"{1e3 * step:.1f}", f"{flops / step / 1e12:.3g}",
        f"{bare / step:.0%}", f"{R * N / step:,.0f}", listed,
    ]  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="512,1024,2048,4096,8192")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.small else "cuda:0")
    B, D, K, F, n = (256, 64, 2000, 3000, 3000) if args.small else (20_000, 2048, 1_000_000, 100_000, 200_000)
    name = "CPU" if args.small else torch.cuda.get_device_name(device)
    print(", ".join([name, *(f"{key} {value}" for key, value in this_machine().items())]) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        check(device, Path(folder))
        dataset = mach.write_dataset(Path(folder) / "data", {"train": planted(n, F, K, 25, 1)})
        print(f"\nR = {R}, B = {B:,}, D = {D:,}, F = {F:,}, 50 features a sample\n")
        print("| batch | bare, TFLOP/s | copy, GB/s | step, ms | in the step, TFLOP/s | of bare | samples x R / s | ms by part |")
        print("|---|---|---|---|---|---|---|---|")
        group = group_of(dataset, device, B, D)
        for batch in map(int, args.batch.split(",")):
            measure(group, min(batch, n), args.steps)


if __name__ == "__main__":
    main()
