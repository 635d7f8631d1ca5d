"""The step size over a run, and the seeds of everything random: pure functions of the step, so resuming needs no state."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from mach.kernels import jit, mix

ROUNDS = 8  # of the network that shuffles


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


def order_of(n_samples: int, seed: int, epoch: int, places: np.ndarray | None = None) -> np.ndarray:
    """Give the samples that stand at some places, int64, of the order in which an epoch visits N samples (default: all places).

    The order is a permutation from the seed and epoch alone, computed place by place: nothing of size N is held. It is a Feistel
    network over the next even number of bits, walked until it falls below N.
    Source: Luby & Rackoff 1988, SIAM J. Comput. 17; Black & Rogaway 2002, CT-RSA (walking within a smaller set).
    """
    keys = np.array([seed_of(seed, "order", epoch, i) for i in range(ROUNDS)], np.uint64)
    half = max(1, -(-max(0, n_samples - 1).bit_length() // 2))
    places = np.arange(n_samples) if places is None else np.asarray(places, np.int64)
    samples = np.empty(len(places), np.int64)
    _permute(places, np.uint64(n_samples), np.uint64(half), keys, samples)
    return samples


@jit
def _permute(places: np.ndarray, n: np.uint64, half: np.uint64, keys: np.ndarray, samples: np.ndarray) -> None:
    mask = (np.uint64(1) << half) - np.uint64(1)
    for i in range(len(places)):
        x = np.uint64(places[i])
        while True:
            left, right = x >> half, x & mask
            for key in keys:
                left, right = right, left ^ (mix(right + key) & mask)
            x = (left << half) | right
            if x < n:
                break
        samples[i] = x
