"""Sets of files that together hold one model under way, each rank's labels in its own: whole at one step, or not at all.

    full.json                              the set that counts: run, step, K, its parts and their bytes, progress; written last
    full-00000120-whole.safetensors        what every rank has alike, written by rank 0
    full-00000120-0-2000.safetensors       the head's outputs of labels [0, 2000), and their moments

A new set is written beside the old one; once all its parts are there, the JSON switches to it, and only then the old one goes.
Killed at any moment, the last whole set counts. Any number of ranks reads it, each its own labels, whatever parts they lie in.

A finished head is put together in one file the same way: each rank writes its labels' bytes at their place.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from mach.errors import ModelError
from mach.files import atomic, read_json, write_json

FOLDER = "checkpoints"  # of a run; as for groups of repetitions
UNDERWAY, BEST = "full", "best"  # the sets of a run: to go on from, and the best weights so far
BLOCK_BYTES = 16 << 20  # written at once
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


def is_cut(run: Path) -> bool:
    """Tell whether a run folder holds the checkpoint of a head that several processes were training."""
    return (run / FOLDER / f"{UNDERWAY}.json").exists()


def is_sharded(name: str) -> bool:
    """Tell whether a tensor of a packed model is cut by labels: the head's weights and their moments."""
    return name.removeprefix("optimizer.").startswith("head.")


def write_part(
    folder: Path, name: str, step: int, labels: range, tensors: Mapping[str, Tensor], *, run: str, n_labels: int, with_whole: bool
) -> dict[str, int]:
    """Write one rank's part of a set that does not count yet, and what all have alike if asked; give the files' bytes by name.

    Raises: ModelError if the disk refuses.
    """
    about = {"run": run, "step": step, "n_labels": n_labels}
    written = {}
    for part in [labels, None] if with_whole else [labels]:
        file, some = _part_name(name, step, part), {k: v for k, v in tensors.items() if is_sharded(k) == (part is not None)}
        try:
            folder.mkdir(exist_ok=True)
            with atomic(folder / file) as temporary:
                metadata = {"part": json.dumps({**about, "labels": _ends(part)})}
                save_file({k: v.contiguous() for k, v in some.items()}, temporary, metadata=metadata)
            written[file] = (folder / file).stat().st_size
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(f"{folder / file}: cannot be written ({error}); free some space and go on with --resume") from error
    return written


def switch(
    folder: Path, name: str, step: int, parts: Sequence[range], files: Mapping[str, int], progress: Mapping[str, Any],
    *, run: str, n_labels: int,
) -> None:  # fmt: skip
    """Let a set count whose parts are all written, and delete every file of others.

    Raises: ModelError if the disk refuses.
    """
    about = {"run": run, "step": step, "n_labels": n_labels, "parts": [[p.start, p.stop] for p in parts]}
    try:
        write_json(folder / f"{name}.json", {**about, "bytes": dict(files), "progress": dict(progress)})
        _delete(folder, name, keep=files)
    except OSError as error:
        raise ModelError(f"{folder / name}.json: cannot be written ({error.strerror}); go on with --resume") from error


