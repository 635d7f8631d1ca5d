"""How much memory a group of packed repetitions takes to train, and how much there is: so that a group is as large as fits.

`experiments/memory` prints what `group_bytes` says beside the peak of real runs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mach.config import Config
from mach.encoders import inputs
from mach.hashing.bounds import ensemble_cost
from mach.hashing.grouping import WIDTH
from mach.heads import linear
from mach.heads.rounding import NARROW, STORAGE
from mach.heads.shard import DRAWN
from mach.model import Sizes, resolve_precision, resolve_rows
from mach.train.rules import BLOCK

PROCESS_BYTES = 450 << 20  # of Python, torch and compiled kernels before any weight; on a GPU, of its context
SHARE = 0.9  # of what is free; the rest is for what grows beside it, such as pages of the data set
CGROUPS = (  # limit and use of a container, version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def group_bytes(config: Config, sizes: Sizes, n: int, *, device: torch.device) -> int:
    """Estimate the most bytes that training n repetitions together takes on a device, the process or context included.

    What stays: weights, moments, label table, and the head's copy for its products. What comes and goes: one repetition's
    weights, if there are several, beside them at the start and the end; with a step, a batch's hidden vectors, what a chunk of
    buckets takes in one that tells its loss, and the row gradients of a block. Before all these, if buckets are learnt, what they
    are learnt from: that is most where labels are many and a repetition is small.
    """
    F, B, D = config.feature_buckets or sizes.n_features, sizes.n_buckets, sizes.hidden
    products, width = resolve_precision(config.precision, device), _bottleneck(config, sizes) or D
    one = ensemble_cost(
        n_labels=sizes.n_labels, n_buckets=B, n_repetitions=1, hidden=D, n_features=F, layers=config.layers, settings=config,
        labels_a_sample=sizes.labels_a_sample, input_bytes=resolve_rows(config, sizes.features, products).itemsize,
    )  # fmt: skip
    table = 0 if config.table == "identity" else one.table_bytes  # the identity is not held
    stays = one.training_bytes - one.table_bytes + table
    keeps_copy = linear.keeps_copy(n * B * width, products=products, storage=_storage(config), device=device)
    copy = products.itemsize * B * width if keeps_copy else 0
    slots = 4 * B if config.compensated else 0
    beside = one.weight_bytes if n > 1 else 0
    step = step_bytes(config, sizes, n, device=device) + inputs.GRADIENT_BYTES[device.type]
    grouping = 0
    if device.type == "cpu" and config.share_grouped(sizes.n_labels, sizes.labels_a_sample):
        grouping = 2 * 4 * WIDTH * sizes.n_labels  # of rare ones only, which may be all; it is the host that learns them
    return PROCESS_BYTES + max(grouping, n * (stays + copy + slots) + beside + step)


def step_bytes(config: Config, sizes: Sizes, n: int, *, device: torch.device) -> int:
    """Estimate what comes and goes with a step of n repetitions: hidden vectors of a batch, and what a chunk of buckets takes."""
    B, D, N = sizes.n_buckets, sizes.hidden, config.batch_size
    products, narrow = resolve_precision(config.precision, device), _bottleneck(config, sizes)
    width = narrow or D
    hidden = n * N * (D * (16 + (13 + products.itemsize) * config.layers) + narrow * (8 + 2 * products.itemsize))
    budget, samples = config.head_memory << 20 or linear.CHUNK_BYTES[device.type], config.head_batch_size or N
    chunk = min(budget, n * B * linear.bucket_bytes(samples, width, products=products))
    if config.precision == "float8":
        hidden += n * samples * width * (1 + products.itemsize)  # rounded, and widened again
    drawn = 8 * min(DRAWN, B * width) if _storage(config) in NARROW else 0  # in float32, to be rounded
    by_torch = 16 * 4 * min(BLOCK, n * B * width) if device.type == "cuda" else 0
    return hidden + max(chunk + by_torch, drawn)


def _bottleneck(config: Config, sizes: Sizes) -> int:
    return config.n_bottleneck(sizes.n_labels, sizes.n_buckets, sizes.labels_a_sample, sizes.hidden)


def _storage(config: Config) -> torch.dtype:
    return STORAGE.get(config.head_storage(), torch.float32)


def group_size(config: Config, sizes: Sizes, *, free_bytes: int, n_workers: int, device: torch.device) -> int:
    """Give how many repetitions a worker may hold at once, if `n_workers` share the memory; at least one."""
    size = 1
    while size < config.n_repetitions(sizes.n_labels, sizes.labels_a_sample):
        if group_bytes(config, sizes, size + 1, device=device) * n_workers > SHARE * free_bytes:
            break
        size += 1
    return size


def what_to_lower(config: Config, sizes: Sizes, device: torch.device) -> str:
    """Say what one repetition takes, and which settings would lower that, each alone, to how much: the largest saving first."""
    now, found = group_bytes(config, sizes, 1, device=device), {}
    for name, value in _lower(config, sizes).items():
        if value != getattr(config, name):
            found[f"{name}={value}"] = group_bytes(*_changed(config, sizes, name, value), 1, device=device)
    listed = [f"{change} {_gib(n)}" for change, n in sorted(found.items(), key=lambda item: item[1]) if n < 0.97 * now]
    return f"it takes about {_gib(now)}" + (f"; with one of these settings less: {', '.join(listed)}" if listed else "")


def _lower(config: Config, sizes: Sizes) -> dict[str, Any]:
    """Give a lower value of each setting that memory depends on."""
    values: dict[str, Any] = {
        "head_precision": "float8",
        "head_optimizer": "sgd",
        "hidden": max(1, sizes.hidden // 2),
        "batch_size": max(1, config.batch_size // 2),
    }
    if config.table == "identity" and not _bottleneck(config, sizes):
        values["bottleneck"] = min(64, sizes.hidden // 2)
    if config.table == "hashed":
        values["buckets"] = max(2, sizes.n_buckets // 2)
    if sizes.features == "sparse":
        values["feature_buckets"] = max(2, (config.feature_buckets or sizes.n_features) // 4)
    return values


def _changed(config: Config, sizes: Sizes, name: str, value: Any) -> tuple[Config, Sizes]:
    other: dict[str, Any] = {"compensated": 0.0} if name == "head_precision" else {}
    if name == "batch_size":
        other["head_batch_size"] = min(config.head_batch_size, value)
    changed = config.replace(**{name: value}, **other)
    decided = {"buckets": "n_buckets", "hidden": "hidden"}.get(name)
    return changed, replace(sizes, **{decided: value}) if decided else sizes


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def free_memory(device: torch.device) -> int:
    """Give the bytes that can be had on a device now: on a CPU what the system and the container leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    free = available[0] if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in CGROUPS:
        if Path(limit).exists() and (text := Path(limit).read_text().strip()).isdigit():
            free = min(free, int(text) - int(Path(used).read_text()))
    return max(0, free)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be had: torch's on a GPU, its allocator's on a CPU, or numpy's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
