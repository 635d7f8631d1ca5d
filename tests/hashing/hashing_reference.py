"""The families as exact integers of any size, one label at a time: the truth that the fast ones must match."""

from __future__ import annotations

import hashlib

import xxhash


def smallest_prime_from(n: int) -> int:
    """Trial division; n up to about 2**41."""
    n = max(n, 2)
    while any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n += 1
    return n


def parameter(family: str, seed: int, repetition: int, name: str) -> int:
    return int(hashlib.blake2b(f"{family}/{seed}/{repetition}/{name}".encode()).hexdigest(), 16)


def carter_wegman(k: int, a: int, b: int, p: int, n_buckets: int) -> int:
    return ((a * k + b) % p) % n_buckets


def multiply_shift(k: int, a: int, b: int, n_buckets: int, *, word: int, bits: int) -> int:
    x = ((a * k + b) % 2**word) >> (word - bits)
    return (x * n_buckets) // 2**bits


def bucket(family: str, label: int | str, n_labels: int, n_buckets: int, seed: int, repetition: int, p: int = 0) -> int:
    """Hash one label from scratch; p spares the search for a large prime."""
    if family == "carter-wegman":
        p = p or smallest_prime_from(n_labels)
        a = parameter(family, seed, repetition, "a") % (p - 1) + 1
        return carter_wegman(label, a, parameter(family, seed, repetition, "b") % p, p, n_buckets)
    if family == "multiply-shift":
        a, b = (parameter(family, seed, repetition, name) % 2**64 for name in "ab")
        width = next(w for w in range(1, 65) if 2**w > n_labels - 1)
        return multiply_shift(label, a, b, n_buckets, word=64, bits=min(32, 65 - width))
    h = xxhash.xxh3_64(label.encode("utf-8"), seed=parameter(family, seed, repetition, "seed") % 2**64).intdigest()
    return (h // 2**32 * n_buckets) // 2**32
