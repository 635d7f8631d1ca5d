"""How many queries a second does decoding on a GPU answer, and how near is that to what the GPU can read? Checks, then measures.

python experiments/decode/gpu.py [--samples 256] [--minutes 4]    on a GPU
python experiments/decode/gpu.py --small                          the same steps on small problems, on a CPU too

Prints Markdown: the machine, its ceilings measured in the same run, the scan's launch sizes compared, and the queries a second.
On a CPU, Triton's kernels run in its interpreter, if it is installed: such times say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # before Triton is imported

from mach.config import Estimator, Family
from mach.decoding import reference
from mach.decoding.device import DeviceTopK, How, topk_on_device
from mach.decoding.device.search import search_blocks, width_for
from mach.decoding.scan import AGGREGATES, SUM, scan_topk
from mach.hashing.device import DeviceTable
from mach.hashing.table import LabelTable

IS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

DEVICE = torch.device("cuda" if IS_GPU else "cpu")
WAYS: list[How] = ["torch", "triton"] if HAS_TRITON else ["torch"]
GIB = 1 << 30


@dataclass(frozen=True)
class Setting:
    """A size that is measured."""

    n_labels: int
    n_buckets: int
    n_repetitions: int


LARGE = [Setting(3_000_000, 10_000, 32), Setting(50_000_000, 20_000, 32)]
SMALL = [Setting(3000, 600, 4)]


def seconds(call: Callable[[], object], *, at_least_s: float = 0.5, most: int = 10) -> float:
    """Give the shortest of several runs after one that is not counted, which compiles."""
    call()
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < at_least_s and len(taken) < most):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _wait() -> None:
    if IS_GPU:
        torch.cuda.synchronize()


def check(small: bool) -> str:
    """Compare every way with the reference in float64 loops and with the CPU's scan, bit for bit; give what was compared."""
    rng, n_checked = np.random.default_rng(0), 0
    estimators: tuple[Estimator, ...] = ("mean", "logits", "min") if small else ("mean", "logits", "log-probs", "min", "median")
    families: tuple[Family, ...] = ("carter-wegman", "multiply-shift")
    for n_labels in (70, 300) if small else (300, 5000, 100_003):
        for family in families:
            table = LabelTable.hashed(n_labels, min(60, n_labels), 5, family=family)
            for estimator in estimators:
                for spread, k in ((2.0, 7), (100.0, 1), (100.0, 40)):  # small integers: exact sums, many ties
                    scores_NRB = rng.normal(0, spread, (3, 5, table.n_buckets)).round().astype(np.float32)
                    scanned = scan_topk(scores_NRB, table.array(), k, estimator=estimator)
                    for way in WAYS:
                        scores = torch.from_numpy(scores_NRB).to(DEVICE)
                        found = topk_on_device(scores, table, k, estimator=estimator, how=way)
                        assert np.array_equal(found.labels.cpu().numpy(), scanned.labels), (n_labels, family, estimator, way)
                        assert np.array_equal(found.scores.cpu().numpy(), scanned.scores), (n_labels, family, estimator, way)
                        n_checked += 1
                    if n_labels <= 300:
                        rows = [scores_NRB[0, r, table.array()[r]].astype(float).tolist() for r in range(5)]
                        join = min if estimator == "min" else np.median if estimator == "median" else sum
                        best = reference.topk([float(join(column)) for column in zip(*rows, strict=True)], k)
                        assert scanned.labels[0].tolist() == best
    return f"{n_checked} problems decoded by {' and '.join(WAYS)} to the bits of the CPU's scan and the order of the reference."


