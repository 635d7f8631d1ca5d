"""The readers of tables: Parquet and tab-separated text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.data.blocks import Block, TextBlock, line_blocks, opened
from mach.data.csr import CSR, Floats, check_finite, tidy_rows
from mach.data.lines import fitted
from mach.data.parse import MAX_IDS
from mach.errors import DataError

_BATCH_ROWS = 8192
_SAMPLE_COLUMNS = (("text",), ("features",), ("indices", "values"))
_LABEL_TYPES = "list<int64> or list<string>"
_ALLOWED = {
    "text": "string",
    "features": "list<float>",
    "indices": "list<int32>",
    "values": "list<float>",
    "labels": _LABEL_TYPES,
}


class Vocabulary:
    """Label names in order of first appearance; a name's id is its position."""

    def __init__(self, names: Iterable[str] = ()):
        self._ids: dict[str, int] = {}
        self.ids_of(names)

    def ids_of(self, names: Iterable[str]) -> list[int]:
        """Give the ids of names; new names get the next ids."""
        ids = self._ids
        return [ids.setdefault(name, len(ids)) for name in names]

    @property
    def names(self) -> list[str]:
        """Give all names in the order of their ids."""
        return list(self._ids)


def read_tsv(path: Path, vocabulary: Vocabulary) -> Iterator[Block]:
    """Read lines `text<TAB>label|label`, labels being names. A line may end with its tab: a sample without labels.

    Raises: DataError naming file and line.
    """
    with opened(path) as file:
        for block in line_blocks(file):
            yield _tsv_block(path, block, vocabulary)


def decode_lines(path: Path, block: TextBlock) -> list[str]:
    """Give the lines of a block without their ends; CRLF counts as an end.

    Raises: DataError naming file and line if one is not UTF-8.
    """
    raw = block.bytes.tobytes()
    try:
        lines = raw.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        line = block.first_line + raw.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8") from error
    return [line.removesuffix("\r") for line in lines]


def _tsv_block(path: Path, block: TextBlock, vocabulary: Vocabulary) -> Block:
    texts, ids, counts = [], [], []
    for number, line in enumerate(decode_lines(path, block), block.first_line):
        text, tab, names = line.partition("\t")
        if not tab or "\t" in names:
            raise DataError(f"{path}:{number}: has {line.count(chr(9))} tabs; a line is text, one tab, label|label (or no label)")
        labels = names.split("|") if names else []
        if "" in labels:
            raise DataError(f"{path}:{number}: '{names[:60]}' has an empty label name; labels are separated by one |")
        texts.append(text)
        ids.extend(vocabulary.ids_of(labels))
        counts.append(len(labels))
    labels_csr = _rows(np.array(counts, np.int64), np.array(ids, np.int32), None)
    return Block(labels_csr, None, texts, block.done_bytes)


def _rows(counts: npt.NDArray[np.int64], ids: npt.NDArray[np.int32], values: Floats | None) -> CSR:
    return fitted(CSR(*tidy_rows(counts, ids, values), 0))


@dataclass(frozen=True, slots=True)
class ParquetLayout:
    """What a Parquet file holds: `text`, `features` (dense) or `indices` and `values`; labels by name or by id."""

    samples: tuple[str, ...]
    has_label_names: bool


