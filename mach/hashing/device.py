"""DeviceTable: label -> bucket and bucket -> labels on a tensor's own device, computed with torch's integers.

torch multiplies and shifts int64 only, so that every product here is kept below 2**63, or wraps as a uint64 would. Buckets that
no arithmetic gives, those of hashed names, are held: R K of the smallest unsigned type.

Axes: N samples, K labels, B buckets, M buckets of a repetition, R repetitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mach.hashing.families import WORD, CarterWegman, LabelHash, MultiplyShift
from mach.hashing.table import LabelTable

Kind = Literal["identity", "carter-wegman", "multiply-shift", "held"]

MAX_INT32_PRIME = 2**31  # below it a k + b fits an int64, and twice a residue a uint32


@dataclass(frozen=True)
class DeviceTable:
    """The buckets of K labels in R repetitions as a device computes them; make one with `DeviceTable.of`."""

    kind: Kind
    n_labels: int  # K
    n_buckets: int  # B
    families: tuple[LabelHash, ...]  # (R,); none for the identity
    held_RK: Tensor  # of kind "held", unsigned numbers in a signed type, as torch indexes hardly any other; else empty
    words: Tensor  # int64: what a kernel hashes with, see `_words`

    @classmethod
    def of(cls, table: LabelTable, device: torch.device) -> DeviceTable:
        """Give the table on a device; made once, then kept with the table."""
        kept: dict[torch.device, DeviceTable] = table.on_devices
        if device not in kept:
            kind = _kind_of(table)
            held_RK = torch.empty(0, dtype=torch.int8, device=device)
            if kind == "held":
                array_RK = table.array()
                held_RK = torch.from_numpy(array_RK.astype(f"i{array_RK.itemsize}")).to(device)  # the same bits
            words = torch.tensor(_words(kind, table), dtype=torch.int64, device=device)
            kept[device] = cls(kind, table.n_labels, table.n_buckets, table.families, held_RK, words)
        return kept[device]

    @property
    def p(self) -> int:
        """The modulus of Carter-Wegman; 0 for other kinds."""
        return self.families[0].p if self.families and isinstance(self.families[0], CarterWegman) else 0

    @property
    def held_mask(self) -> int:
        """The bits of an unsigned number of the held type: takes away what widening a signed one added."""
        return int((1 << 8 * self.held_RK.element_size()) - 1)

    @property
    def has_progressions(self) -> bool:
        """Whether `first_labels` and `steps_R` give the labels of a bucket."""
        return self.kind == "carter-wegman" and 0 < self.p < MAX_INT32_PRIME

    def buckets(self, labels: Tensor, row: int) -> Tensor:
        """Give the buckets of label ids in one row: int64, of the shape of `labels`, which must be int64 in [0, K)."""
        if self.kind == "identity":
            return labels
        if self.kind == "held":
            return self.held_RK[row][labels].long() & self.held_mask
        family = self.families[row]
        if isinstance(family, CarterWegman):
            return _affine_mod(labels, family.a, family.b, family.p) % self.n_buckets
        assert isinstance(family, MultiplyShift)
        x = _shifted(labels * _signed(family.a) + _signed(family.b), WORD - family.bits)  # wraps at 2**64, as it must
        return _shifted(x * self.n_buckets, family.bits)  # below 2**64, though perhaps not as a signed number

    @cached_property
    def steps_R(self) -> Tensor:
        """The difference mod p of the labels of a bucket in each row, each from the one before: int64 (R,)."""
        backs = [pow(f.a, -1, f.p) for f in self.families if isinstance(f, CarterWegman)]
        return torch.tensor([back * self.n_buckets % self.p for back in backs], device=self.words.device)

    @cached_property
    def _backs_2R(self) -> Tensor:
        """What takes a bucket back to its first label, of each row: a**-1, and -a**-1 b mod p."""
        backs = [(pow(f.a, -1, f.p), f) for f in self.families if isinstance(f, CarterWegman)]
        words = [[back for back, _ in backs], [-back * f.b % f.p for back, f in backs]]
        return torch.tensor(words, device=self.words.device)

    def first_labels(self, buckets_NRM: Tensor) -> Tensor:
        """Give the first label of each bucket, of the first rows: the others follow, `steps_R` apart mod p.

        There are as many as there are y = bucket + i B below p. Those of K or more, fewer than p - K, are no labels.
        """
        back_R1, add_R1 = self._backs_2R[:, : buckets_NRM.shape[1], None]
        labels: Tensor = (buckets_NRM * back_R1 + add_R1) % self.p
        return labels


def _kind_of(table: LabelTable) -> Kind:
    if table.is_identity:
        return "identity"
    return "held" if table.family is None or table.family == "xxhash" or table.given else table.family


def _affine_mod(x: Tensor, a: int, b: int, p: int) -> Tensor:
    """Give (a x + b) mod p without overflow, for x, a, b in [0, p) and p < 2**41.

    p < 2**31: a x + b < 2**62. Else a = high 2**21 + low, high < 2**20, low < 2**21: no product below exceeds 2**62.
    """
    if p < MAX_INT32_PRIME:
        return (x * a + b) % p
    high, low = divmod(a, 2**21)
    return ((x * high % p << 21) + (x * low + b) % p) % p


def _signed(word: int) -> int:
    """Give the int64 of the same 64 bits."""
    return word - 2**WORD if word >= 2 ** (WORD - 1) else word


def _shifted(x: Tensor, n: int) -> Tensor:
    """Shift the bits of a uint64 held as an int64 to the right by n in [1, 63]: zeros come in, not copies of the sign."""
    return (x >> n) & ((1 << (WORD - n)) - 1)


def _words(kind: Kind, table: LabelTable) -> list[int]:
    """Give the numbers that a kernel hashes with: three of the table, then three of each row.

    Carter-Wegman: p, B, floor(2**32 / B); a, floor(2**32 a / p), b. Multiply-shift: B, 64 - l, l; a, b, 0, their 64 bits.
    """
    B = table.n_buckets
    words = [0, 0, 0]
    for family in table.families:
        if isinstance(family, CarterWegman):
            words[:3] = family.p, B, 2**32 // B
            words += [family.a, (family.a << 32) // family.p, family.b]
        elif isinstance(family, MultiplyShift):
            words[:3] = B, WORD - family.bits, family.bits
            words += [_signed(family.a), _signed(family.b), 0]
    return words
