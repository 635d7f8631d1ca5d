"""Write a data set: arrays that grow block by block in a hidden folder, which takes its final name when all is done."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.data.csr import CSR, Floats, check_finite
from mach.data.dataset import FORMAT, MANIFEST, SPLITS, Dataset, manifest_checksum
from mach.data.strings import Strings
from mach.errors import DataError
from mach.files import checksum, is_running, sync_folder, write_json

_HEADER_BYTES = 128  # room for any shape; what numpy itself gives arrays of one or two axes
_SHIFT_ROWS = 1 << 20
_CHUNK_ROWS = 1 << 16


@contextmanager
def reporting_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder and their like into a DataError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be written ({reason}); free space there or choose another folder") from error


class GrowingArray:
    """A .npy file that rows are appended to; its header, of fixed size, is written on `close`."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, row_shape: tuple[int, ...] = ()):
        self.path, self.dtype, self.row_shape, self.n_rows = path, np.dtype(dtype), row_shape, 0
        with reporting_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "wb")
            self._file.write(bytes(_HEADER_BYTES))

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add rows of the array's dtype at the end."""
        assert rows.dtype == self.dtype and rows.shape[1:] == self.row_shape
        with reporting_os_errors(self.path):
            self._file.write(np.ascontiguousarray(rows).data.cast("B") if rows.size else b"")
        self.n_rows += len(rows)

    def read(self, low: int, high: int) -> npt.NDArray[Any]:
        """Give a copy of rows [low, high) of an array with one axis."""
        with reporting_os_errors(self.path):
            self._file.flush()
        return np.fromfile(self.path, self.dtype, high - low, offset=_HEADER_BYTES + low * self.dtype.itemsize)

    def add(self, number: int) -> None:
        """Add a number to every item already written."""
        for low in range(0, self.n_rows, _SHIFT_ROWS):
            items = self.read(low, min(low + _SHIFT_ROWS, self.n_rows)) + self.dtype.type(number)
            with reporting_os_errors(self.path):
                self._file.seek(_HEADER_BYTES + low * self.dtype.itemsize)
                self._file.write(items.data)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Write the header and bring everything to the disk."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.n_rows, *self.row_shape)}
        text = repr(header).ljust(_HEADER_BYTES - 11) + "\n"
        with reporting_os_errors(self.path):
            self._file.seek(0)
            self._file.write(b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + text.encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        """Close the file as it is."""
        with suppress(OSError):
            self._file.close()


class SplitWriter:
    """The growing arrays of one split; features, labels and text may come in blocks of different sizes."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._arrays: dict[str, GrowingArray] = {}
        self.n_features = self.n_labels = 0  # columns seen or declared so far
        self.least_feature = 2**31 - 1  # id seen so far

    def append_features(self, features: CSR | npt.NDArray[np.float32]) -> None:
        """Add rows, sparse or dense; one split holds one kind."""
        if isinstance(features, CSR):
            self._append_csr("features", features)
            self.n_features = max(self.n_features, features.n_columns)
            self.least_feature = min(self.least_feature, int(features.indices.min(initial=self.least_feature)))
        else:
            self._array("features", np.float32, (features.shape[1],)).append(features)
            self.n_features = features.shape[1]

    def append_labels(self, labels: CSR) -> None:
        """Add the labels of more rows."""
        self._append_csr("labels", labels)
        self.n_labels = max(self.n_labels, labels.n_columns)

    def append_text(self, strings: Sequence[str]) -> None:
        """Add documents."""
        append_strings(self._array("text_offsets", np.int64), self._array("text_blob", np.uint8), strings)

    @property
    def n_samples(self) -> int:
        """Give the number of rows of labels so far."""
        return self._n_rows("labels_indptr")

    @property
    def n_texts(self) -> int:
        """Give the number of documents so far."""
        return self._n_rows("text_offsets")

    def text_chunks(self, n_bytes: int) -> Iterator[list[str]]:
        """Read the documents written so far, again, about as many bytes at a time."""
        offsets, blob = self._arrays["text_offsets"], self._arrays["text_blob"]
        for first in range(0, self.n_texts, _CHUNK_ROWS):
            bounds = offsets.read(first, min(first + _CHUNK_ROWS, self.n_texts) + 1)
            low = 0
            while low < len(bounds) - 1:
                high = max(low + 1, int(np.searchsorted(bounds, bounds[low] + n_bytes, "right")) - 1)
                yield Strings(bounds[low : high + 1] - bounds[low], blob.read(bounds[low], bounds[high]))[:]
                low = high

    def shift_features(self, number: int) -> None:
        """Add a number to all feature ids."""
        self._arrays["features_indices"].add(number)
        self.n_features += number

    def close(self) -> dict[str, Any]:
        """Finish every file; give the split's entry in the manifest."""
        for array in self._arrays.values():
            array.close()
        dense = "features" in self._arrays
        return {
            "n_samples": self.n_samples,
            "features_nnz": None if dense else self._arrays["features_indices"].n_rows,
            "labels_nnz": self._arrays["labels_indices"].n_rows,
        }

    def abandon(self) -> None:
        """Let go of every file."""
        for array in self._arrays.values():
            array.abandon()

    def _n_rows(self, name: str) -> int:
        return self._arrays[name].n_rows - 1 if name in self._arrays else 0

    def _array(self, name: str, dtype: npt.DTypeLike, row_shape: tuple[int, ...] = ()) -> GrowingArray:
        if name not in self._arrays:
            self._arrays[name] = GrowingArray(self._folder / f"{name}.npy", dtype, row_shape)
        return self._arrays[name]

    def _append_csr(self, name: str, rows: CSR) -> None:
        indptr, indices = self._array(f"{name}_indptr", np.int64), self._array(f"{name}_indices", np.int32)
        if not indptr.n_rows:
            indptr.append(np.zeros(1, np.int64))
        indptr.append(rows.indptr[1:] + indices.n_rows)
        indices.append(rows.indices)
        if rows.values is not None:
            self._array(f"{name}_values", np.float32).append(rows.values)


def append_strings(offsets: GrowingArray, blob: GrowingArray, strings: Sequence[str]) -> None:
    """Add strings to the two arrays that `mach.data.strings.Strings` reads."""
    encoded = [string.encode("utf-8") for string in strings]
    if not offsets.n_rows:
        offsets.append(np.zeros(1, np.int64))
    offsets.append(blob.n_rows + np.cumsum([len(part) for part in encoded], dtype=np.int64))
    blob.append(np.frombuffer(b"".join(encoded), np.uint8))


class DatasetWriter:
    """A data set in the making, in a hidden folder beside its final place; `writing_dataset` makes and removes it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.splits: dict[str, SplitWriter] = {}

    def split(self, name: str) -> SplitWriter:
        """Give the writer of a split, begun if need be."""
        return self.splits.setdefault(name, SplitWriter(self.folder / name))

    def write_label_names(self, names: Sequence[str]) -> None:
        """Store a name for each label id."""
        offsets = GrowingArray(self.folder / "label_names_offsets.npy", np.int64)
        blob = GrowingArray(self.folder / "label_names_blob.npy", np.uint8)
        append_strings(offsets, blob, names)
        offsets.close()
        blob.close()

    def finish(self, n_features: int, n_labels: int, made_from: Mapping[str, Any]) -> None:
        """Close all arrays and write the manifest, which makes the folder a data set."""
        order = [name for name in SPLITS if name in self.splits]
        manifest = {
            "format": FORMAT,
            "n_features": n_features,
            "n_labels": n_labels,
            "splits": {name: self.splits[name].close() for name in order},
            "made_from": dict(made_from),
            "versions": {"mach": importlib.metadata.version("mach"), "numpy": np.__version__},
        }
        with reporting_os_errors(self.folder):
            files = sorted(file for file in self.folder.rglob("*") if file.is_file())
            manifest["files"] = {
                file.relative_to(self.folder).as_posix(): {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
                for file in files
            }
            write_json(self.folder / MANIFEST, {**manifest, "xxh3_128": manifest_checksum(manifest)})


@contextmanager
def writing_dataset(out: Path) -> Iterator[DatasetWriter]:
    """Yield a writer whose folder is renamed to `out` at the end, and removed on error. A killed one's folder goes, too.

    Raises: DataError if `out` exists and is not an empty folder, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    refuse_occupied(out)
    prefix = f".{out.name}.{socket.gethostname()}."
    folder = out.with_name(f"{prefix}{os.getpid()}.tmp")
    writer = DatasetWriter(folder)
    with reporting_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(out.parent, prefix)
        folder.mkdir()
    try:
        yield writer
        with reporting_os_errors(out):
            os.replace(folder, out)
            sync_folder(out.parent)
    finally:
        for split in writer.splits.values():
            split.abandon()
        shutil.rmtree(folder, ignore_errors=True)


def refuse_occupied(out: Path) -> None:
    """Raise DataError if something is at `out` already, an empty folder excepted."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "holds another data set" if (out / MANIFEST).exists() else "exists and is not a data set"
        raise DataError(f"{out}: {what}, which is left alone; remove it or choose another folder")


def _remove_orphans(parent: Path, prefix: str) -> None:
    """Remove the hidden folders of processes of this machine that ended without doing so."""
    for folder in parent.glob(f"{prefix}*.tmp"):
        number = folder.name.removeprefix(prefix).removesuffix(".tmp")
        if number.isdigit() and (int(number) == os.getpid() or not is_running(int(number))):
            shutil.rmtree(folder, ignore_errors=True)


def write_dataset(
    path: str | Path, splits: Mapping[str, tuple[Any, Any]], *, label_names: Sequence[str] | None = None
) -> Dataset:
    """Write a data set from matrices in memory.

    Args:    splits, name (train, test or dev) -> (X, Y): X a scipy sparse matrix or a dense array (N, F), Y a scipy
             sparse matrix (N, K) whose stored non-zeros are the labels; label_names, K strings.
    Returns: the data set, opened. Duplicate entries of X are summed.
    Raises:  DataError if shapes disagree, a value is not finite, a split has another name, or the path is taken.
    """
    if not splits or not set(splits) <= set(SPLITS):
        raise DataError(f"splits {list(splits)} must be some of {', '.join(SPLITS)}")
    with writing_dataset(Path(path)) as writer:
        for name, (X, Y) in splits.items():
            _append_matrices(writer.split(name), name, X, Y)
        n_features, n_labels = agreed_sizes({name: (s.n_features, s.n_labels) for name, s in writer.splits.items()})
        if label_names is not None:
            check_label_names("label_names", len(label_names), n_labels)
            writer.write_label_names(label_names)
        writer.finish(n_features, n_labels, {})
    return Dataset.open(path)


def _append_matrices(split: SplitWriter, name: str, X: Any, Y: Any) -> None:
    features: CSR | Floats = CSR.from_scipy(X) if hasattr(X, "tocsr") else np.asarray(X, np.float32)
    labels = CSR.from_scipy(Y, with_values=False)
    if not isinstance(features, CSR) and features.ndim != 2:
        raise DataError(f"{name}: dense features must have two axes (N, F), got shape {features.shape}")
    if len(features) != len(labels):
        raise DataError(f"{name}: {len(features)} rows of features and {len(labels)} rows of labels must be equally many")
    check_finite(features, lambda row: f"{name}: row {row}")
    split.append_features(features)
    split.append_labels(labels)


def agreed_sizes(sizes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Give the F and K that all sources (by name) share.

    Raises: DataError naming the two that differ.
    """
    (first, expected), *others = sizes.items()
    for other, found in others:
        for what, a, b in zip(("features", "labels"), expected, found, strict=True):
            if a != b:
                raise DataError(f"{first} has {a} {what} and {other} has {b}; the splits of a data set must agree")
    return expected


def check_label_names(where: str, n_names: int, n_labels: int) -> None:
    """Raise DataError unless there is a name for each label."""
    if n_names != n_labels:
        raise DataError(f"{where}: {n_names} label names for {n_labels} labels; there must be one for each")
