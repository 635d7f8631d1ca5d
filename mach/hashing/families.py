"""Universal hash families: one object hashes the labels of one repetition into buckets.

Axes: K labels, B buckets. The parameters of a repetition follow from (family, seed, repetition) alone and are frozen for
ever: a change of anything here that moves a label orphans every stored model.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt
import xxhash

from mach.errors import ConfigError, nearest

MAX_LABELS = 2**40
WORD = 64  # bits of the machine word that multiply-shift multiplies in

Ids = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class CarterWegman:
    """Hash a label id k to ((a k + b) mod p) mod B, with p the smallest prime >= K, a in [1, p), b in [0, p).

    k -> (a k + b) mod p is a bijection of the p residues, so the loads of the buckets over the p residues differ by at most
    one, and the labels of a bucket are an arithmetic progression mod p: the inverse needs no memory.
    Over all (a, b), two different ids share a bucket with probability at most (ceil(p/B) - 1) / (p - 1) <= 1/B.

    Source: Carter & Wegman 1979, J. Comput. Syst. Sci. 18(2), class H1.
    """

    n_labels: int  # K
    n_buckets: int  # B
    a: int
    b: int

    @classmethod
    def draw(cls, n_labels: int, n_buckets: int, seed: int, repetition: int) -> CarterWegman:
        """Give the function of a repetition."""
        p = prime_from(n_labels)
        a = 1 + _drawn(p - 1, "carter-wegman", seed, repetition, "a")
        return cls(n_labels, n_buckets, a, _drawn(p, "carter-wegman", seed, repetition, "b"))

    @property
    def p(self) -> int:
        """The modulus: the smallest prime >= K."""
        return prime_from(self.n_labels)

    def buckets(self, ids: npt.ArrayLike) -> Ids:
        """Give the bucket of each label id in [0, K): int64, shape (n,) as the ids."""
        y = _affine_mod(np.asarray(ids).astype(np.uint64), self.a, self.b, self.p)
        return _mod(y, self.n_buckets).astype(np.int64)

    def labels_of(self, bucket: int) -> Ids:
        """Give the sorted label ids of a bucket in [0, B): int64, from about p/B steps and no stored list."""
        a_inverse = pow(self.a, -1, self.p)
        y = np.arange(bucket, self.p, self.n_buckets, dtype=np.uint64)
        ids = _affine_mod(y, a_inverse, -a_inverse * self.b % self.p, self.p).astype(np.int64)
        return np.sort(ids[ids < self.n_labels])


@dataclass(frozen=True, slots=True)
class MultiplyShift:
    """Hash a label id k to (x B) >> l, with x the top l bits of (a k + b) mod 2**64 and l = min(32, 65 - bits(K - 1)).

    x is strongly universal (pairs of ids get independent, uniform x) as the word has at least bits(K - 1) + l - 1 bits, so
    two different ids share a bucket with probability at most 1/B + 2**-l over all (a, b), for B <= 2**l.
    The inverse has no short form: `LabelTable` sorts the labels by bucket instead.

    Source: Dietzfelbinger 1996, STACS, "Universal hashing and k-wise independent random variables via integer arithmetic
    without primes"; Thorup, "High speed hashing for integers and strings", arXiv:1504.06804, section 3.3.
    """

    n_labels: int  # K
    n_buckets: int  # B
    a: int
    b: int

    @classmethod
    def draw(cls, n_labels: int, n_buckets: int, seed: int, repetition: int) -> MultiplyShift:
        """Give the function of a repetition.

        Raises: ConfigError if B exceeds 2**l, which would leave buckets that no label can reach.
        """
        a, b = (_drawn(2**WORD, "multiply-shift", seed, repetition, name) for name in "ab")
        family = cls(n_labels, n_buckets, a, b)
        if n_buckets > 2**family.bits:
            raise ConfigError(
                f"n_buckets={n_buckets} must lie in [2, {2**family.bits}] for family 'multiply-shift' "
                f"with n_labels={n_labels}; use 'carter-wegman' for more"
            )
        return family

    @property
    def bits(self) -> int:
        """Bits l that are kept of the product."""
        return min(32, WORD + 1 - (self.n_labels - 1).bit_length())

    def buckets(self, ids: npt.ArrayLike) -> Ids:
        """Give the bucket of each label id in [0, K): int64, shape (n,) as the ids."""
        product = np.asarray(ids).astype(np.uint64) * np.uint64(self.a) + np.uint64(self.b)  # wraps at 2**64, as it must
        x = product >> np.uint64(WORD - self.bits)
        return (x * np.uint64(self.n_buckets) >> np.uint64(self.bits)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class XXHash:
    """Hash a label's name to ((h >> 32) B) >> 32, with h the XXH3-64 digest of its UTF-8 bytes under a seed.

    Needs no vocabulary: a name has its bucket before anyone has counted the labels. Not universal by proof (XXH3 is a mixing
    function); two names share a bucket with probability about 1/B over the seeds.
    """

    n_buckets: int  # B
    seed: int  # 64 bits, of this repetition

    @classmethod
    def draw(cls, n_labels: int, n_buckets: int, seed: int, repetition: int) -> XXHash:
        """Give the function of a repetition; it does not depend on the number of labels.

        Raises: ConfigError if B exceeds 2**32, the range of the bits used.
        """
        if n_buckets > 2**32:
            raise ConfigError(f"n_buckets={n_buckets} must lie in [2, {2**32}] for family 'xxhash'; use 'carter-wegman' for more")
        return cls(n_buckets, _drawn(2**64, "xxhash", seed, repetition, "seed"))

    def buckets_of(self, names: Iterable[str]) -> Ids:
        """Give the bucket of each name: int64, shape (n,)."""
        h = np.fromiter((xxhash.xxh3_64_intdigest(name.encode(), self.seed) for name in names), dtype=np.uint64)
        return ((h >> np.uint64(32)) * np.uint64(self.n_buckets) >> np.uint64(32)).astype(np.int64)


LabelHash = CarterWegman | MultiplyShift | XXHash
_DRAWS: dict[str, Callable[[int, int, int, int], LabelHash]] = {
    "carter-wegman": CarterWegman.draw,
    "multiply-shift": MultiplyShift.draw,
    "xxhash": XXHash.draw,
}


def make_family(name: str, n_labels: int, n_buckets: int, seed: int, repetition: int) -> LabelHash:
    """Give the hash function of one repetition: the same for ever for the same five arguments.

    Raises: ConfigError if the name is unknown, K is outside [2, 2**40], B is outside [2, K] or above what the family can
    reach, or the repetition is negative.
    """
    if name not in _DRAWS:
        raise ConfigError(f"family={name!r} must be one of {', '.join(map(repr, _DRAWS))}{nearest(name, _DRAWS)}")
    if not 2 <= n_labels <= MAX_LABELS:
        raise ConfigError(f"n_labels={n_labels} must lie in [2, {MAX_LABELS}] to be hashed; an identity table takes one label")
    if not 2 <= n_buckets <= n_labels:
        raise ConfigError(f"n_buckets={n_buckets} must lie in [2, {n_labels}], the number of labels")
    if repetition < 0:
        raise ConfigError(f"repetition={repetition} must be 0 or more")
    return _DRAWS[name](n_labels, n_buckets, seed, repetition)


def _drawn(below: int, family: str, seed: int, repetition: int, parameter: str) -> int:
    """Give a parameter in [0, below): the 512-bit BLAKE2b digest of its description, as an integer, mod `below`."""
    digest = hashlib.blake2b(f"{family}/{seed}/{repetition}/{parameter}".encode()).digest()
    return int.from_bytes(digest, "big") % below


def _mod(x: _Words, m: int) -> _Words:
    """Give x mod m; numpy divides by a constant much faster than it takes remainders."""
    return x - x // np.uint64(m) * np.uint64(m)


def _affine_mod(x: _Words, a: int, b: int, p: int) -> _Words:
    """Give (a x + b) mod p without overflow, for x, a, b in [0, p) and p < 2**41 (the primes from 2**40 on begin just above).

    p < 2**32: a x + b <= p (p - 1) < 2**64. Else a = high 2**21 + low, high < 2**20, low < 2**21: high x < 2**61, and
    (high x mod p) 2**21 + low x + b < 2**62 + 2**62 + 2**41 < 2**64.
    """
    if p < 2**32:
        return _mod(x * np.uint64(a) + np.uint64(b), p)
    high, low = divmod(a, 2**21)
    return _mod((_mod(x * np.uint64(high), p) << np.uint64(21)) + x * np.uint64(low) + np.uint64(b), p)


@functools.cache
def prime_from(n: int) -> int:
    """Give the smallest prime >= n, for n up to 2**40."""
    return next(m for m in count(max(n, 2)) if is_prime(m))


def is_prime(n: int) -> bool:
    """Tell whether n < 341,550,071,728,321 is prime: Miller-Rabin, certain with the first seven primes as bases.

    Source: Jaeschke 1993, Math. Comp. 61(204), "On strong pseudoprimes to several bases".
    """
    bases = (2, 3, 5, 7, 11, 13, 17)
    if n < 2 or any(n % q == 0 for q in bases):
        return n in bases
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> twos
    return all((power := pow(base, odd, n)) == 1 or any(pow(power, 2**i, n) == n - 1 for i in range(twos)) for base in bases)
