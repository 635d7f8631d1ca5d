"""What a step of training will take on this machine: the work of each part, counted, over rates measured in a second or two.

Estimates: memory is `group_bytes`, or that of the second stage (`mach.parallel.second`) where it is more; times are of counted
FLOPs, at the rate of one large product, and of counted bytes, at the rate of one long pass over memory. What starts and joins
threads, caches that hold more or less, the reading of the data and the second stage are not in them.

Symbols: N samples of a batch, R repetitions, F input features, B buckets, D hidden width, V width of a bottleneck.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mach.config import Config
from mach.hashing.bounds import HEAD_BYTES
from mach.model import Sizes, resolve_precision, resolve_rows
from mach.parallel.memory import group_bytes
from mach.parallel.second import Samples, Second, second_stage

PRODUCT = 1024  # rows and columns of the product that is timed
PASS_BYTES = 64 << 20  # of the memory that is passed over: more than caches hold
LEAST_S = 0.3  # spent on each rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a device does in a second."""

    flops: float  # of products in the type of training, a multiplication and an addition each
    bytes: float  # read and written


def measure_rates(device: torch.device, products: torch.dtype) -> Rates:
    """Time a large product and a pass over memory that reads and writes; under two seconds together."""
    a, b, out = (torch.ones(PRODUCT, PRODUCT, dtype=products, device=device) for _ in range(3))
    numbers = torch.ones(PASS_BYTES // 4, device=device)
    product_s = _shortest(lambda: torch.mm(a, b, out=out), device)
    pass_s = _shortest(lambda: numbers.mul_(1), device)
    return Rates(flops=2 * PRODUCT**3 / product_s, bytes=2 * numbers.nbytes / pass_s)


def _shortest(call: Callable[[], object], device: torch.device) -> float:
    """Give the shortest of the runs that fit into `LEAST_S`, after one that is not counted."""
    shortest, began = float("inf"), 0.0
    while not began or time.perf_counter() - began < LEAST_S:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if began:
            shortest = min(shortest, time.perf_counter() - start)
        began = began or time.perf_counter()
    return shortest


def step_seconds(
    config: Config, sizes: Sizes, n: int, rates: Rates, *, products: torch.dtype, active_features: int | None = None
) -> dict[str, float]:
    """Estimate the seconds of one step of n packed repetitions, by part.

    A product takes what its arithmetic or its weights' way from memory takes, whichever is longer; what is done to each output or
    weight besides is a pass over memory.

    encoder:       N rows of each sample's features read; as many gradients added up, and rows that were touched read and written;
                   of each layer three products of 2 N D D FLOPs.
                   The bottleneck is such a layer, of D V weights; then V stands for D in what follows.
    head forward:  2 N B D FLOPs; outputs written, read, and written as their gradients.
    head backward: 4 N B D FLOPs; gradients of the outputs read twice, those of the weights written.
    update:        weights and what the rule keeps of each read and written, gradients read, a copy for the products written. The
                   head's weights come as often as it has batches of its own.

    Args: n, of R. active_features, how many a sample has on average; by default all F.
    """
    N, D, B = config.batch_size, sizes.hidden, sizes.n_buckets
    F = config.feature_buckets or sizes.n_features
    active = min(F, F if active_features is None else active_features)
    width, row = products.itemsize, resolve_rows(config, sizes.features, products).itemsize
    narrow = config.n_bottleneck(sizes.n_labels, B, sizes.labels_a_sample, D)
    dense = D * D * config.layers + D * narrow  # weights of the layers, one repetition
    times = -(-N // (config.head_batch_size or N))

    def product(flops: float, n_bytes: float) -> float:
        return max(flops / rates.flops, n_bytes / rates.bytes)

    def update(n_weights: float, n_bytes: int) -> float:
        return n_weights * (n_bytes + width) / rates.bytes

    touched = min(N * active, F)
    rows = N * active * D * (row + width) + 2 * touched * D * row
    stored = HEAD_BYTES[config.head_storage()]
    copy = width if width < stored else 0
    rule = config.head_rule(sizes.n_labels, B, sizes.labels_a_sample)
    kept = 8 if rule == "adamw" else 0  # of each weight; row by row it is next to nothing
    head = n * B * (narrow or D)
    return {
        "encoder": n * (rows / rates.bytes + product(6 * N * dense, 3 * width * dense)),
        "head forward": product(2 * N * head, times * min(stored, width) * head) + 3 * width * n * N * B / rates.bytes,
        "head backward": product(4 * N * head, times * 2 * width * head) + 2 * width * n * N * B / rates.bytes,
        "update": times * update(head, 2 * (stored + kept) + copy) + update(n * dense, 24),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What training some repetitions together is expected to take."""

    peak_bytes: int  # as `group_bytes` estimates it, or the second stage's; the process included
    parts_s: dict[str, float]  # of a step
    second: Second | None = None  # what the second stage takes, where the training samples are known


def forecast(
    config: Config, sizes: Sizes, *, rates: Rates, device: torch.device, active_features: int | None = None,
    samples: Samples | None = None,
) -> Forecast:  # fmt: skip
    """Forecast the training of all repetitions at once on a device of such rates, and of the second stage on known samples."""
    n, products = config.n_repetitions(sizes.n_labels, sizes.labels_a_sample), resolve_precision(config.precision, device)
    second = None if samples is None else second_stage(config, sizes, samples)
    return Forecast(
        peak_bytes=max(group_bytes(config, sizes, n, device=device), 0 if second is None else second.peak_bytes),
        parts_s=step_seconds(config, sizes, n, rates, products=products, active_features=active_features),
        second=second,
    )
