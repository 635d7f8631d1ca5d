"""Predictions on disk: a Parquet file of columns row, labels list<int64>, scores list<float32>, best label first.

A job writes row groups one by one as small finished files, its parts, in any order and by any number of processes, and joins
them at the end, so a killed job goes on where it was, and the file at `out` is whole or absent. Nothing of size N K, nor N k, is
held. One file, not a folder of parts: it is what `mach evaluate` and other readers have always been given, and joining copies it
once.

Rows of `mach decode` from truncated scores have one more column, `certified` (bool): whether the row is proved to be the answer
of full scores. Rows of a calibrated job have a column `probabilities` (list<float32>), and may hold fewer than k labels: those
that it keeps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from mach.config import Estimator
from mach.data import Dataset, Split, take
from mach.data.lists import LabelLists, Names, read_labels
from mach.decoding import TopK
from mach.errors import DataError
from mach.files import atomic, clear_leftovers
from mach.model import DEFAULT_ESTIMATOR, Model
from mach.store.calibration import Trust

GROUP_ROWS = 8192  # samples of a row group, and of the work a killed job can lose
KEY = b"mach"
SCHEMA = pa.schema(
    [("row", pa.int64()), ("labels", pa.list_(pa.int64())), ("scores", pa.list_(pa.float32()))],
)
CERTIFIED = pa.field("certified", pa.bool_())
PROBABILITIES = pa.field("probabilities", pa.list_(pa.float32()))


@dataclass(frozen=True)
class Choice:
    """Which labels a job may find: a subset for all samples, and for each sample all but some. Read from files."""

    restrict: npt.NDArray[np.int64] | None = None
    exclude: LabelLists | None = None

    @classmethod
    def read(
        cls,
        n_samples: int,
        n_labels: int,
        label_names: Sequence[str] | None,
        *,
        restrict: str | Path | None = None,
        exclude: str | Path | None = None,
    ) -> Choice:
        """Read the files that say so, where there are any; see `mach.data.lists`.

        Raises: DataError naming the file, and the line where there is one.
        """
        names = Names(n_labels, label_names)
        lists = None if exclude is None else LabelLists(exclude, n_samples, names)
        return cls(None if restrict is None else read_labels(restrict, names), lists)

    @property
    def facts(self) -> dict[str, str]:
        """Give what identifies the choice; nothing if it leaves all labels."""
        found = {} if self.restrict is None else {"restrict": xxhash.xxh3_128_hexdigest(self.restrict.tobytes())}
        return found if self.exclude is None else found | {"exclude": self.exclude.key}

    def default_k(self, n_labels: int) -> int:
        """Give how many labels a sample gets if nobody says: 100, or all there are."""
        return min(100, n_labels if self.restrict is None else len(self.restrict))

    def check(self, n_samples: int, n_labels: int, k: int) -> None:
        """Read all there is once, so that a mistake in a late line does not end a long job; see `of`."""
        if self.exclude is not None:
            for start in range(0, n_samples, GROUP_ROWS):
                self.of(start, min(start + GROUP_ROWS, n_samples), n_labels, k)

    def of(self, start: int, stop: int, n_labels: int, k: int) -> dict[str, Any]:
        """Give `restrict` and `exclude` of the samples [start, stop), as decoding takes them.

        Raises: DataError naming file and line where a word is no label, or fewer than k labels are left to a sample.
        """
        if self.exclude is None:
            return {"restrict": self.restrict}
        lists = self.exclude.rows(start, stop)
        n_allowed = n_labels if self.restrict is None else len(self.restrict)
        for sample, labels in enumerate(lists, start):
            n_out = len(labels) if self.restrict is None else int(np.isin(labels, self.restrict, assume_unique=True).sum())
            if k > n_allowed - n_out:
                raise DataError(f"{self.exclude.where(sample)}: leaves {n_allowed - n_out} labels to find k={k} among")
        return {"restrict": self.restrict, "exclude": lists}


@dataclass(frozen=True)
class Parts:
    """A prediction file in the making: the rows [cuts[i], cuts[i + 1]) are its row group i, and a file in a folder beside it."""

    out: Path
    facts: Mapping[str, Any]
    cuts: tuple[int, ...]
    with_certified: bool = False
    trust: Trust | None = None  # where probabilities are written, too

    @cached_property
    def folder(self) -> Path:
        """Give where finished parts lie until they are joined."""
        return self.out.with_name(self.out.name + ".parts")

    @cached_property
    def schema(self) -> pa.Schema:
        """Give the columns, and the facts as metadata."""
        schema = SCHEMA if self.trust is None else SCHEMA.append(PROBABILITIES)
        schema = schema.append(CERTIFIED) if self.with_certified else schema
        return schema.with_metadata({KEY: json.dumps(self.facts).encode()})

    @property
    def n_rows(self) -> int:
        """Give the rows of the file."""
        return self.cuts[-1]

    def file(self, part: int) -> Path:
        """Give where a part lies."""
        return self.folder / f"rows-{self.cuts[part]:012d}.parquet"

    def rows(self, part: int) -> npt.NDArray[np.int64]:
        """Give the rows of a part."""
        return np.arange(self.cuts[part], self.cuts[part + 1])

    def left(self) -> list[int]:
        """Give the parts that are not finished: absent, or not whole.

        Raises: DataError if there are parts of another job, which are somebody's work: says what differs.
        """
        n_rows = {file: self._n_rows(file) for file in self.folder.glob("rows-*.parquet")}
        return [part for part in range(len(self.cuts) - 1) if n_rows.get(self.file(part)) != len(self.rows(part))]

    def write(self, part: int, top: TopK, certified: npt.NDArray[np.bool_] | None = None) -> None:
        """Write a part, whole or not at all."""
        lists: list[npt.NDArray[Any]] = [top.labels, top.scores]
        is_kept_Nk = np.ones(top.labels.shape, bool)
        if self.trust is not None:
            probabilities = self.trust.calibration.probabilities(top.scores)
            lists, is_kept_Nk = [*lists, probabilities], self.trust.keep(top.scores, probabilities)
        offsets = np.concatenate([[0], np.cumsum(is_kept_Nk.sum(1))]).astype(np.int32)
        columns = [pa.array(self.rows(part)), *(pa.ListArray.from_arrays(offsets, each[is_kept_Nk]) for each in lists)]
        columns += [pa.array(certified)] if self.with_certified else []
        with atomic(self.file(part)) as temporary:
            pq.write_table(pa.Table.from_arrays(columns, schema=self.schema), temporary)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder for a block that writes what is left; then join the parts, a row group at a time, into the file.

        A block that ends with an error leaves its finished parts.
        Raises: DataError if the file or the folder cannot be written.
        """
        if self.out.is_dir():
            raise DataError(f"{self.out}: is a folder; give the name of the file to write")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)
            yield
            with atomic(self.out) as temporary, pq.ParquetWriter(temporary, self.schema) as writer:
                for part in range(len(self.cuts) - 1):
                    writer.write_table(pq.read_table(self.file(part), schema=self.schema))
            shutil.rmtree(self.folder)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.out}: predictions cannot be written ({error}); run the same command again to go on"
            ) from error
        finally:
            with suppress(OSError):
                self.folder.rmdir()  # where nothing was written

    def _n_rows(self, file: Path) -> int:
        """Give the rows of a part, -1 if it is not whole; refuse one of another job."""
        try:
            found = pq.read_metadata(file)
            facts = json.loads(found.metadata[KEY])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return -1
        names = [name for name in {**facts, **self.facts} if facts.get(name) != self.facts.get(name)]
        if names:
            differ = "; ".join(f"{name}={facts.get(name)} there, {self.facts.get(name)} now" for name in names)
            raise DataError(
                f"{self.folder}: holds finished parts of another job ({differ}); finish that with its settings, delete the "
                "folder, or choose another --out"
            )
        return int(found.num_rows)


