"""The readers of feature files, a generator of blocks each: XC-repository text and svmlight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mach.data.blocks import Block, TextBlock, line_blocks, opened
from mach.data.csr import CSR
from mach.data.parse import MAX_IDS, Lines, parse_lines
from mach.data.threads import ordered
from mach.errors import DataError


def read_xc(path: Path) -> Iterator[Block]:
    """Read XC-repository text: a header `N F K`, then a line `l1,l2 f:v f:v` for each sample; ids count from 0.

    A sample may have no labels (its line begins with a blank or a feature) and no features. Values of a feature named
    twice are summed, a label named twice is kept once. CRLF is accepted, and blank lines after the last sample are.

    Raises: DataError naming file and line.
    """
    with opened(path) as file:
        n_samples, n_features, n_labels = _read_header(path, file.readline(4096))
        lines = Lines(str(path), n_features, n_labels, comments=False)
        n_rows = 0
        for block in ordered(lambda text: _parse_block(text, lines), line_blocks(file, first_line=2)):
            block = _without_surplus(block, n_samples - n_rows, f"{path}:{n_samples + 2}")
            n_rows += len(block.labels)
            yield block
    if n_rows < n_samples:
        raise DataError(f"{path}:1: the header promises {n_samples} samples, the file has {n_rows}; is it cut short?")


def _read_header(path: Path, line: bytes) -> tuple[int, int, int]:
    numbers = line.removeprefix(b"\xef\xbb\xbf").split()
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        shown = line[:60].decode("utf-8", "replace").strip()
        raise DataError(f"{path}:1: '{shown}' is not a header of three counts: samples, features, labels")
    n_samples, n_features, n_labels = (int(number) for number in numbers)
    if not (n_samples and 0 < n_features <= MAX_IDS and 0 < n_labels <= MAX_IDS):
        raise DataError(f"{path}:1: the counts {n_samples} {n_features} {n_labels} must be at least 1 and at most {MAX_IDS}")
    return n_samples, n_features, n_labels


def _without_surplus(block: Block, n_left: int, where: str) -> Block:
    """Drop blank lines after the last sample; refuse other lines there."""
    features, labels = block.features, block.labels
    if len(labels) <= n_left:
        return block
    assert isinstance(features, CSR)
    if features.indptr[n_left] < features.indptr[-1] or labels.indptr[n_left] < labels.indptr[-1]:
        raise DataError(f"{where}: the file goes on after as many samples as its header promises")
    features = CSR(features.indptr[: n_left + 1], features.indices, features.values, features.n_columns)
    return Block(CSR(labels.indptr[: n_left + 1], labels.indices, None, labels.n_columns), features, None, block.done_bytes)


def _parse_block(text: TextBlock, lines: Lines) -> Block:
    features, labels = parse_lines(text.bytes, lines, text.first_line)
    return Block(labels, features, None, text.done_bytes)


def read_svmlight(path: Path) -> Iterator[Block]:
    """Read svmlight text: a line `l1,l2 f:v f:v # comment` for each sample, no header; blank and comment lines are skipped.

    The ids are handed on as they stand; the number of columns of a block is one more than its largest id.

    Raises: DataError naming file and line.
    """
    lines = Lines(str(path), MAX_IDS, MAX_IDS, comments=True)
    with opened(path) as file:
        for block in ordered(lambda text: _parse_block(text, lines), line_blocks(file)):
            assert isinstance(block.features, CSR)
            yield Block(fitted(block.labels), fitted(block.features), None, block.done_bytes)


def fitted(rows: CSR) -> CSR:
    """Give the same rows with as many columns as their ids ask for."""
    return CSR(rows.indptr, rows.indices, rows.values, int(rows.indices.max(initial=-1)) + 1)
