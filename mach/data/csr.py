"""Sparse rows: N samples as one run of column ids each, in memory or memory-mapped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from mach.data.threads import n_threads
from mach.errors import DataError
from mach.kernels import jit

Ints = npt.NDArray[np.int64]
Columns = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
_PARALLEL_FROM = 1 << 21  # entries; below, starting threads costs more than it saves


@dataclass(frozen=True, slots=True, eq=False)
class CSR:
    """A sparse matrix of N rows; row i owns the entries `indptr[i]:indptr[i + 1]`, its column ids ascending and distinct.

    The shapes: indptr int64 (N + 1,), indices int32 (nnz,), values float32 (nnz,), or None where every entry is a
    plain yes (labels). The arrays may be read-only views of files.
    """

    indptr: Ints
    indices: Columns
    values: Floats | None
    n_columns: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """Give the number of stored entries."""
        return int(self.indptr[-1] - self.indptr[0])

    @classmethod
    def from_scipy(cls, matrix: Any, *, with_values: bool = True) -> CSR:
        """Copy a scipy sparse (or dense) matrix; duplicates are summed, ids sorted. Without values, zeros are dropped."""
        tidy = sp.csr_array(matrix, copy=True)
        tidy.sum_duplicates()
        if not with_values:
            tidy.eliminate_zeros()
        values = tidy.data.astype(np.float32) if with_values else None
        return cls(tidy.indptr.astype(np.int64), tidy.indices.astype(np.int32), values, int(tidy.shape[1]))

    def to_scipy(self) -> sp.csr_array:
        """Give the same matrix as a float32 scipy `csr_array`; entries without values are ones."""
        values = np.ones(len(self.indices), np.float32) if self.values is None else self.values
        return sp.csr_array((values, self.indices, self.indptr), shape=(len(self), self.n_columns))


def take_rows(csr: CSR, rows: npt.ArrayLike) -> CSR:
    """Copy rows, in any order and any number of times each, into a new CSR in memory.

    Raises: IndexError if a row id is outside [0, N).
    """
    rows_ = np.ascontiguousarray(rows, np.int64)
    if rows_.size and not (rows_.min() >= 0 and rows_.max() < len(csr)):
        raise IndexError(f"row ids must lie in [0, {len(csr)}), got {rows_.min()}..{rows_.max()}")
    begins = csr.indptr[rows_]
    indptr = np.zeros(len(rows_) + 1, np.int64)
    np.cumsum(csr.indptr[rows_ + 1] - begins, out=indptr[1:])
    indices = np.empty(indptr[-1], np.int32)
    values = None if csr.values is None else np.empty(indptr[-1], np.float32)
    cuts = _row_cuts(indptr, n_threads() if len(indices) >= _PARALLEL_FROM else 1)
    if len(cuts) == 2:
        _gather_part(csr, begins, indptr, indices, values, 0, len(rows_))
    else:
        with ThreadPoolExecutor(len(cuts) - 1) as pool:
            parts = itertools.pairwise(cuts)
            list(pool.map(lambda part: _gather_part(csr, begins, indptr, indices, values, *part), parts))
    return CSR(indptr, indices, values, csr.n_columns)


def take(features: CSR | Floats, rows: npt.ArrayLike) -> CSR | Floats:
    """Copy rows of sparse or dense features into memory; see `take_rows`."""
    return np.asarray(features[np.asarray(rows)]) if isinstance(features, np.ndarray) else take_rows(features, rows)


def _row_cuts(indptr: Ints, n_parts: int) -> list[int]:
    """Give row numbers that cut the rows into parts of about equally many entries, first 0 and last N."""
    n_rows = len(indptr) - 1
    inner = np.searchsorted(indptr, indptr[-1] * np.arange(1, n_parts) // n_parts)
    return [0, *(int(cut) for cut in inner), n_rows]


def _gather_part(csr: CSR, begins: Ints, indptr: Ints, indices: Columns, values: Floats | None, low: int, high: int) -> None:
    """Copy the entries of output rows [low, high)."""
    _gather(read_only(csr.indices), begins, indptr, indices, low, high)
    if values is not None and csr.values is not None:
        _gather(read_only(csr.values), begins, indptr, values, low, high)


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Give a plain read-only view, so that a kernel is compiled once for arrays in memory and in files."""
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view


@jit
def _gather(source: npt.NDArray[Any], begins: Ints, indptr: Ints, out: npt.NDArray[Any], low: int, high: int) -> None:
    for row in range(low, high):
        shift = begins[row] - indptr[row]
        for i in range(indptr[row], indptr[row + 1]):
            out[i] = source[i + shift]


def tidy_rows(counts: Ints, indices: Columns, values: Floats | None) -> tuple[Ints, Columns, Floats | None]:
    """Sort every row by column id and merge duplicates in place: values are summed in float32 in the order given.

    Args:    counts int64 (N,), entries of each row; indices int32 (nnz,); values float32 (nnz,) or None.
    Returns: indptr int64 (N + 1,), and the indices and values that remain, views of the arrays given.
    """
    indptr = np.zeros(len(counts) + 1, np.int64)
    size = _tidy(counts, indices, values, indptr)
    return indptr, indices[:size], None if values is None else values[:size]


@jit
def _tidy(counts: Ints, indices: Columns, values: Floats | None, indptr: Ints) -> int:
    read = write = 0
    for row in range(len(counts)):
        end = read + counts[row]
        for i in range(read + 1, end):
            if indices[i] <= indices[i - 1]:
                _sort(indices[read:end], None if values is None else values[read:end])
                break
        first = write
        for i in range(read, end):
            if write > first and indices[write - 1] == indices[i]:
                if values is not None:
                    values[write - 1] += values[i]
            else:
                indices[write] = indices[i]
                if values is not None:
                    values[write] = values[i]
                write += 1
        indptr[row + 1] = write
        read = end
    return write


@jit
def _sort(indices: Columns, values: Floats | None) -> None:
    """Sort entries by id, those of one id by their place."""
    keys = np.empty(len(indices), np.int64)
    for i in range(len(indices)):
        keys[i] = np.int64(indices[i]) << 32 | i
    keys.sort()
    before = None if values is None else values.copy()
    for i in range(len(indices)):
        indices[i] = keys[i] >> 32
        if values is not None:
            values[i] = before[keys[i] & 0xFFFFFFFF]  # type: ignore[index]  # None only where values are


def check_finite(features: CSR | Floats, where: Callable[[int], str]) -> None:
    """Raise DataError if a value is NaN or infinite; `where(row)` names its row."""
    values = features.values if isinstance(features, CSR) else features
    assert values is not None
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values).ravel())[0])
        if isinstance(features, CSR):
            row, feature = int(np.searchsorted(features.indptr, first, "right")) - 1, int(features.indices[first])
        else:
            row, feature = divmod(first, features.shape[1])
        raise DataError(f"{where(row)}: feature {feature} has value {values.flat[first]}; values must be finite float32 numbers")