def plan(
    model: Model, dataset: Dataset, split: str, out: str | Path, *, k: int, estimator: Estimator, run_key: str, choice: Choice,
    trust: Trust | None = None,
) -> Parts:  # fmt: skip
    """Plan the prediction of every sample of a split.

    Raises: DataError if the data set does not fit the model or lacks the split, or a line of the choice is wrong.
    """
    check_fits(model, dataset)
    n_samples = dataset.split(split).n_samples
    choice.check(n_samples, model.sizes.n_labels, k)
    facts = job_facts(model.table.repetitions, dataset.fingerprint, split, n_samples, k, estimator, run_key) | choice.facts
    if model.reranker is not None and estimator == DEFAULT_ESTIMATOR:
        facts["reranker"] = model.reranker.key
    if model.products is not None:
        facts["products"] = str(model.products)
    facts |= {} if trust is None else trust.facts
    return Parts(Path(out), facts, cuts(0, n_samples), trust=trust)


def check_fits(model: Model, dataset: Dataset) -> None:
    """Raise DataError unless a data set has the features and labels of a model."""
    if (dataset.n_labels, dataset.n_features) != (model.sizes.n_labels, model.sizes.n_features):
        raise DataError(
            f"{dataset.path}: has {dataset.n_features} features and {dataset.n_labels} labels, the model was trained on "
            f"{model.sizes.n_features} and {model.sizes.n_labels}"
        )


