"""The step size over a run, and the seeds of everything random: pure functions of the step, so resuming needs no state."""

from __future__ import annotations

import hashlib
import math

import numpy as np


def rate_at(step: int, n_steps: int, warmup: float) -> float:
    """Give the share of the peak step size at `step` (from 0): a linear rise over `warmup`, then a cosine to 0.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983 (the cosine); Goyal et al. 2017, arXiv:1706.02677 (the rise).
    """
    rise = max(1, round(warmup * n_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, n_steps - rise)))


def seed_of(*key: int | str) -> int:
    """Give a seed in [0, 2**63) from a key such as (seed, "order", epoch): the same on every machine and version."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def order_of(n_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Give the order in which an epoch visits the samples: a permutation of N, int64, from the seed and epoch alone."""
    return np.random.default_rng(seed_of(seed, "order", epoch)).permutation(n_samples)
