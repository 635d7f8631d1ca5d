"""Find the files that a data set is made from, and tell whether they are still the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mach.data.blocks import opened
from mach.data.dataset import SPLITS
from mach.data.tables import ParquetLayout, parquet_layout
from mach.errors import DataError, nearest

_Value = TypeVar("_Value")
SUFFIXES = {
    "xc": (".txt",),
    "svmlight": (".svm", ".svmlight", ".libsvm", ".txt"),
    "npz": (".npz",),
    "parquet": (".parquet",),
    "tsv": (".tsv",),
}


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a data set: all splits in one format; documents beside features and label names where there are."""

    format: str
    splits: dict[str, Path]
    texts: dict[str, Path]  # split -> a document a line
    labels: Path | None  # a name a line

    layout: ParquetLayout | None = None  # of Parquet files, the same in all splits

    @property
    def are_text(self) -> bool:
        """Say whether the samples are text that has to become features first."""
        return self.format == "tsv" or (self.layout is not None and self.layout.samples == ("text",))

    @property
    def has_label_names(self) -> bool:
        """Say whether labels are given by name, not by id."""
        return self.format == "tsv" or (self.layout is not None and self.layout.has_label_names)

    @property
    def has_dense_features(self) -> bool:
        """Say whether a Parquet file's features are dense, so that their number is known from any row."""
        return self.layout is not None and self.layout.samples == ("features",)

    @property
    def declares_sizes(self) -> bool:
        """Say whether each file tells F and K; otherwise they are learnt from the ids."""
        return self.format in ("xc", "npz")

    @property
    def total_bytes(self) -> int:
        """Give the bytes of the splits' files."""
        return sum(path.stat().st_size for path in self.splits.values())

    def stamp(self, options: dict[str, Any]) -> dict[str, Any]:
        """Give what a manifest remembers of its sources: names, sizes and times of change, format and options."""
        files = {path.name: path.stat() for path in self._files()}
        stamps = {name: {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in files.items()}
        splits = {name: path.name for name, path in self.splits.items()}
        return {"format": self.format, "splits": splits, "files": stamps, "options": options}

    def _files(self) -> Iterator[Path]:
        yield from self.splits.values()
        yield from self.texts.values()
        if self.labels is not None:
            yield self.labels


def find_sources(source: Path, others: Mapping[str, str | Path | None], format: str) -> Sources:
    """Find the splits in a folder, or take a file as train; `others`, split -> file, go before what the folder holds.

    Raises: DataError if a file is missing or empty, no or more than one file could be meant, or formats differ.
    """
    if format != "auto" and format not in SUFFIXES:
        raise DataError(f"format '{format}' must be one of auto, {', '.join(SUFFIXES)}{nearest(format, SUFFIXES)}")
    splits = _splits_of(source, format) if source.is_dir() else {"train": source}
    splits |= {name: Path(path) for name, path in others.items() if path is not None}
    splits = {name: splits[name] for name in SPLITS if name in splits}
    if "train" not in splits:
        endings = ", ".join(sorted({suffix for suffixes in SUFFIXES.values() for suffix in suffixes}))
        raise DataError(f"{source}: holds no train split, a file train with one of the endings {endings}")
    for path in splits.values():
        with opened(path):
            pass
    format = _common(
        "format", splits, {name: detect_format(path) if format == "auto" else format for name, path in splits.items()}
    )
    layout = None
    if format == "parquet":
        layout = _common("layout", splits, {name: parquet_layout(path) for name, path in splits.items()})
    texts = {name: source / f"{name}_text.txt" for name in splits} if format in ("xc", "svmlight", "npz") else {}
    texts = {name: path for name, path in texts.items() if path.is_file() and splits[name].parent == source}
    labels = source / "labels.txt"
    return Sources(format, splits, texts, labels if labels.is_file() else None, layout)


def _common(what: str, splits: Mapping[str, Path], found: Mapping[str, _Value]) -> _Value:
    """Give what all splits have in common, or raise DataError."""
    for name, value in found.items():
        if value != found["train"]:
            raise DataError(
                f"{splits['train']} has {what} {found['train']} and {splits[name]} has {value}; all splits must have one"
            )
    return found["train"]


def _splits_of(folder: Path, format: str) -> dict[str, Path]:
    suffixes = dict.fromkeys(s for name, several in SUFFIXES.items() if format in ("auto", name) for s in several)
    found = {name: [folder / f"{name}{s}" for s in suffixes if (folder / f"{name}{s}").is_file()] for name in SPLITS}
    for paths in found.values():
        if len(paths) > 1:
            raise DataError(
                f"{folder}: both {paths[0].name} and {paths[1].name} are there; choose with --format, or name the file"
            )
    return {name: paths[0] for name, paths in found.items() if paths}


def detect_format(path: Path) -> str:
    """Tell a format by the file's ending; a .txt file whose first line is three counts is xc, another svmlight.

    Raises: DataError if the ending says nothing.
    """
    if path.suffix == ".txt":
        with opened(path) as file:
            words = file.readline(4096).removeprefix(b"\xef\xbb\xbf").split()
        return "xc" if len(words) == 3 and all(word.isdigit() for word in words) else "svmlight"
    for format, suffixes in SUFFIXES.items():
        if path.suffix in suffixes:
            return format
    raise DataError(f"{path}: its format cannot be told from its ending; give --format, one of {', '.join(SUFFIXES)}")