def job_facts(
    repetitions: Sequence[int], data: str, split: str, n_samples: int, k: int, estimator: Estimator, run_key: str
) -> dict[str, Any]:
    """Give what identifies the predictions of all labels of a split's samples: kept in the file, and compared on going on."""
    return {
        "run": run_key,
        "repetitions": list(repetitions),
        "data": data,
        "split": split,
        "n_samples": n_samples,
        "k": k,
        "estimator": estimator,
    }


def cuts(start: int, stop: int) -> tuple[int, ...]:
    """Cut rows into groups, from the start of the first to the end of the last."""
    return (*range(start, stop, GROUP_ROWS), stop)


def write_predictions(
    model: Model,
    dataset: Dataset,
    split: str,
    out: str | Path,
    *,
    k: int,
    estimator: Estimator,
    run_key: str,
    choice: Choice | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Predict every sample of a split into a Parquet file, going on from what an earlier, killed job left.

    Args:   run_key, what identifies the model; choice, which labels may be found; progress(rows done, rows in all).
    Raises: DataError if the data set does not fit the model or lacks the split, `out` cannot be written, or parts of another
            job lie there.
    """
    choice = choice or Choice()
    parts = plan(model, dataset, split, out, k=k, estimator=estimator, run_key=run_key, choice=choice)
    with parts.open():
        left = parts.left()
        n_done = parts.n_rows - sum(len(parts.rows(part)) for part in left)
        for rows in write_parts(model, dataset.split(split), parts, left, choice):
            n_done += rows
            if progress:
                progress(n_done, parts.n_rows)


def write_parts(model: Model, samples: Split, parts: Parts, some: Iterable[int], choice: Choice) -> Iterator[int]:
    """Predict and write some of the parts; yield how many rows each had, once it is written."""
    k, estimator = parts.facts["k"], parts.facts["estimator"]
    for part in some:
        rows = parts.rows(part)
        only = choice.of(parts.cuts[part], parts.cuts[part + 1], model.sizes.n_labels, k)
        parts.write(part, model.predict_topk(take(samples.features, rows), k, estimator=estimator, **only))
        yield len(rows)


def read_facts(path: str | Path) -> Mapping[str, Any]:
    """Give what a prediction file says of itself: run, data, split, k, estimator.

    Raises: DataError if it is not such a file.
    """
    try:
        facts: Mapping[str, Any] = json.loads((pq.read_schema(path).metadata or {})[KEY])
        return facts
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file; make it with `mach predict`") from error
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(f"{path}: is not a prediction file of `mach predict` (Parquet with row, labels, scores)") from error


@dataclass(frozen=True, slots=True)
class Group:
    """A row group of a prediction file; a list that ends early goes on with label -1, score -inf and probability 0."""

    rows: npt.NDArray[np.int64]  # (n,)
    top: TopK  # (n, k)
    probabilities: npt.NDArray[np.float32] | None  # (n, k), of a calibrated job


def read_groups(path: str | Path) -> Iterator[Group]:
    """Yield what a prediction file says, a row group at a time."""
    k = read_facts(path)["k"]
    with pq.ParquetFile(path) as file:
        for i in range(file.num_row_groups):
            table = file.read_row_group(i)
            labels, scores = (_padded(table[name], k, end) for name, end in (("labels", -1), ("scores", -np.inf)))
            has_more = PROBABILITIES.name in table.column_names
            probabilities = _padded(table[PROBABILITIES.name], k, 0) if has_more else None
            yield Group(table["row"].to_numpy(), TopK(labels, scores), probabilities)


def _padded(column: pa.ChunkedArray, k: int, end: float) -> np.ndarray:
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy()
    padded_Nk = np.full((len(lists), k), end, values.dtype)
    padded_Nk[np.arange(k) < lists.value_lengths().to_numpy()[:, None]] = values
    return padded_Nk


def read_predictions(path: str | Path) -> Iterator[tuple[np.ndarray, TopK]]:
    """Yield (rows (n,), their TopK) a row group at a time; see `Group` for lists that end early."""
    for group in read_groups(path):
        yield group.rows, group.top
