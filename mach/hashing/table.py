"""LabelTable: label -> bucket and bucket -> labels, for every repetition of an ensemble.

Axes: K labels, B buckets, R repetitions. A `row` is a position in the table, 0..R-1; `repetitions[row]` is the number of the
repetition there, which alone decides its hash: part of an ensemble may hold the repetitions 3, 5 and 7.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.config import Family, TableKind
from mach.errors import ConfigError, ModelError
from mach.hashing.families import MAX_LABELS, CarterWegman, Ids, LabelHash, XXHash, make_family, prime_from
from mach.hashing.inverse import MAX_PRIME, SMALL_PRIME, Inverse
from mach.kernels import jit

CHUNK = 1 << 18  # labels hashed at a time: temporaries stay below about 10 MiB
PROBES = 64  # labels whose buckets go into the fingerprint, in each of the repetitions 0..3

Held = npt.NDArray[np.unsignedinteger[Any]]
Signed = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """The buckets of K labels in R repetitions; make one with `LabelTable.hashed` or `LabelTable.identity`.

    Buckets are computed on demand; `array()` computes them all once and keeps them. The identity table (R = 1, B = K,
    bucket k = label k) makes the full head an ensemble like any other. Some repetitions may have buckets that no hash computes:
    see `with_given`.

    Raises: ConfigError if K is above 2**40, B outside [2, K], or the repetitions are none, negative or repeated.
    """

    kind: TableKind
    n_labels: int  # K
    n_buckets: int  # B
    repetitions: tuple[int, ...]  # the number of each row, (R,)
    family: Family | None  # None: identity
    seed: int
    label_names: Sequence[str] | None = None  # (K,), for family xxhash only
    given: Mapping[int, Held] = field(default_factory=dict, compare=False, repr=False)  # (K,) by repetition, instead of its hash

    def __post_init__(self) -> None:
        numbers = self.repetitions
        if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
            raise ConfigError(f"repetitions={list(numbers)} must be one or more different numbers, 0 or above")
        if not 1 <= self.n_labels <= MAX_LABELS:
            raise ConfigError(f"n_labels={self.n_labels} must lie in [1, {MAX_LABELS}]")
        _ = self.families  # draws the functions, which checks B and the family

    @classmethod
    def hashed(
        cls,
        n_labels: int,
        n_buckets: int,
        n_repetitions: int | None = None,
        *,
        repetitions: Sequence[int] | None = None,
        family: Family = "carter-wegman",
        seed: int = 0,
        label_names: Sequence[str] | None = None,
    ) -> LabelTable:
        """Hash K labels into B buckets, in `n_repetitions` repetitions numbered from 0, or in those given by number.

        Family xxhash hashes names: it needs `label_names`, (K,), and gives a name the same bucket in every vocabulary.

        Raises: ConfigError for sizes that cannot work, or names that are missing or not K.
        """
        if (n_repetitions is None) == (repetitions is None):
            raise ConfigError("give either n_repetitions (how many) or repetitions (their numbers)")
        if n_repetitions is not None and n_repetitions < 1:
            raise ConfigError(f"n_repetitions={n_repetitions} must be 1 or more")
        if family == "xxhash":
            _check_names(n_labels, label_names)
        numbers = range(n_repetitions or 0) if repetitions is None else repetitions
        return cls(
            kind="hashed",
            n_labels=int(n_labels),
            n_buckets=int(n_buckets),
            repetitions=tuple(map(int, numbers)),
            family=family,
            seed=int(seed),
            label_names=label_names if family == "xxhash" else None,
        )

    @classmethod
    def identity(cls, n_labels: int) -> LabelTable:
        """Give each of K labels its own bucket, in one repetition: the table of the full head."""
        return cls(kind="identity", n_labels=int(n_labels), n_buckets=int(n_labels), repetitions=(0,), family=None, seed=0)

    def select(self, repetitions: Sequence[int]) -> LabelTable:
        """Give the table of some of the repetitions, by number, in the order given.

        Raises: ConfigError if a number is not in this table.
        """
        for number in repetitions:
            if number not in self.repetitions:
                raise ConfigError(f"repetition {number} is not in this table, which holds {list(self.repetitions)}")
        given = {number: self.given[number] for number in repetitions if number in self.given}
        return dataclasses.replace(self, repetitions=tuple(map(int, repetitions)), given=given)

    def with_given(self, given: Mapping[int, npt.ArrayLike]) -> LabelTable:
        """Give this table with the buckets of some repetitions, by number, as they are given: integers (K,) in [0, B).

        Such a repetition is looked up, never computed, and decodes like any other; who stores the table stores these beside it.

        Raises: ConfigError if a number is not in this table, or the buckets are not K integers in [0, B), or the table is the
                identity.
        """
        held = {}
        for number, buckets in given.items():
            array_K = np.asarray(buckets)
            if self.is_identity or number not in self.repetitions:
                raise ConfigError(
                    f"repetition {number} cannot be given buckets: this {self.kind} table hashes {list(self.repetitions)}"
                )
            if array_K.shape != (self.n_labels,) or not np.issubdtype(array_K.dtype, np.integer):
                raise ConfigError(
                    f"the buckets given for repetition {number} must be {self.n_labels} integers, got {array_K.dtype} of shape "
                    f"{array_K.shape}"
                )
            low, high = int(array_K.min()), int(array_K.max())
            if low < 0 or high >= self.n_buckets:
                raise ConfigError(f"bucket {low if low < 0 else high} of repetition {number} is outside [0, {self.n_buckets})")
            held[number] = array_K.astype(bucket_dtype(self.n_buckets))
            held[number].flags.writeable = False
        return dataclasses.replace(self, given={**self.given, **held})

    @property
    def n_repetitions(self) -> int:
        """R, the number of rows."""
        return len(self.repetitions)

    @property
    def is_identity(self) -> bool:
        """Whether bucket k is label k, so that nothing need be looked up."""
        return self.kind == "identity"

    @property
    def nbytes(self) -> int:
        """Bytes of the held form, R K of the smallest unsigned type; 0 for the identity, which need not be held."""
        return 0 if self.is_identity else table_bytes(self.n_labels, self.n_buckets, self.n_repetitions)

    @cached_property
    def families(self) -> tuple[LabelHash, ...]:
        """The hash function of each row, (R,); none for the identity."""
        if self.family is None:
            return ()
        return tuple(make_family(self.family, self.n_labels, self.n_buckets, self.seed, r) for r in self.repetitions)

    def buckets(self, labels: npt.ArrayLike, row: int) -> Ids:
        """Give the buckets of label ids in one row, computed, not looked up: int64 of the shape of `labels`.

        Raises: ConfigError if a label is outside [0, K), or the row outside [0, R).
        """
        self._check_row(row)
        ids = np.asarray(labels)
        if ids.size:
            _check_labels(ids, self.n_labels)
        ids = ids.astype(np.int64)
        if self.is_identity:
            return ids
        if self.repetitions[row] in self.given:
            found: Ids = self.given[self.repetitions[row]][ids].astype(np.int64)
            return found
        return self._hash(ids.ravel(), row).reshape(ids.shape)

    def array(self) -> Held:
        """Give every bucket, (R, K), in the smallest of uint8, uint16, uint32 that holds B; computed once, then kept; read-only.

        For the identity this is the label ids, (1, K): see `is_identity` to do without.
        """
        return self._array

    @cached_property
    def _array(self) -> Held:
        array_RK = np.empty((self.n_repetitions, self.n_labels), dtype=bucket_dtype(self.n_buckets))
        for row, number in enumerate(self.repetitions):
            if number in self.given:
                array_RK[row] = self.given[number]
                continue
            for start in range(0, self.n_labels, CHUNK):
                ids = np.arange(start, min(start + CHUNK, self.n_labels))
                array_RK[row, ids[0] : ids[-1] + 1] = ids if self.is_identity else self._hash(ids, row)
        array_RK.flags.writeable = False
        return array_RK

    def labels_of(self, bucket: int, row: int) -> Ids:
        """Give the sorted label ids of a bucket in one row: int64.

        Carter-Wegman steps through an arithmetic progression; for other families, and buckets given, an inverse list of each row
        asked for is held.

        Raises: ConfigError if the bucket is outside [0, B), or the row outside [0, R).
        """
        self._check_row(row)
        if not 0 <= bucket < self.n_buckets:
            raise ConfigError(f"bucket {bucket} is outside [0, {self.n_buckets})")
        if self.is_identity:
            return np.array([bucket], dtype=np.int64)
        family = self.families[row]
        if isinstance(family, CarterWegman) and self.repetitions[row] not in self.given:
            return family.labels_of(bucket)
        if row not in self._inverses:
            self._inverses[row] = _inverse(self.array()[row], self.n_buckets)
        ids, starts = self._inverses[row]
        return ids[starts[bucket] : starts[bucket + 1]].astype(np.int64)

    @cached_property
    def _inverses(self) -> dict[int, tuple[Held, Ids]]:
        return {}

    @property
    def is_arithmetic(self) -> bool:
        """Whether both directions are computed, so that `inverse` holds nothing."""
        return self.family == "carter-wegman" and prime_from(self.n_labels) < MAX_PRIME and not self.given

    @property
    def has_inverse(self) -> bool:
        """Whether `inverse` costs nothing any more."""
        return self.is_arithmetic or "inverse" in self.__dict__

    @cached_property
    def on_devices(self) -> dict[Any, Any]:
        """What `DeviceTable.of` made of this table, by device."""
        return {}

    @cached_property
    def inverse(self) -> Inverse:
        """Give both directions of the table to kernels, computed once, then kept.

        Nothing is held for Carter-Wegman with K up to about 2**32 and no buckets given; else `array()` and 4 R K bytes more (8 if
        K is above 2**32).
        """
        R, K, B = self.n_repetitions, self.n_labels, self.n_buckets
        is_arithmetic = self.is_arithmetic
        functions = [f for f in self.families if isinstance(f, CarterWegman) and is_arithmetic]
        p = functions[0].p if is_arithmetic else 1
        backs = [pow(f.a, -1, p) for f in functions] if is_arithmetic else []
        words = [[f.a for f in functions], [f.b for f in functions], backs, [back * B % p for back in backs]]
        a_R, b_R, back_R, step_R = (np.array(w if is_arithmetic else [0] * R, dtype=np.uint64) for w in words)
        table_RK = np.empty((0, 0), bucket_dtype(B)) if is_arithmetic else self.array()
        starts_RB = np.empty((0, 0) if is_arithmetic else (R, B + 1), np.int64)
        ids_RK: Held = np.empty((0, 0) if is_arithmetic else (R, K), np.uint32 if K <= 2**32 else np.uint64)
        for row in range(len(ids_RK)):
            ids_RK[row], starts_RB[row] = _inverse(table_RK[row], B)
        table_RK.flags.writeable = False  # as array() is: kernels are compiled for one kind
        is_small = is_arithmetic and p < SMALL_PRIME
        small = (is_small, a_R.astype(np.float64), b_R.astype(np.float64))
        return Inverse(K, B, is_arithmetic, np.uint64(p), a_R, b_R, back_R, step_R, *small, table_RK, starts_RB, ids_RK)

    def positives(self, indptr: npt.NDArray[np.int64], indices: Signed, row: int) -> tuple[npt.NDArray[np.int64], Signed]:
        """Give the distinct buckets of each sample's labels in one row, sorted: two labels that share a bucket count once.

        Args:    CSR of label ids: indptr (N + 1,), which may start above 0, and indices; sample i has
                 indices[indptr[i] : indptr[i + 1]].
        Returns: CSR of buckets: int64 (N + 1,) from 0, and int32 (int64 if B > 2**31). The identity gives its input back.
        Raises:  ConfigError if a label is outside [0, K), or the row outside [0, R).
        """
        self._check_row(row)
        indptr, indices = np.asarray(indptr), np.asarray(indices)
        assert len(indptr) and 0 <= indptr[0] and indptr[-1] <= len(indices), "indptr points outside indices"
        used = indices[indptr[0] : indptr[-1]]
        if used.size:
            _check_labels(used, self.n_labels)
        if self.is_identity:
            return indptr, indices
        out_indptr = np.zeros(len(indptr), dtype=np.int64)
        out: Signed = np.empty(len(used), dtype=np.int32 if self.n_buckets <= 2**31 else np.int64)
        _distinct_buckets(self.array()[row], indptr, indices, out_indptr, out)
        return out_indptr, out[: int(out_indptr[-1])]

    def fingerprint(self) -> str:
        """Give 32 hexadecimal digits of family, seed, K, B and some labels' buckets: any change of the hash code shows.

        The same for all parts of one ensemble: the repetitions held do not enter, the probed ones are always 0..3. Nor do buckets
        given, which whoever stores them checks.
        """
        facts = json.dumps([self.kind, self.family, self.seed, self.n_labels, self.n_buckets])
        digest = hashlib.blake2b(facts.encode(), digest_size=16)
        if not self.is_identity:
            probes = np.array([i * (self.n_labels - 1) // (PROBES - 1) for i in range(PROBES)])
            probed = dataclasses.replace(self, repetitions=(0, 1, 2, 3), given={})
            for row in range(4):
                digest.update(probed.buckets(probes, row).astype("<i8").tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Give what `from_dict` needs to make this table again, as plain JSON values.

        Label names and buckets given are kept elsewhere.
        """
        names = ("kind", "n_labels", "n_buckets", "family", "seed")
        return {
            **{name: getattr(self, name) for name in names},
            "repetitions": list(self.repetitions),
            "fingerprint": self.fingerprint(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, label_names: Sequence[str] | None = None) -> LabelTable:
        """Make the table that `to_dict` described; family xxhash needs the label names again.

        Raises: ModelError if a value is missing, or the hashes or names are not those of the table that was stored.
        """
        try:
            stored = values["fingerprint"]
            if values["kind"] == "identity":
                table = cls.identity(values["n_labels"])
            else:
                sizes = {name: values[name] for name in ("n_labels", "n_buckets", "repetitions", "family", "seed")}
                table = cls.hashed(**sizes, label_names=label_names)
        except KeyError as error:
            raise ModelError(f"the stored label table lacks {error}: the manifest is broken or of another format") from error
        if table.fingerprint() != stored:
            raise ModelError(
                f"the label table has fingerprint {table.fingerprint()}, the stored one {stored}: "
                "read it with the version of mach and the label names that it was trained with"
            )
        return table

    def _hash(self, ids: Ids, row: int) -> Ids:
        family = self.families[row]
        if not isinstance(family, XXHash):
            return family.buckets(ids)
        assert self.label_names is not None  # hashed() saw to it
        return family.buckets_of(self.label_names[k] for k in ids.tolist())

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.n_repetitions:
            raise ConfigError(f"row {row} is outside [0, {self.n_repetitions}), the repetitions of this table")


def bucket_dtype(n_buckets: int) -> np.dtype[Any]:
    """Give the smallest unsigned type that holds the buckets 0..B-1."""
    return np.min_scalar_type(n_buckets - 1)


def table_bytes(n_labels: int, n_buckets: int, n_repetitions: int) -> int:
    """Give the bytes of a held table (R, K)."""
    return n_repetitions * n_labels * bucket_dtype(n_buckets).itemsize


def _check_names(n_labels: int, label_names: Sequence[str] | None) -> None:
    if label_names is None:
        raise ConfigError(
            "family 'xxhash' hashes label names and this table has none: give label_names, "
            "or take 'carter-wegman' or 'multiply-shift', which hash label ids"
        )
    if len(label_names) != n_labels:
        raise ConfigError(f"label_names holds {len(label_names)} names, but n_labels={n_labels}")


def _check_labels(ids: npt.NDArray[Any], n_labels: int) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(f"label ids must be integers, not {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_labels:
        raise ConfigError(f"label id {low if low < 0 else high} is outside [0, {n_labels})")


def _inverse(table_K: Held, n_buckets: int) -> tuple[Held, Ids]:
    """Give the labels sorted by bucket, then by id, (K,), and where each bucket begins, (B + 1,)."""
    ids = np.argsort(table_K, kind="stable").astype(np.min_scalar_type(len(table_K)))
    starts = np.zeros(n_buckets + 1, dtype=np.int64)
    np.cumsum(np.bincount(table_K, minlength=n_buckets), out=starts[1:])
    return ids, starts


@jit
def _distinct_buckets(table_K: Held, indptr: Ids, indices: Signed, out_indptr: Ids, out: Signed) -> None:
    """Fill `out` with each sample's buckets, sorted and distinct, and out_indptr with where they end.

    Shell's sort with Knuth's gaps, 3 g + 1: insertion for the few labels of most samples, at worst n**1.5 steps for many.
    """
    end = 0
    for i in range(len(indptr) - 1):
        n = indptr[i + 1] - indptr[i]
        found = out[end : end + n]
        for j in range(n):
            found[j] = table_K[indices[indptr[i] + j]]
        gap = 1
        while gap < n // 3:
            gap = 3 * gap + 1
        while gap > 0:
            for j in range(gap, n):
                bucket, at = found[j], j
                while at >= gap and found[at - gap] > bucket:
                    found[at] = found[at - gap]
                    at -= gap
                found[at] = bucket
            gap //= 3
        n_distinct = 0
        for j in range(n):
            if j == 0 or found[j] != found[n_distinct - 1]:
                found[n_distinct] = found[j]
                n_distinct += 1
        end += n_distinct
        out_indptr[i + 1] = end
