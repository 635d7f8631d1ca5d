"""The run folder: a manifest, one safetensors file a repetition, and what is needed to ask it raw text by name.

    manifest.json                  format number, config, sizes, label table, data fingerprint, versions, checksums
    repetition-003.safetensors     the weights of repetition 3, and its label table where that is learnt
    repetition-003.json            its size, checksum, seconds and validation figures; written last: with it, it is finished
    reranker.*                     the second stage (mach.store.reranker), fitted once all repetitions are there
    label_names_*.npy  vectorizer/ as in the data set it was trained on
    checkpoints/  logs/            of work under way (mach.train)

Repetitions share nothing: files trained on other machines by the same config and data are copied in beside these, and decode
as one model. The manifest holds nothing that differs between such machines but the versions.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from mach.config import Config
from mach.data import Dataset, TextVectorizer
from mach.data.strings import Strings
from mach.decoding.rerank import Reranker
from mach.errors import ConfigError, ModelError
from mach.files import atomic, checksum, map_array, read_json, write_json
from mach.hashing import LabelTable
from mach.hashing.grouping import is_grouped
from mach.model import Model, Packed, Sizes, feature_buckets
from mach.store.reranker import load_reranker, verify_reranker

FORMAT = 1
MANIFEST = "manifest.json"
MAX_REPETITIONS = 100_000
TABLE = "label_table"  # the buckets of a repetition that has learnt them, (K,), beside its weights


def sizes_of(config: Config, dataset: Dataset) -> Sizes:
    """Give the sizes of a model of this config over a data set.

    Raises: ConfigError if B exceeds K, or features cannot be hashed as the config says.
    """
    train = dataset.split("train")
    dense, labels = isinstance(train.features, np.ndarray), train.labels
    labels_a_sample = labels.nnz / max(1, len(labels))
    sizes = Sizes(
        n_features=dataset.n_features,
        n_labels=dataset.n_labels,
        n_buckets=config.n_buckets(dataset.n_labels, labels_a_sample),
        hidden=config.n_hidden(len(labels)),
        features="dense" if dense else "sparse",
        labels_a_sample=labels_a_sample,
    )
    feature_buckets(config, sizes, [0])
    return sizes


def table_of(config: Config, sizes: Sizes, repetitions: Sequence[int], label_names: Sequence[str] | None) -> LabelTable:
    """Give the label table of some repetitions."""
    if config.table == "identity":
        return LabelTable.identity(sizes.n_labels)
    return LabelTable.hashed(
        sizes.n_labels,
        sizes.n_buckets,
        repetitions=tuple(repetitions),
        family=config.family,
        seed=config.seed,
        label_names=label_names if config.family == "xxhash" else None,
    )


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder on disk."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read the manifest of a run folder.

        Raises: ModelError if there is none, it is broken, or of another format.
        """
        path = Path(path)
        try:
            manifest = read_json(path / MANIFEST)
        except OSError as error:
            raise ModelError(f"{path}: is not a run folder (no readable {MANIFEST}); make one with `mach train`") from error
        except ValueError as error:
            raise ModelError(f"{path / MANIFEST}: is broken: {error}") from error
        if "splits" in manifest:
            raise ModelError(f"{path}: is a data set, not a run folder; choose another folder for the run")
        if manifest.get("format") != FORMAT:
            found = manifest.get("format")
            raise ModelError(f"{path}: has model format {found}, this version of mach reads format {FORMAT}; train it again")
        if manifest.get("checksum") != _own_checksum(manifest):
            raise ModelError(f"{path / MANIFEST}: does not match its own checksum; restore it from a copy, or train again")
        return cls(path, manifest)

    @classmethod
    def create(cls, path: str | Path, config: Config, dataset: Dataset) -> Run:
        """Make a run folder, or open the one that is there if it is of the same config and data set.

        Raises: ModelError if it is of another config or data set (names what differs), or cannot be written.
        """
        path, sizes = Path(path), sizes_of(config, dataset)
        facts, n_repetitions = _facts(config, dataset, sizes), config.n_repetitions(sizes.n_labels, sizes.labels_a_sample)
        try:
            if (path / MANIFEST).exists():
                run = cls.open(path)
                run._refuse_other(facts)
                if n_repetitions <= run.manifest["repetitions"]:
                    return run
                return run._write_manifest(dict(run.manifest) | {"repetitions": n_repetitions})
            path.mkdir(parents=True, exist_ok=True)
            files = _copy_shared(dataset, path)
            return cls(path, {})._write_manifest(facts | {"repetitions": n_repetitions, "files": files})
        except OSError as error:
            raise ModelError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error

    @property
    def config(self) -> Config:
        """Give the config that the run was made with, R included."""
        return Config.from_dict(dict(self.manifest["config"]) | {"repetitions": self.manifest["repetitions"]})

    @property
    def sizes(self) -> Sizes:
        """Give the sizes that the data decided."""
        earlier = {"hidden": self.manifest["config"]["hidden"]}  # versions left it out while settings alone decided it
        return Sizes(**(earlier | self.manifest["sizes"]))

    def add(
        self, repetition: int, parameters: Mapping[str, Tensor], facts: Mapping[str, Any], table_K: np.ndarray | None = None
    ) -> None:
        """Store a finished repetition: its weights, with its buckets if it has learnt them, then the record that makes it count.

        Raises: ModelError if the disk refuses; what was finished before stays.
        """
        weights = self.weights_path(repetition)
        try:
            weights.with_suffix(".json").unlink(missing_ok=True)  # a record never speaks of other weights
            with atomic(weights) as temporary:
                table = {} if table_K is None else {TABLE: torch.from_numpy(table_K.copy())}
                save_file({**parameters, **table}, temporary, metadata=self.metadata)
        except (OSError, safetensors.SafetensorError) as error:
            raise _refused(weights, error) from error
        self.record(repetition, sum(p.numel() for p in parameters.values()), facts)

    def record(self, repetition: int, n_parameters: int, facts: Mapping[str, Any]) -> None:
        """Write the record that makes a repetition count whose weights are there.

        Raises: ModelError if the disk refuses.
        """
        weights = self.weights_path(repetition)
        try:
            record = {
                "repetition": repetition,
                "run": self._key(),
                "bytes": weights.stat().st_size,
                "xxh3_128": checksum(weights),
                "parameters": n_parameters,
                "versions": versions(),
                **facts,
            }
            write_json(weights.with_suffix(".json"), {**record, "checksum": _own_checksum(record)})
        except OSError as error:
            raise _refused(weights, error) from error

    @property
    def metadata(self) -> dict[str, str]:
        """Give what a file of weights says of itself."""
        return {"format": "pt", "run": self._key()}

    def weights_path(self, repetition: int) -> Path:
        """Give where a repetition's weights lie."""
        return self.path / f"repetition-{repetition:03d}.safetensors"

    def records(self) -> dict[int, dict[str, Any]]:
        """Give the record of each finished repetition, by its number, whatever the state of its weights.

        One that cannot be read, or lacks what every record holds, is left out.
        """
        found = {}
        for file in sorted(self.path.glob("repetition-*.json")):
            try:
                record = read_json(file)
                if record.keys() >= {"repetition", "run", "bytes", "xxh3_128", "parameters"}:
                    found[int(record["repetition"])] = record
            except (OSError, ValueError, TypeError):
                continue
        return found

    def problems(self) -> dict[int, str]:
        """Say what is wrong with each repetition that should be there and cannot be used: seen without reading weights."""
        records = self.records()
        expected = range(max([self.manifest["repetitions"], *(r + 1 for r in records)]))
        return {r: trouble for r in expected if (trouble := self._trouble(r, records.get(r)))}

    def _trouble(self, repetition: int, record: Mapping[str, Any] | None) -> str:
        weights = self.weights_path(repetition)
        if record is None:
            return "is broken: its record is unreadable" if weights.with_suffix(".json").exists() else "is missing"
        if record.get("run") != self._key():
            return "was trained with another config, data set or format"
        if not weights.exists():
            return "is missing its weights"
        size = weights.stat().st_size
        return "" if size == record["bytes"] else f"is cut short or changed: {size} bytes instead of {record['bytes']}"

    def finished(self) -> list[int]:
        """Give the numbers of the repetitions that can be used."""
        return sorted(self.records().keys() - self.problems().keys())

    def verify(self) -> list[str]:
        """Read everything and name each problem: flipped bytes, missing and truncated files. Empty when all is well."""
        found = [f"repetition {r} {trouble}" for r, trouble in self.problems().items()]
        records = self.records()
        for r in self.finished():
            if records[r].get("checksum") != _own_checksum(records[r]):
                found.append(f"repetition {r} has changed: its record does not match its own checksum")
            if checksum(self.weights_path(r)) != records[r]["xxh3_128"]:
                found.append(f"repetition {r} has changed: {self.weights_path(r).name} does not match its checksum")
        for name, known in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                found.append(f"{name} is missing")
            elif checksum(file) != known:
                found.append(f"{name} has changed: it does not match its checksum")
        return found + verify_reranker(self.path, self._key())

    def load(
        self, repetitions: Sequence[int] | None = None, *, skip_broken: bool = False, device: str = "cpu", rerank: bool = True
    ) -> Model:
        """Load a model: the given repetitions, or all that there should be, and the re-ranker if there is one and it is wanted.

        On the CPU weights are mapped, not read.

        Raises: ModelError naming each repetition that is missing or broken, or the re-ranker, unless those are to be skipped.
        """
        from mach.model import resolve_device

        problems = self.problems()
        finished = self.finished()
        wanted = list(repetitions) if repetitions is not None else sorted({*finished, *problems})
        bad = {r: problems.get(r, "is missing") for r in wanted if r not in finished}
        if bad and not skip_broken:
            texts = "; ".join(f"repetition {r} {trouble}" for r, trouble in bad.items())
            again = f"train again with --repetitions {format_repetitions(list(bad))}"
            raise ModelError(f"{self.path}: {texts}; {again}, or leave out with --skip-broken")
        place = resolve_device(device)
        given: dict[int, np.ndarray] = {}
        held = {r: packed for r in wanted if r in finished and (packed := self._load_one(r, place, skip_broken, given))}
        if not held:
            raise ModelError(f"{self.path}: holds no finished repetition yet; train one with `mach train`")
        names = self.label_names()
        return Model(
            config=self.config,
            sizes=self.sizes,
            table=self._table(list(held), names).with_given(given),
            repetitions=list(held.values()),
            device=place,
            vectorizer=self._vectorizer(),
            label_names=names,
            reranker=self._reranker(skip_broken) if rerank else None,
        )

    def _reranker(self, skip_broken: bool) -> Reranker | None:
        try:
            return load_reranker(self.path, self._key())
        except ModelError:
            if skip_broken:
                return None
            raise

    def label_names(self) -> Strings | None:
        """Give the K label names, or None if labels are only numbers."""
        if "label_names_offsets.npy" not in self.manifest["files"]:
            return None
        offsets, blob = (self._array(f"label_names_{part}.npy") for part in ("offsets", "blob"))
        return Strings(offsets, blob)

    def _array(self, name: str) -> np.ndarray:
        try:
            return map_array(self.path / name)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.path / name}: cannot be read ({error}); copy it from another part of this run") from error

    def _vectorizer(self) -> TextVectorizer | None:
        return TextVectorizer.load(self.path / "vectorizer") if "vectorizer/vectorizer.json" in self.manifest["files"] else None

    def _table(self, repetitions: Sequence[int], names: Sequence[str] | None) -> LabelTable:
        stored = dict(self.manifest["table"]) | {"repetitions": list(repetitions)}
        return LabelTable.from_dict(stored, label_names=names if self.config.family == "xxhash" else None)

    def _load_one(self, repetition: int, device: torch.device, skip_broken: bool, given: dict[int, np.ndarray]) -> Packed | None:
        """Load a repetition, and its buckets into `given` if it has learnt them; None if it is broken and that may be."""
        path = self.weights_path(repetition)
        try:
            parameters = load_file(path, device=str(device))
            if is_grouped(repetition, self.config.share_grouped(self.sizes.n_labels, self.sizes.labels_a_sample)):
                given[repetition] = parameters.pop(TABLE).cpu().numpy()
            return Packed.single(parameters, config=self.config, features=self.sizes.features)
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            if skip_broken:
                return None
            raise ModelError(f"{path}: repetition {repetition} is broken ({error}); delete it and train it again") from error

    def _key(self) -> str:
        """Give 16 hexadecimal digits that agree between the parts of one ensemble and between nothing else."""
        return str(self.manifest["key"])

    def _refuse_other(self, facts: Mapping[str, Any]) -> None:
        if self.manifest["data"] != facts["data"]:
            raise ModelError(
                f"{self.path}: was trained on another data set (fingerprint {self.manifest['data']}, this one has "
                f"{facts['data']}); choose another --out"
            )
        old, new = self.manifest["config"], facts["config"]
        differ = [f"{name}={old.get(name)!r} there, {new[name]!r} now" for name in new if old.get(name) != new[name]]
        if differ:
            raise ModelError(f"{self.path}: was made with other settings: {'; '.join(differ)}; choose another --out")
        if self.manifest["key"] != facts["key"]:
            raise ModelError(f"{self.path}: was made by a version of mach that hashes otherwise; choose another --out")

    def _write_manifest(self, manifest: Mapping[str, Any]) -> Run:
        whole = {**manifest, "checksum": _own_checksum(manifest)}
        write_json(self.path / MANIFEST, whole)
        return Run(self.path, whole)


