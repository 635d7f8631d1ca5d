"""The reader of .npz files: numpy's own container of arrays, here the parts of two scipy CSR matrices."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from mach.data.blocks import Block, opened
from mach.data.csr import CSR, Floats, check_finite
from mach.errors import DataError

_PARTS = ("data", "indices", "indptr", "shape")
_WANTED = "X_data, X_indices, X_indptr, X_shape (or X, a dense matrix) and Y_data, Y_indices, Y_indptr, Y_shape"


def read_npz(path: Path) -> Iterator[Block]:
    """Read X (N, F), sparse or dense, and sparse Y (N, K), as one block: such a file has to fit into memory.

    The arrays: X_data, X_indices, X_indptr, X_shape or a dense X; Y_data, Y_indices, Y_indptr, Y_shape, where zeros of
    Y_data are no labels. Pickled arrays are not loaded.

    Raises: DataError naming the file and the array.
    """
    with opened(path) as file:
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (ValueError, OSError, zipfile.BadZipFile, AttributeError, TypeError) as error:
            raise DataError(f"{path}: is not a readable .npz file of plain arrays ({error})") from error
    features = _dense(path, arrays["X"]) if "X" in arrays else CSR.from_scipy(_sparse(path, arrays, "X"))
    labels = CSR.from_scipy(_sparse(path, arrays, "Y"), with_values=False)
    if len(features) != len(labels):
        raise DataError(f"{path}: X has {len(features)} rows and Y has {len(labels)}; they must be equally many")
    check_finite(features, lambda row: f"{path}: row {row} of X")
    yield Block(labels, features, None, path.stat().st_size)


def _dense(path: Path, matrix: npt.NDArray[Any]) -> Floats:
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiub":
        raise DataError(f"{path}: X must be a matrix of numbers, got {matrix.dtype} of shape {matrix.shape}")
    with np.errstate(over="ignore"):
        return matrix.astype(np.float32)


def _sparse(path: Path, arrays: Mapping[str, npt.NDArray[Any]], name: str) -> Any:
    missing = [f"{name}_{part}" for part in _PARTS if f"{name}_{part}" not in arrays]
    if missing:
        raise DataError(f"{path}: has no array {missing[0]} (has: {', '.join(arrays)}); wanted: {_WANTED}")
    data, indices, indptr, shape = (arrays[f"{name}_{part}"] for part in _PARTS)
    if not all(part.dtype.kind in "iu" for part in (indices, indptr, shape)) or data.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name}_indices, _indptr and _shape must be integers, {name}_data numbers")
    try:
        with np.errstate(over="ignore"):
            matrix = sp.csr_array((data.astype(np.float32), indices, indptr), shape=(int(shape[0]), int(shape[1])))
        matrix.check_format(full_check=True)
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(f"{path}: {name} is not a CSR matrix: {error}") from error
    return matrix
