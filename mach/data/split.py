"""Make a dev split of a part of train: `mach split`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mach.data.alike import alike_groups
from mach.data.csr import CSR, take, take_rows
from mach.data.dataset import MANIFEST, Dataset, Split, read_manifest
from mach.data.writer import DatasetWriter, SplitWriter, reporting_os_errors, writing_dataset
from mach.errors import ConfigError, DataError

By = Literal["samples", "alike"]
Progress = Callable[[int, int], None]  # samples done, samples in all
_ROWS_AT_ONCE = 1 << 14


def split_dev(
    dataset: Dataset,
    out: str | Path,
    *,
    share: float = 0.1,
    by: By = "samples",
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """Write a data set like another whose dev split is a part of its train split; test is the same.

    Settings chosen on dev are as good as dev is like what is to come. `samples` draws it at random, as when more of the same
    comes. `alike` draws whole groups of look-alikes (see `mach.data.alike`), as when what comes is new: versions and siblings of
    a document are then all in train or all in dev.

    Args:    out, absent or empty, or already made of the very same data with these arguments, when it is returned at once;
             share, of train's samples, in (0, 1); seed, of the draw; progress, called with (samples done, samples in all).
    Returns: the data set, opened; a sample's place among those of its split is as it was.
    Raises:  ConfigError if an argument is out of range; DataError if there is a dev split already, features are dense for
             `alike`, train is too small or too much alike to be split so, or the path cannot be written.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share={share} must lie in (0, 1)")
    if by not in ("samples", "alike"):
        raise ConfigError(f"by={by!r} must be 'samples' or 'alike'")
    stamp = {"split_of": dataset.fingerprint, "share": share, "by": by, "seed": seed}
    if (Path(out) / MANIFEST).is_file() and read_manifest(Path(out)).get("made_from") == stamp:
        return Dataset.open(out)
    if "dev" in dataset.split_names:
        raise DataError(f"{dataset.path}: has a dev split already, of {dataset.split('dev').n_samples} samples")
    train = dataset.split("train")
    in_dev = _drawn(dataset, train, share, by, np.random.default_rng(seed))
    rows = {"train": np.flatnonzero(~in_dev), "dev": np.flatnonzero(in_dev)}
    parts = [(train, name, rows[name]) for name in ("train", "dev")]
    if "test" in dataset.split_names:
        test = dataset.split("test")
        parts.append((test, "test", np.arange(test.n_samples)))
    done, total = 0, sum(len(each) for _, _, each in parts)
    with writing_dataset(Path(out)) as writer:
        for source, name, wanted in parts:
            for low in range(0, len(wanted), _ROWS_AT_ONCE):
                _copy(source, wanted[low : low + _ROWS_AT_ONCE], writer.split(name))
                done += len(wanted[low : low + _ROWS_AT_ONCE])
                if progress is not None:
                    progress(done, total)
        _copy_the_rest(dataset, writer)
        writer.finish(dataset.n_features, dataset.n_labels, stamp)
    return Dataset.open(out)


def _drawn(dataset: Dataset, train: Split, share: float, by: By, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draw what dev gets: whole groups in random order, until they are enough, without those too large."""
    n, wanted = train.n_samples, max(1, round(share * train.n_samples))
    group_N = np.arange(n)
    if by == "alike":
        if not isinstance(train.features, CSR):
            raise DataError(f"{dataset.path}: look-alikes are told by sparse features, these are dense; split by samples")
        group_N = alike_groups(train.features)
    sizes, largest = np.bincount(group_N, minlength=n), min(wanted, max(10, wanted // 10))  # larger ones would speak for all
    order = rng.permutation(np.flatnonzero(sizes))
    order = order[sizes[order] <= largest]
    chosen = order[: int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1]
    in_dev = np.zeros(n, bool)
    in_dev[chosen] = True
    in_dev = in_dev[group_N]
    if not wanted / 2 <= in_dev.sum() < n:
        raise DataError(
            f"{dataset.path}: {wanted} of {n} training samples were wanted for dev, {in_dev.sum()} can be had in whole groups of "
            f"at most {largest} (there are {len(np.unique(group_N))} groups, the largest of {sizes.max()}): "
            "give another share, or split by samples"
        )
    return in_dev


def _copy(source: Split, rows: npt.NDArray[np.int64], writer: SplitWriter) -> None:
    writer.append_features(take(source.features, rows))
    writer.append_labels(take_rows(source.labels, rows))
    if source.text is not None:
        writer.append_text([source.text[int(row)] for row in rows])


def _copy_the_rest(dataset: Dataset, writer: DatasetWriter) -> None:
    """Copy label names, and what turned text into features."""
    with reporting_os_errors(writer.folder):
        for file in dataset.manifest["files"]:
            top = file.split("/")[0]
            if top not in dataset.split_names:
                (writer.folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(dataset.path / file, writer.folder / file)