def parquet_layout(path: Path) -> ParquetLayout:
    """Check the columns of a Parquet file.

    Raises: DataError naming the file, the column, its type and the types allowed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(path):
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: is not a readable Parquet file ({error})") from error
    for samples in _SAMPLE_COLUMNS:
        if set(samples) <= set(schema.names):
            break
    else:
        raise DataError(f"{path}: has columns {', '.join(schema.names)}; wanted: text, or features, or indices and values")
    if "labels" not in schema.names:
        raise DataError(f"{path}: has no column labels (has: {', '.join(schema.names)}); its type is {_LABEL_TYPES}")
    for name in (*samples, "labels"):
        if not _is_allowed(name, schema.field(name).type):
            raise DataError(f"{path}: column {name} has type {schema.field(name).type}; allowed: {_ALLOWED[name]}")
    return ParquetLayout(samples, not pa.types.is_integer(schema.field("labels").type.value_type))


def _is_allowed(name: str, kind: Any) -> bool:
    """Say whether a column may have a type; every width of integer, float, string and list is fine."""
    import pyarrow.types as is_

    def is_text(t: Any) -> bool:
        return bool(is_.is_string(t) or is_.is_large_string(t))

    if name == "text":
        return is_text(kind)
    if not (is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind)):
        return False
    inner = kind.value_type
    return bool(
        {"labels": is_.is_integer(inner) or is_text(inner), "indices": is_.is_integer(inner)}.get(name, is_.is_floating(inner))
    )


def read_parquet(path: Path, vocabulary: Vocabulary) -> Iterator[Block]:
    """Read Parquet by parts of row groups.

    Columns, others being left alone: text (string), or features (list<float>, all of one length: dense), or indices
    (list<int>) and values (list<float>); and labels, list<int> of ids or list<string> of names. A missing list is empty.

    Raises: DataError naming the file, and the column or the row, which counts from 0.
    """
    import pyarrow.parquet as pq

    layout = parquet_layout(path)
    kind = layout.samples[0]
    with pq.ParquetFile(path) as file:
        first, n_rows, n_bytes, width = 0, file.metadata.num_rows, path.stat().st_size, -1
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[*layout.samples, "labels"]):
            rows = _Batch(path, batch, first)
            first += batch.num_rows
            labels = rows.named_labels(vocabulary) if layout.has_label_names else rows.labels()
            text = rows.text() if kind == "text" else None
            features = None if kind == "text" else rows.dense(width) if kind == "features" else rows.sparse()
            width = features.shape[1] if isinstance(features, np.ndarray) else -1
            yield Block(labels, features, text, n_bytes * first // n_rows)


class _Batch:
    """Some rows of a Parquet file, and where they are."""

    def __init__(self, path: Path, batch: Any, first: int):
        self._path, self._batch, self._first = path, batch, first

    def _refuse(self, row: int, text: str) -> DataError:
        return DataError(f"{self._path}: row {self._first + row}: {text}")

    def _lists(self, name: str) -> tuple[npt.NDArray[np.int64], Any]:
        """Give the length of each list of a column, and all their items."""
        import pyarrow.compute as pc

        column = self._batch.column(name)
        counts = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        items = column.flatten()
        if items.null_count:
            at = int(np.flatnonzero(items.is_null().to_numpy(zero_copy_only=False))[0])
            raise self._refuse(_row_of(counts, at), f"column {name} has a null inside its list")
        return counts, items

    def _ids(self, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        counts, items = self._lists(name)
        ids = items.to_numpy(zero_copy_only=False)
        bad = np.flatnonzero((ids < 0) | (ids >= MAX_IDS))
        if len(bad):
            raise self._refuse(_row_of(counts, bad[0]), f"column {name} has id {ids[bad[0]]}; ids lie in [0, {MAX_IDS})")
        return counts, ids.astype(np.int32)

    def labels(self) -> CSR:
        return _rows(*self._ids("labels"), None)

    def named_labels(self, vocabulary: Vocabulary) -> CSR:
        counts, names = self._lists("labels")
        return _rows(counts, np.array(vocabulary.ids_of(names.to_pylist()), np.int32), None)

    def text(self) -> list[str]:
        column = self._batch.column("text")
        if column.null_count:
            raise self._refuse(column.to_pylist().index(None), "column text is null")
        texts: list[str] = column.to_pylist()
        return texts

    def sparse(self) -> CSR:
        counts, ids = self._ids("indices")
        value_counts, values = self._lists("values")
        unequal = np.flatnonzero(counts != value_counts)
        if len(unequal):
            row = int(unequal[0])
            raise self._refuse(row, f"has {counts[row]} indices and {value_counts[row]} values; they must be equally many")
        features = _rows(counts, ids, _as_float32(values))
        check_finite(features, lambda row: f"{self._path}: row {self._first + row}")
        return features

    def dense(self, width: int) -> Floats:
        counts, items = self._lists("features")
        width = int(counts[0]) if width < 0 else width
        unequal = np.flatnonzero(counts != width)
        if len(unequal):
            raise self._refuse(
                int(unequal[0]), f"has {counts[unequal[0]]} features, rows before have {width}; all must be equally long"
            )
        features = _as_float32(items).reshape(len(counts), width)
        check_finite(features, lambda row: f"{self._path}: row {self._first + row}")
        return features


def _as_float32(items: Any) -> Floats:
    with np.errstate(over="ignore"):
        return np.array(items.to_numpy(zero_copy_only=False), np.float32)


def _row_of(counts: npt.NDArray[np.int64], item: int) -> int:
    """Give the row that the n-th item of all lists belongs to."""
    return int(np.searchsorted(np.cumsum(counts), item, "right"))
