"""Dataset: a folder of memory-mapped arrays with a manifest.

    manifest.json                        format number, sizes, and the bytes and XXH3-128 checksum of every other file
    train/features_indptr.npy            and features_indices, features_values: CSR features; or features.npy: dense (N, F)
    train/labels_indptr.npy              and labels_indices: the labels of each sample
    train/text_offsets.npy, text_blob    optional, the documents (mach.data.strings)
    label_names_offsets.npy, _blob       optional, a name a label
    vectorizer/                          optional, what turned the text into features (mach.data.text)

The manifest is written last: a folder without it is not a data set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import xxhash

from mach.data.csr import CSR, Floats
from mach.data.strings import Strings
from mach.data.text import TextVectorizer
from mach.errors import DataError
from mach.files import checksum, map_array, read_json

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "test", "dev")


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """One part of a data set: features (N, F), sparse or dense float32; labels (N, K) without values; the text, if kept."""

    name: str
    features: CSR | Floats
    labels: CSR
    text: Strings | None

    @property
    def n_samples(self) -> int:
        """Give N."""
        return len(self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A data set on disk. Nothing is read before it is asked for; `Dataset.open` makes one."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Open a data set and check that every file has its full size (`verify` also reads them all).

        Raises: DataError if the folder is not a data set, has another format number, or a file is missing or cut short.
        """
        dataset = cls(Path(path), read_manifest(Path(path)))
        broken = []
        for name, known in dataset.manifest["files"].items():
            file = dataset.path / name
            if not file.is_file():
                broken.append(f"{name} is missing")
            elif file.stat().st_size != known["bytes"]:
                broken.append(f"{name} has {file.stat().st_size} bytes instead of {known['bytes']}")
        dataset._refuse(broken)
        return dataset

    @property
    def n_features(self) -> int:
        """Give F, the number of feature columns."""
        return int(self.manifest["n_features"])

    @property
    def n_labels(self) -> int:
        """Give K, the number of labels."""
        return int(self.manifest["n_labels"])

    @property
    def split_names(self) -> tuple[str, ...]:
        """Give the names of the splits there are, among train, test and dev."""
        return tuple(self.manifest["splits"])

    @property
    def fingerprint(self) -> str:
        """Give 16 hexadecimal digits that identify the data: equal exactly when sizes and all files are equal."""
        files = [(name, known["xxh3_128"]) for name, known in self.manifest["files"].items()]
        return xxhash.xxh3_64_hexdigest(repr((FORMAT, self.n_features, self.n_labels, files)).encode())

    @property
    def label_names(self) -> Strings | None:
        """Give the K label names, decoded when asked for, or None if labels are only numbers."""
        return self._strings("label_names")

    @property
    def vectorizer(self) -> TextVectorizer | None:
        """Give what turned text into this data set's features, or None if the features came ready-made."""
        folder = self.path / "vectorizer"
        return TextVectorizer.load(folder) if "vectorizer/vectorizer.json" in self.manifest["files"] else None

    def split(self, name: str) -> Split:
        """Map one split into memory.

        Raises: DataError naming the splits there are, if this one is not among them.
        """
        if name not in self.split_names:
            raise DataError(f"{self.path}: has no split '{name}'; there are: {', '.join(self.split_names)}")
        dense = self.manifest["splits"][name]["features_nnz"] is None
        features = self._array(f"{name}/features") if dense else self._csr(f"{name}/features", self.n_features)
        return Split(name, features, self._csr(f"{name}/labels", self.n_labels), self._strings(f"{name}/text"))

    def verify(self) -> None:
        """Recompute every checksum.

        Raises: DataError naming each file whose bytes have changed.
        """
        files = self.manifest["files"].items()
        self._refuse([f"{name} has changed" for name, known in files if checksum(self.path / name) != known["xxh3_128"]])

    def _refuse(self, broken: list[str]) -> None:
        if broken:
            raise DataError(f"{self.path}: is damaged: {'; '.join(broken)}; prepare it again from its sources")

    def _array(self, name: str) -> npt.NDArray[Any]:
        try:
            return map_array(self.path / f"{name}.npy")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: is damaged: {name}.npy cannot be mapped ({error}); prepare it again") from error

    def _csr(self, name: str, n_columns: int) -> CSR:
        values = self._array(f"{name}_values") if f"{name}_values.npy" in self.manifest["files"] else None
        return CSR(self._array(f"{name}_indptr"), self._array(f"{name}_indices"), values, n_columns)

    def _strings(self, name: str) -> Strings | None:
        if f"{name}_offsets.npy" not in self.manifest["files"]:
            return None
        return Strings(self._array(f"{name}_offsets"), self._array(f"{name}_blob"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a data set's manifest.

    Raises: DataError if there is none, or it is of another format or changed.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except OSError as error:
        raise DataError(f"{folder}: is not a data set (no readable {MANIFEST}); make one with `mach prepare`") from error
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST}: is not a manifest: {error}") from error
    if "config" in manifest:
        raise DataError(f"{folder}: is a run folder, not a data set; give the data set it was trained on")
    if manifest.get("format") != FORMAT:
        number = manifest.get("format")
        raise DataError(f"{folder}: has data format {number}, this version of mach reads format {FORMAT}; prepare it again")
    if manifest.get("xxh3_128") != manifest_checksum(manifest):
        raise DataError(f"{folder / MANIFEST}: has changed since it was written; prepare the data set again")
    return manifest


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Give the XXH3-128 digest of a manifest's content, its own checksum left out."""
    content = {key: value for key, value in manifest.items() if key != "xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