def copy_rate(n_bytes: int) -> float:
    """Give the bytes read and written a second by a copy."""
    source = torch.empty(n_bytes // 4, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds(lambda: target.copy_(source))


def torch_gather_rate(setting: Setting, group: int, n: int) -> float:
    """Give the scores a second that torch gathers, `group` side by side, from a table of R B such rows."""
    table = torch.randn(setting.n_repetitions * setting.n_buckets, group, device=DEVICE)
    rows = torch.randint(len(table), (n,), device=DEVICE)
    out = torch.empty(n, group, device=DEVICE)
    return n * group / seconds(lambda: torch.index_select(table, 0, rows, out=out))


def kernel_gather_rate(setting: Setting, group: int, n_labels: int) -> float:
    """Give the scores a second that a kernel gathers and adds where a bucket costs two multiplications and nothing is kept."""
    R, B, tile = setting.n_repetitions, setting.n_buckets, 256
    packed = torch.randn(R, B, group, device=DEVICE)
    n_programs = -(-n_labels // tile)
    out = torch.empty(n_programs, device=DEVICE)
    taken_s = seconds(lambda: gather_only[(n_programs,)](packed, out, R, B, tile, group))
    return n_programs * tile * R * group / taken_s


if HAS_TRITON:

    @triton.jit
    def gather_only(packed, out, n_rows, n_buckets, T: tl.constexpr, Q: tl.constexpr):
        labels = tl.program_id(0) * T + tl.arange(0, T)
        lanes = tl.arange(0, Q)
        total = tl.zeros((T, Q), tl.float32)
        for r in range(n_rows):
            mixed = labels.to(tl.uint32) * 2654435769 + tl.cast(r, tl.uint32) * 40503
            buckets = tl.umulhi(mixed.to(tl.uint32), (n_buckets + labels * 0).to(tl.uint32)).to(tl.int32)
            total += tl.load(packed + r * n_buckets * Q + buckets[:, None] * Q + lanes[None, :])
        tl.store(out + tl.program_id(0), tl.max(tl.max(total, 1), 0))


def scores_like(kind: str, setting: Setting, table: LabelTable, n_samples: int, k: int) -> torch.Tensor:
    """Make bucket scores (N, R, B): "flat", noise alone; "trained", noise over which the buckets of 2 k labels stand out.

    A label's height is drawn for the label, then for each repetition, so that the k-th best is not far above the next.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)
    R, B = setting.n_repetitions, setting.n_buckets
    scores_NRB = torch.randn(n_samples, R, B, generator=generator, device=DEVICE).sub_(6)
    if kind == "trained":
        labels_NM = torch.randint(setting.n_labels, (n_samples, 2 * k), generator=generator, device=DEVICE)
        height_NM = 4 + 4 * torch.rand(n_samples, 2 * k, generator=generator, device=DEVICE)
        there = DeviceTable.of(table, DEVICE)
        for r in range(R):
            drawn_NM = height_NM + torch.randn(n_samples, 2 * k, generator=generator, device=DEVICE)
            scores_NRB[:, r].scatter_add_(1, there.buckets(labels_NM, r), drawn_NM)
    return scores_NRB


def sweep(setting: Setting, n_samples: int) -> list[str]:
    """Time the scan in Triton with other sizes of groups and tiles; give lines of a table, the quickest first."""
    from mach.decoding.device import triton_scan

    table = LabelTable.hashed(setting.n_labels, setting.n_buckets, setting.n_repetitions)
    scores_NRB, there = scores_like("flat", setting, table, n_samples, 5), DeviceTable.of(table, DEVICE)
    timed = []
    for group in (4, 8, 16, 32) if IS_GPU else (2, 4):
        for tile, n_warps in ((128, 4), (256, 4), (512, 4), (512, 8)) if IS_GPU else ((64, 4),):
            scan = triton_scan.TritonScan(scores_NRB, there, SUM, None, 512, group=group, tile=tile, n_warps=n_warps)
            timed.append((seconds(scan.maxima, at_least_s=0.1), group, tile, n_warps))
    looked_up = n_samples * setting.n_repetitions * setting.n_labels
    return [
        f"| {group} | {tile} | {n_warps} | {looked_up / taken_s / 1e9:.3g} |" for taken_s, group, tile, n_warps in sorted(timed)
    ]


def measure(setting: Setting, n_samples: int, named: list[str], ceiling: float, copied: float, until: float) -> None:
    """Time every way of decoding at one size, a line of a table each, as long as there is time. All must agree bit for bit."""
    table = LabelTable.hashed(setting.n_labels, setting.n_buckets, setting.n_repetitions)
    for kind in ("trained", "flat"):
        for k in (5, 100) if setting.n_labels > 10_000 else (5,):
            scores_NRB = scores_like(kind, setting, table, n_samples, k)
            looked_up = scores_NRB.numel() // setting.n_buckets * setting.n_labels
            first: DeviceTopK | None = None
            ways = [way for way in ("pruned", *reversed(WAYS)) if way in named]
            for way in ways:
                if time.perf_counter() > until:
                    print(
                        f"| {setting.n_labels:,} | {setting.n_buckets:,} | {kind} | {k} | {way} | no time left | | | |",
                        flush=True,
                    )
                    continue
                found = _decode(scores_NRB, table, k, way)
                first = first or found
                assert torch.equal(found.labels, first.labels), (setting, kind, k, way)
                assert torch.equal(found.scores, first.scores), (setting, kind, k, way)
                proven = float(found.is_pruned.float().mean())
                taken_s = seconds(partial(_decode, scores_NRB, table, k, way))
                scanned = "" if way == "pruned" else f"{looked_up / taken_s / 1e9:.3g} ({looked_up / taken_s / ceiling:.0%})"
                read = scores_NRB.numel() * 4 / taken_s / copied
                print(
                    f"| {setting.n_labels:,} | {setting.n_buckets:,} | {kind} | {k} | {way} | {n_samples / taken_s:.4g} | "
                    f"{scanned} | {read:.2%} | {f'{proven:.0%}' if way == 'pruned' else ''} |",
                    flush=True,
                )


def _decode(scores_NRB: torch.Tensor, table: LabelTable, k: int, way: How | Literal["pruned"]) -> DeviceTopK:
    how: How = WAYS[-1] if way == "pruned" else way
    return topk_on_device(scores_NRB, table, k, estimator="logits", how=how, prune=way == "pruned")


def stages(setting: Setting, n_samples: int, k: int) -> str:
    """Give how long the two looks of a scan take, to see what would pay next."""
    table = LabelTable.hashed(setting.n_labels, setting.n_buckets, setting.n_repetitions)
    scores_NRB, there = scores_like("flat", setting, table, n_samples, k), DeviceTable.of(table, DEVICE)
    from mach.decoding.device.triton_scan import TritonScan

    width = width_for(setting.n_labels, k)

    def scan() -> TritonScan:
        return TritonScan(scores_NRB, there, AGGREGATES["logits"], None, width)

    made = scan()
    packing, maxima = seconds(scan), seconds(made.maxima)
    whole = seconds(lambda: search_blocks(made, k, None))
    return (
        f"K = {setting.n_labels:,}, k = {k}, N = {n_samples}, J = {width}: packing {packing * 1e3:.3g} ms, "
        f"maxima {maxima * 1e3:.3g} ms, ordering blocks and scoring the best again {(whole - maxima) * 1e3:.3g} ms"
    )


def main() -> None:
    """Check, then print the machine, its ceilings and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--ways", default="pruned,triton,torch", help="of these, the slowest last")
    parser.add_argument("--minutes", type=float, default=4.0, help="after which nothing is begun")
    a = parser.parse_args()
    until = time.perf_counter() + 60 * a.minutes
    settings, n_samples = (SMALL, min(a.samples, 6)) if a.small else (LARGE, a.samples)
    place = torch.cuda.get_device_name() if IS_GPU else f"CPU ({platform.processor() or platform.machine()})"
    version = triton.__version__ if HAS_TRITON else "absent"
    print(f"{place}, Python {platform.python_version()}, torch {torch.__version__}, Triton {version}, N = {n_samples}\n")
    print(check(a.small), "\n")
    copied = copy_rate(GIB // 64 if a.small else 2 * GIB)
    print(f"copy: {copied / 1e9:.4g} GB/s read and written")
    ceilings = []
    for setting in settings:
        rates = {
            f"torch, {q} side by side": torch_gather_rate(setting, q, (1 << 16 if a.small else 1 << 26) // q) for q in (1, 8)
        }
        if HAS_TRITON:
            n_labels = 512 if a.small else 20_000_000
            rates |= {f"kernel, {q} side by side": kernel_gather_rate(setting, q, n_labels) for q in (8, 16)}
        ceilings.append(max(rates.values()))
        sizes = f"R = {setting.n_repetitions}, B = {setting.n_buckets:,}"
        print(f"gather, {sizes}: " + "; ".join(f"{name} {rate / 1e9:.4g} * 10^9/s" for name, rate in rates.items()))
    if HAS_TRITON and not a.no_sweep:
        print("\n| samples side by side | labels of a tile | warps | 10^9 look-ups/s |\n|--:|--:|--:|--:|")
        print("\n".join(sweep(settings[0], min(n_samples, 64))), flush=True)
    print("\n| K | B | scores | k | way | queries/s | 10^9 look-ups/s (of the gather) | read, of the copy | proven |")
    print("|--:|--:|---|--:|---|--:|--:|--:|--:|")
    for setting, ceiling in zip(settings, ceilings, strict=True):
        measure(setting, n_samples, a.ways.split(","), ceiling, copied, until)
    if HAS_TRITON:
        print()
        for setting in settings:
            for k in (5, 100):
                if time.perf_counter() < until:
                    print(stages(setting, n_samples, k), flush=True)


if __name__ == "__main__":
    main()