def delete_set(folder: Path, name: str) -> None:
    """Delete a set, the JSON first: what is left of it then counts for nothing."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    _delete(folder, name, keep=())


def _delete(folder: Path, name: str, *, keep: Any) -> None:
    for file in folder.glob(f"{name}-*.safetensors"):
        if file.name not in keep:
            file.unlink(missing_ok=True)


def part_files(name: str, step: int, parts: Sequence[range | None]) -> list[str]:
    """Give the file names of some parts of a set; None: of what all have alike."""
    return [_part_name(name, step, part) for part in parts]


def _ends(labels: range | None) -> list[int] | None:
    return None if labels is None else [labels.start, labels.stop]


def _part_name(name: str, step: int, labels: range | None) -> str:
    return f"{name}-{step:08d}-{'whole' if labels is None else f'{labels.start}-{labels.stop}'}.safetensors"


@dataclass(frozen=True, slots=True)
class ShardSet:
    """A set that counts, whose parts fit together."""

    folder: Path
    step: int
    n_labels: int
    parts: Sequence[range]  # of labels, rising
    progress: Mapping[str, Any]
    name: str

    @classmethod
    def find(cls, folder: Path, name: str, *, run: str, n_labels: int) -> ShardSet | None:
        """Open the set of that name, if there is one.

        Raises: ModelError naming the file that is missing, broken, or of another step, run or number of labels, or the labels
                that no part holds.
        """
        path = folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            about = read_json(path)
            parts = sorted((range(*part) for part in about["parts"]), key=lambda part: part.start)
            found = cls(folder, int(about["step"]), int(about["n_labels"]), parts, about["progress"], name)
            files: dict[str, int] = dict(about["bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: is broken ({error}); delete {folder} to start again") from error
        if (about["run"], found.n_labels) != (run, n_labels):
            raise ModelError(
                f"{path}: is of run {about['run']} with {found.n_labels:,} labels, this is run {run} with {n_labels:,}; it was "
                "copied here by mistake: delete it"
            )
        found._refuse_gaps()
        for labels in [None, *parts]:
            found._refuse_other(_part_name(name, found.step, labels), labels, run, files)
        return found

    def read(self, into: Mapping[str, Tensor], labels: range) -> None:
        """Copy the tensors of a rank's labels, and those that all have alike, into a model's.

        Raises: ModelError if names or shapes differ.
        """
        for name, target in into.items():
            if not is_sharded(name):
                with self._open(None) as file:
                    _copy(file, name, target, slice(None), self._path(None))
        for part in self.parts:
            low, high = max(part.start, labels.start), min(part.stop, labels.stop)
            if low >= high:
                continue
            with self._open(part) as file:
                for name, target in into.items():
                    if is_sharded(name):
                        place = target[:, low - labels.start : high - labels.start]
                        _copy(file, name, place, slice(low - part.start, high - part.start), self._path(part))

    def _path(self, labels: range | None) -> Path:
        return self.folder / _part_name(self.name, self.step, labels)

    def _open(self, labels: range | None) -> Any:
        return safetensors.safe_open(self._path(labels), framework="pt")

    def _refuse_gaps(self) -> None:
        ends = [range(0), *self.parts, range(self.n_labels, self.n_labels)]
        for one, two in pairwise(ends):
            if one.stop != two.start:
                what = "are missing" if one.stop < two.start else "are held twice"
                low, high = sorted((one.stop, two.start))
                raise ModelError(
                    f"{self.folder / self.name}.json: labels {low:,} to {high - 1:,} {what}; restore the set from a copy, or "
                    f"delete {self.folder} to start again"
                )

    def _refuse_other(self, file: str, labels: range | None, run: str, files: Mapping[str, int]) -> None:
        """Raise ModelError unless a part is there, whole, and of this set."""
        path, mend = self.folder / file, f"restore it from a copy, or delete {self.folder} to start again"
        if not path.exists():
            which = "what all ranks have alike" if labels is None else f"labels {labels.start:,} to {labels.stop - 1:,}"
            raise ModelError(f"{path}: is missing, with {which}; {mend}")
        size = path.stat().st_size
        if size != files.get(file):
            raise ModelError(f"{path}: has {size:,} bytes instead of {files.get(file, 0):,}; {mend}")
        try:
            with self._open(labels) as opened:
                about = json.loads((opened.metadata() or {})["part"])
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ModelError(f"{path}: is broken ({error}); {mend}") from error
        wanted = {"run": run, "step": self.step, "n_labels": self.n_labels, "labels": _ends(labels)}
        differ = [f"{key} {about.get(key)} instead of {value}" for key, value in wanted.items() if about.get(key) != value]
        if differ:
            raise ModelError(f"{path}: is of another set: {', '.join(differ)}; {mend}")


def read_whole(path: Path, into: Mapping[str, Tensor], labels: range) -> None:
    """Copy a rank's tensors out of a checkpoint that one process wrote.

    Raises: ModelError if names or shapes differ.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        for name, target in into.items():
            _copy(file, name, target, slice(labels.start, labels.stop) if is_sharded(name) else slice(None), path)


def _copy(file: Any, name: str, target: Tensor, labels: slice, path: Path) -> None:
    """Copy some labels of a tensor of a file, read from it alone."""
    try:
        whole = file.get_slice(name)
        value = whole[:, labels] if is_sharded(name) else whole[:]
        if value.shape != target.shape:
            raise ValueError(f"{name} has shape {list(value.shape)} instead of {list(target.shape)}")
        target.copy_(value)
    except (safetensors.SafetensorError, ValueError, IndexError) as error:
        raise ModelError(f"{path}: is of another model ({error}); delete {path.parent} to start again") from error


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a safetensors file lies, known before any is there."""

    header: bytes
    places: Mapping[str, int]  # of the first byte in the file
    n_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> Layout:
        """Lay out tensors of some types and shapes, in the order of their names."""
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        end, begins = 0, {}
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            begins[name], end = end, end + prod(shape) * dtype.itemsize
            entries[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        return cls(header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end)

    def create(self, path: Path) -> None:
        """Make the file, of its full size, its tensors not yet written."""
        with open(path, "wb") as file:
            file.write(self.header)
            file.truncate(self.n_bytes)

    @contextmanager
    def opened(self, path: Path) -> Iterator[Layout.Writer]:
        """Open the file to write tensors into it, some in this process, some in others; on leaving, they are on the disk."""
        with open(path, "rb+") as file:
            yield Layout.Writer(self, file)
            file.flush()
            os.fsync(file.fileno())

    @dataclass(frozen=True, slots=True)
    class Writer:
        """Writes rows of tensors at their places."""

        layout: Layout
        file: Any

        def write(self, name: str, rows: Tensor, first: int = 0) -> None:
            """Write some rows of a tensor, from its row `first` on, a block at a time; on a GPU, only a block is copied."""
            row_bytes = rows[:1].numel() * rows.element_size()
            n = max(1, BLOCK_BYTES // max(1, row_bytes))
            self.file.seek(self.layout.places[name] + first * row_bytes)
            for start in range(0, len(rows), n):
                block = rows[start : start + n].contiguous().cpu()
                self.file.write(block.reshape(-1).view(torch.uint8).numpy().data)