def load(path: str | Path, *, device: str = "auto", skip_broken: bool = False, rerank: bool = True) -> Model:
    """Load a trained model from its run folder; see `Run.load`."""
    return Run.open(path).load(skip_broken=skip_broken, device=device, rerank=rerank)


def versions() -> dict[str, str]:
    """Give the versions that decide bits."""
    return {
        "mach": importlib.metadata.version("mach"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _facts(config: Config, dataset: Dataset, sizes: Sizes) -> dict[str, Any]:
    """Give the part of a manifest that every machine training this ensemble agrees on, and its key."""
    settings = config.to_dict()
    del settings["repetitions"]  # which of them are here may differ
    table = table_of(config, sizes, [0], dataset.label_names).to_dict()
    del table["repetitions"]
    facts = {
        "format": FORMAT,
        "config": settings,
        "sizes": {name: getattr(sizes, name) for name in Sizes.__slots__},
        "table": table,
        "data": dataset.fingerprint,
    }
    return facts | {"key": xxhash.xxh3_64_hexdigest(repr(facts).encode()), "versions": versions()}


def _refused(weights: Path, error: Exception) -> ModelError:
    return ModelError(f"{weights}: cannot be written ({error}); repetitions finished before are safe")


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(sorted((k, v) for k, v in manifest.items() if k != "checksum")).encode())


def _copy_shared(dataset: Dataset, run: Path) -> dict[str, str]:
    """Copy label names and vectorizer from the data set; give their checksums."""
    files = {}
    for name, known in dataset.manifest["files"].items():
        if name.startswith(("label_names_", "vectorizer/")):
            (run / name).parent.mkdir(exist_ok=True)
            with atomic(run / name) as temporary:
                shutil.copyfile(dataset.path / name, temporary)
            files[name] = known["xxh3_128"]
    return files


def parse_repetitions(text: str) -> list[int]:
    """Turn `8` (the first eight), `0-7` or `3,5,8-11` into repetition numbers.

    A bare number is a count; everything else names repetitions.
    Raises: ConfigError if it is none of these.
    """
    text = text.strip()
    if text.isdecimal():
        if not 1 <= int(text) <= MAX_REPETITIONS:
            raise ConfigError(f"repetitions={text} must be a count in [1, {MAX_REPETITIONS}]")
        return list(range(int(text)))
    numbers: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high) < MAX_REPETITIONS):
            raise ConfigError(
                f"repetitions={text!r} must be a count such as 8, a range such as 0-7 or 3-3, or numbers such as 3,5, "
                f"all below {MAX_REPETITIONS}"
            )
        numbers |= set(range(int(low), int(high) + 1))
    return sorted(numbers)


def format_repetitions(numbers: Sequence[int]) -> str:
    """Give rising repetition numbers as text that `parse_repetitions` reads back: `0-7`, `3-3` or `3,5`."""
    contiguous = list(range(numbers[0], numbers[-1] + 1)) == list(numbers)
    return f"{numbers[0]}-{numbers[-1]}" if contiguous else ",".join(map(str, numbers))
