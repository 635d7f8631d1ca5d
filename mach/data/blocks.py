"""Blocks: the rows of a source, read, parsed and handed on a few MiB at a time, so that memory does not grow with the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np

from mach.data.csr import CSR, Floats
from mach.data.parse import Bytes
from mach.errors import DataError

BLOCK_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Block:
    """Some consecutive rows of one split: labels, and features or text or both; how far into the source they reach."""

    labels: CSR
    features: CSR | Floats | None
    text: list[str] | None
    done_bytes: int


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Whole lines of a file: bytes ending with a newline, the number of the first line, and the file's bytes read so far."""

    bytes: Bytes
    first_line: int
    done_bytes: int


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a source file that must not be empty.

    Raises: DataError naming the file if it is missing, unreadable or empty.
    """
    try:
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                raise DataError(f"{path}: is empty")
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def line_blocks(file: BufferedReader, *, first_line: int = 1) -> Iterator[TextBlock]:
    """Cut the rest of a file into blocks at line ends; a newline is added where the last line has none."""
    rest = b""
    while True:
        buffer = bytearray(len(rest) + max(BLOCK_BYTES, len(rest)) + 1)
        buffer[: len(rest)] = rest
        filled = len(rest) + file.readinto(memoryview(buffer)[len(rest) : -1])
        is_end = filled == len(rest)
        if is_end and filled:
            buffer[filled] = ord("\n")
            filled += 1
        end = buffer.rfind(b"\n", 0, filled) + 1
        rest = bytes(memoryview(buffer)[end:filled])
        if end:
            yield TextBlock(np.frombuffer(buffer, np.uint8, end), first_line, file.tell() - len(rest))
            first_line += buffer.count(b"\n", 0, end)
        if is_end:
            return
