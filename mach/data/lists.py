"""Labels that people list in files: some for all samples, or some for each sample, read a run of samples at a time.

One set: a label a line, or an npy array of ids. One set a sample: a line each of labels between commas or blanks, an empty line
for none, or a scipy CSR matrix (npz) whose entries are the labels. A label is its id, or its name where labels have names: a word
of digits is an id; a name that holds a comma or a blank stands between double quotes in lines of several.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import xxhash

from mach.data.blocks import opened
from mach.errors import DataError

Ids = npt.NDArray[np.int64]

EVERY = 1 << 12  # lines between two whose places in the file are held
NAMES = 1 << 16  # label names decoded at a time
_WORD = re.compile(r'"([^"]*)"|([^\s,"]+)|(")')


class Names:
    """Find the id of a label by its id as a text, or by its name. Holds 16 bytes a name, made when first asked for one."""

    def __init__(self, n_labels: int, names: Sequence[str] | None):
        self.n_labels, self._names = n_labels, names

    def id_of(self, word: str, where: str) -> int:
        """Give a label's id.

        Raises: DataError, which begins with `where`, if there is no such label.
        """
        if word.isdecimal():
            if int(word) >= self.n_labels:
                raise DataError(f"{where}: label id {word} is outside [0, {self.n_labels})")
            return int(word)
        if self._names is None:
            raise DataError(f"{where}: '{word[:60]}' is no label id, and the labels of this model have no names; give ids")
        hashes, ids = self._sorted
        wanted = np.uint64(xxhash.xxh3_64_intdigest(word.encode()))
        for i in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[i] != wanted:
                break
            if self._names[int(ids[i])] == word:
                return int(ids[i])
        raise DataError(f"{where}: there is no label named '{word[:60]}'")

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.uint64], Ids]:
        names = self._names or ()
        hashes = np.empty(len(names), np.uint64)
        for start in range(0, len(names), NAMES):
            digests = [xxhash.xxh3_64_intdigest(name.encode()) for name in names[start : start + NAMES]]
            hashes[start : start + len(digests)] = digests
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


def read_labels(path: str | Path, names: Names) -> Ids:
    """Read one set of labels: a label a line, or an npy array of ids. Gives distinct ids, rising.

    Raises: DataError naming the file, and the line where there is one, if it holds no labels or what is none.
    """
    path = Path(path)
    if path.suffix == ".npy":
        labels = _load(path, lambda: np.load(path, allow_pickle=False))
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{path}: must be an array of label ids, got {labels.dtype} of shape {labels.shape}")
        _refuse_outside(labels, names, str(path))
        found = np.unique(labels).astype(np.int64)
    else:
        with opened(path) as file:
            found = np.array(sorted({label for i, line in enumerate(file, 1) for label in _one(line, names, f"{path}:{i}")}))
    if not len(found):
        raise DataError(f"{path}: holds no labels; give at least one")
    return found.astype(np.int64)


def _one(line: bytes, names: Names, where: str) -> list[int]:
    """Give the label of a line, or none where the line is blank."""
    word = _text(line, where)
    if len(word) > 1 and word[0] == word[-1] == '"':
        word = word[1:-1]
    return [names.id_of(word, where)] if word else []


class LabelLists:
    """A set of labels for each of N samples, in a file; `rows` reads those of a run of samples.

    Of lines, every 4096th place in the file is held, 8 bytes each; a npz matrix is held whole.

    Raises: DataError naming the file, and the line where there is one, if it does not fit N samples and K labels.
    """

    def __init__(self, path: str | Path, n_samples: int, names: Names):
        self.path, self.n_samples, self._names = Path(path), n_samples, names
        self._csr: sp.csr_array | None = None
        if self.path.suffix == ".npz":
            self._csr = self._matrix()
            arrays = self._csr.indptr, self._csr.indices
            self.key = xxhash.xxh3_128_hexdigest(b"".join(np.asarray(x, np.int64).tobytes() for x in arrays))
        else:
            self.key, self._places = self._index()

    def rows(self, start: int, stop: int) -> list[Ids]:
        """Give the labels of the samples [start, stop), each rising and distinct.

        Raises: DataError naming file and line where a word is no label.
        """
        if self._csr is not None:
            return [np.unique(self._csr.indices[a:b]).astype(np.int64) for a, b in self._bounds(start, stop)]
        with opened(self.path) as file:
            file.seek(int(self._places[start // EVERY]) if start < stop else 0)
            lines = islice(file, start % EVERY, start % EVERY + stop - start)
            return [self._several(line, f"{self.path}:{n}") for n, line in enumerate(lines, start + 1)]

    def where(self, sample: int) -> str:
        """Name the place of a sample's labels, for an error."""
        return f"{self.path}: row {sample}" if self._csr is not None else f"{self.path}:{sample + 1}"

    def _bounds(self, start: int, stop: int) -> list[tuple[int, int]]:
        assert self._csr is not None
        cuts = self._csr.indptr[start : stop + 1].tolist()
        return list(pairwise(cuts))

    def _several(self, line: bytes, where: str) -> Ids:
        labels = set()
        for found in _WORD.finditer(_text(line, where)):
            quoted, plain, stray = found.groups()
            if stray:
                raise DataError(f"{where}: a double quote is not closed")
            labels.add(self._names.id_of(plain if quoted is None else quoted, where))
        return np.array(sorted(labels), np.int64)

    def _matrix(self) -> sp.csr_array:
        matrix = _load(self.path, lambda: sp.csr_array(sp.load_npz(self.path)))
        if matrix.shape != (self.n_samples, self._names.n_labels):
            raise DataError(
                f"{self.path}: is a matrix of shape {matrix.shape}; it must be ({self.n_samples}, {self._names.n_labels}), "
                "the samples and labels"
            )
        matrix.eliminate_zeros()
        return matrix

    def _index(self) -> tuple[str, Ids]:
        """Read the file once: its checksum, and where every 4096th line begins."""
        digest, places, n_lines, last = xxhash.xxh3_128(), [0], 0, b"\n"
        try:
            with open(self.path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                    picked = ends[(-n_lines - 1) % EVERY :: EVERY]
                    places += (picked + 1 + file.tell() - len(block)).tolist()
                    n_lines, last = n_lines + len(ends), block[-1:]
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        n_lines += last != b"\n"
        if n_lines != self.n_samples:
            raise DataError(
                f"{self.path}: has {n_lines} lines for {self.n_samples} samples; give one each, an empty one for no labels"
            )
        return digest.hexdigest(), np.array(places)


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text ({error.reason})") from error


def _load(path: Path, read: Any) -> Any:
    try:
        return read()
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _refuse_outside(labels: npt.NDArray[Any], names: Names, where: str) -> None:
    if labels.size and not (labels.min() >= 0 and labels.max() < names.n_labels):
        raise DataError(f"{where}: label ids must lie in [0, {names.n_labels}), got {labels.min()}..{labels.max()}")
