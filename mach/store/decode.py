"""Scores of repetitions on disk -> one prediction file: what machines scored apart, one machine decodes.

Where only the best buckets of a repetition were kept, the others are taken at their bound. Estimators never fall when a bucket's
score rises, in floating point, too, so every label's score is at most what it gets this way, and exactly that if all its buckets
were kept. If that holds for all of the k best, they are the k best of full scores, to the bits: the row is certified.

Axes: N samples of a block, R repetitions, B buckets, k labels found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from mach.config import Estimator, Loss
from mach.data import Dataset, take
from mach.data.strings import Strings
from mach.decoding import TopK, decode_scores, estimator_for
from mach.decoding.estimators import bucket_scores
from mach.errors import ConfigError, DataError, ModelError
from mach.files import checksum, map_array
from mach.hashing import LabelTable
from mach.model import DEFAULT_ESTIMATOR, Model, chunk_rows
from mach.store.folder import Run, format_repetitions
from mach.store.predictions import Choice, Parts, check_fits, cuts, job_facts
from mach.store.scores import TABLE, Piece, read_piece

SAME = ("run", "data", "split", "n_samples", "n_shards", "n_buckets", "loss", "table", "names")
SLACK = np.float32(64 * 2.0**-23)  # transforms err by less than a tenth of it, relatively, so one may fall where outputs rise

Float32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pieces:
    """The scores of some repetitions for all shards of a split, in rising order of both."""

    repetitions: tuple[int, ...]
    shards: tuple[tuple[Piece, ...], ...]  # a tuple of R a shard

    @classmethod
    def find(cls, folders: Sequence[str | Path], repetitions: Sequence[int] | None = None) -> Pieces:
        """Find the pieces in some folders: of all repetitions of the ensemble, or of those given.

        Raises: DataError if there are none, they are of different jobs, or one is missing, broken or there twice.
        """
        found: dict[tuple[int, int], Piece] = {}
        for file in [file for folder in folders for file in sorted(Path(folder).glob("scores-*.json"))]:
            piece = read_piece(file)
            if repetitions is not None and piece.record["repetition"] not in repetitions:
                continue
            place = (piece.record["shard"], piece.record["repetition"])
            if place in found:
                raise DataError(f"{file}: {piece.name} is in {found[place].folder}, too; give each once")
            first = next(iter(found.values()), piece)
            for name in SAME:
                if first.record[name] != piece.record[name]:
                    raise DataError(
                        f"{file}: {name} is {piece.record[name]}, but {first.record[name]} in {first.folder}; decode scores of "
                        "one run, split and number of shards together"
                    )
            if trouble := piece.trouble():
                raise DataError(f"{piece.folder}: {trouble}; score {piece.name} again")
            found[place] = piece
        if not found:
            raise DataError(f"{', '.join(map(str, folders))}: holds no scores to decode; make them with `mach score`")
        every = next(iter(found.values())).record
        wanted = range(max(p.record["n_repetitions"] for p in found.values())) if repetitions is None else sorted(repetitions)
        missing = {r: [i for i in range(every["n_shards"]) if (i, r) not in found] for r in wanted}
        texts = [
            f"repetition {r}, shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))} of {every['n_shards']}"
            for r, shards in missing.items()
            if shards
        ]
        if texts:
            raise DataError(
                f"{', '.join(map(str, folders))}: lacks {'; '.join(texts)}; make them with `mach score`, or decode with some of "
                "the repetitions only (--repetitions)"
            )
        shards = tuple(tuple(found[i, r] for r in wanted) for i in range(every["n_shards"]))
        pieces = cls(tuple(wanted), shards)
        pieces._refuse_gaps()
        return pieces

    def _refuse_gaps(self) -> None:
        """Raise DataError unless the shards follow on each other, and each repetition's come from the same weights."""
        place = 0
        for shard in self.shards:
            for piece in shard:
                start, stop = piece.record["rows"]
                if start != place or stop != shard[0].record["rows"][1]:
                    raise DataError(f"{piece.folder}: {piece.name} was cut otherwise than the rest, at {start:,}; score it again")
            place = stop
        for r, all_of_one in zip(self.repetitions, zip(*self.shards, strict=True), strict=True):
            if len({piece.record["weights"] for piece in all_of_one}) > 1:
                raise DataError(f"{all_of_one[0].folder}: repetition {r} was trained again between its shards; score all again")

    @property
    def record(self) -> Mapping[str, Any]:
        """Give the record of one piece, for what all agree in."""
        return self.shards[0][0].record

    @property
    def top_buckets(self) -> dict[int, int]:
        """Give how many buckets were kept of a sample, at least, by the repetitions that did not keep all."""
        kept = [(p.record["repetition"], p.record["top_buckets"]) for shard in self.shards for p in shard]
        return {r: min(m for s, m in kept if s == r and m) for r in self.repetitions if any(m for s, m in kept if s == r)}

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Give the rows [start, stop) of each shard."""
        return [(shard[0].record["rows"][0], shard[0].record["rows"][1]) for shard in self.shards]

    def label_names(self) -> Strings | None:
        """Give the K label names, or None if labels are only numbers.

        Raises: DataError if their files have changed.
        """
        if not self.record["names"]:
            return None
        folder = self.shards[0][0].folder
        arrays = {}
        for name, known in self.record["names"].items():
            try:
                if checksum(folder / name) != known:
                    raise DataError(f"{folder / name}: has changed; copy it from the run folder")
                arrays[name] = map_array(folder / name)
            except OSError as error:
                raise DataError(f"{folder / name}: cannot be read ({error}); copy it from the run folder") from error
        return Strings(arrays["label_names_offsets.npy"], arrays["label_names_blob.npy"])

    def table(self, label_names: Sequence[str] | None) -> LabelTable:
        """Give the label table of the repetitions.

        Raises: DataError if one that was learnt has changed.
        """
        stored = dict(self.record["table"]) | {"repetitions": list(self.repetitions)}
        table = LabelTable.from_dict(stored, label_names=label_names if stored["family"] == "xxhash" else None)
        learnt = [piece for piece in self.shards[0] if TABLE in piece.record["files"]]
        for piece in learnt:
            if checksum(piece.file(TABLE)) != piece.record["files"][TABLE]["xxh3_128"]:
                raise DataError(f"{piece.file(TABLE)}: has changed; score {piece.name} again")
        return table.with_given({piece.record["repetition"]: piece.array(TABLE) for piece in learnt})


def decode(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    k: int | None = None,
    estimator: Estimator = DEFAULT_ESTIMATOR,
    repetitions: Sequence[int] | None = None,
    restrict: str | Path | None = None,
    exclude: str | Path | None = None,
    redo: tuple[Run, Dataset] | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Decode what `write_scores` wrote into a prediction file, going on from what an earlier, killed call left.

    From full scores the answer is that of `mach predict`. From the best buckets alone there is a column `certified`; a row where
    it is false holds the labels that could score most, and the most that they could score. Holds 64 MiB of bucket scores, or one
    sample's, and the results of a row group.

    Args:    restrict and exclude, files (`mach.data.lists`); redo, the run and the data set, to compute again, in full, the rows
             that are not certified; device, for that; progress(rows done, rows in all).
    Returns: how many rows there are, and how many are not certified.
    Raises:  DataError if pieces are missing, double, broken or of different jobs, or `out` cannot be written; ConfigError if the
             estimator needs full scores.
    """
    pieces = Pieces.find(folders, repetitions)
    record, names = pieces.record, pieces.label_names()
    table = pieces.table(names)
    kept = pieces.top_buckets
    if kept and record["loss"] == "softmax" and estimator not in ("logits", "log-probs"):
        raise ConfigError(
            f"estimator={estimator!r} needs full scores for the softmax loss, and of repetitions "
            f"{format_repetitions(list(kept))} only the best buckets were kept; take 'logits' or 'log-probs'"
        )
    choice = Choice.read(record["n_samples"], table.n_labels, names, restrict=restrict, exclude=exclude)
    k = choice.default_k(table.n_labels) if k is None else k
    choice.check(record["n_samples"], table.n_labels, k)
    model = None if redo is None or not kept else _model(*redo, pieces, device)
    facts = (
        job_facts(pieces.repetitions, record["data"], record["split"], record["n_samples"], k, estimator, record["run"])
        | choice.facts
    )
    if kept:
        facts |= {"top_buckets": {str(r): m for r, m in kept.items()}, "redo": model is not None}
    ends = [cuts(*rows) for rows in pieces.bounds]
    parts = Parts(Path(out), facts, (*(c for end in ends for c in end[:-1]), record["n_samples"]), with_certified=bool(kept))
    owner = np.repeat(np.arange(len(ends)), [len(end) - 1 for end in ends])
    job = _Job(table, k, record["loss"], estimator_for(table, estimator), choice)
    with parts.open():
        n_rows, checked = 0, -1
        left = set(parts.left())
        for part, shard in enumerate(owner):
            if part in left:
                if checked != shard:
                    _verify(pieces.shards[shard])
                    checked = int(shard)
                top, certified = job.decode(pieces.shards[shard], pieces.bounds[shard][0], parts.rows(part))
                if model is not None and redo is not None and not certified.all():
                    samples = redo[1].split(record["split"])
                    _redo(model, samples.features, parts.rows(part)[~certified], job, estimator, top, certified)
                parts.write(part, top, certified)
            n_rows += len(parts.rows(part))
            if progress:
                progress(n_rows, parts.n_rows)
    return record["n_samples"], n_uncertified(out) if kept else 0


def n_uncertified(path: str | Path) -> int:
    """Count the rows of a prediction file that are not certified."""
    with pq.ParquetFile(path) as file:
        columns = (file.read_row_group(i, columns=["certified"])["certified"] for i in range(file.num_row_groups))
        return sum(int(np.count_nonzero(~column.to_numpy())) for column in columns)


@dataclass(frozen=True)
class _Job:
    """How rows are decoded."""

    table: LabelTable
    k: int
    loss: Loss
    estimator: Estimator
    choice: Choice

    def decode(self, pieces: Sequence[Piece], first: int, rows: npt.NDArray[np.int64]) -> tuple[TopK, Bools]:
        """Decode some rows of a shard that begins at the row `first`; say which are certified."""
        n = chunk_rows(self.table.n_repetitions, self.table.n_buckets)
        arrays = [{part: piece.array(part) for part in piece.record["files"]} for piece in pieces]
        tops, certified = [], []
        for start in range(int(rows[0]), int(rows[-1]) + 1, n):
            stop = min(start + n, int(rows[-1]) + 1)
            block = [{part: array[start - first : stop - first] for part, array in each.items()} for each in arrays]
            only = self.choice.of(start, stop, self.table.n_labels, self.k)
            scores_NRB, known_NRB = upper_scores(block, self.table, self.loss, self.estimator)
            top = decode_scores(scores_NRB, self.table, self.k, estimator=self.estimator, **only)
            tops.append(top)
            certified.append(are_known(top, known_NRB, self.table))
        return TopK(np.concatenate([t.labels for t in tops]), np.concatenate([t.scores for t in tops])), np.concatenate(certified)


def upper_scores(
    block: Sequence[Mapping[str, npt.NDArray[Any]]], table: LabelTable, loss: Loss, estimator: Estimator
) -> tuple[Float32, Bools | None]:
    """Give what each bucket scores, at most, and which scores are exact, (N, R, B) both; None if all are.

    Args: block, the arrays of a piece (`mach.store.scores`) for each repetition of the table.
    """
    outputs_NRB = np.empty((len(block[0]["outputs"]), table.n_repetitions, table.n_buckets), np.float32)
    is_cut = ["buckets" in arrays for arrays in block]
    known_NRB = np.ones(outputs_NRB.shape, bool) if any(is_cut) else None
    for r, arrays in enumerate(block):
        if not is_cut[r] or known_NRB is None:
            outputs_NRB[:, r] = arrays["outputs"]
            continue
        buckets_Nm = arrays["buckets"].astype(np.int64)
        outputs_NRB[:, r] = arrays["bounds"][:, None]
        np.put_along_axis(outputs_NRB[:, r], buckets_Nm, arrays["outputs"], axis=1)
        known_NRB[:, r] = False
        np.put_along_axis(known_NRB[:, r], buckets_Nm, True, axis=1)
    if known_NRB is None or loss != "softmax" or estimator == "logits":
        bucket_scores(outputs_NRB, loss=loss, estimator=estimator, repetitions=table.repetitions)
        if known_NRB is not None and estimator != "logits":
            _raise_unknown(outputs_NRB, known_NRB, estimator)
        return outputs_NRB, known_NRB
    for r, arrays in enumerate(block):
        if is_cut[r]:
            outputs_NRB[:, r] = (outputs_NRB[:, r] - arrays["outputs"][:, :1]) - arrays["totals"][
                :, None
            ]  # as bucket_scores does
        else:
            alone_N1B = outputs_NRB[:, r : r + 1].copy()
            outputs_NRB[:, r : r + 1] = bucket_scores(
                alone_N1B, loss=loss, estimator=estimator, repetitions=table.repetitions[r : r + 1]
            )
    return outputs_NRB, known_NRB


def _raise_unknown(scores_NRB: Float32, known_NRB: Bools, estimator: Estimator) -> None:
    """Raise what stands for unknown scores above anything that an output at most as great transforms to."""
    R, B = scores_NRB.shape[1:]
    shift = np.float32(1 / ((B - 1) * R) if estimator == "mean" else 0)
    for r in range(R):
        unknown_NB = ~known_NRB[:, r]
        unknown = scores_NRB[:, r][unknown_NB]
        scores_NRB[:, r][unknown_NB] = np.nextafter(unknown + SLACK * (abs(unknown) + shift), np.float32(np.inf))


def are_known(top: TopK, known_NRB: Bools | None, table: LabelTable) -> Bools:
    """Tell of each sample whether all buckets of all its labels are known, (N,)."""
    N = len(top.labels)
    if known_NRB is None:
        return np.ones(N, bool)
    samples = np.arange(N)[:, None]
    certified = np.ones(N, bool)
    for r in range(table.n_repetitions):
        certified &= known_NRB[samples, r, table.buckets(top.labels, r)].all(axis=1)
    return certified


def _verify(pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if trouble := piece.trouble(by_checksum=True):
            raise DataError(f"{piece.folder}: {trouble}; score {piece.name} again")


def _model(run: Run, dataset: Dataset, pieces: Pieces, device: str) -> Model:
    """Load the model that scored, to score in full.

    Raises: ModelError or DataError if it is another, or was trained again since.
    """
    record = pieces.record
    if run.manifest["key"] != record["run"]:
        raise ModelError(f"{run.path}: is run {run.manifest['key']}, the scores are of {record['run']}; give the run that scored")
    if dataset.fingerprint != record["data"]:
        raise DataError(f"{dataset.path}: is data {dataset.fingerprint}, the scores are of {record['data']}")
    model = run.load(pieces.repetitions, device=device, rerank=False)
    records = run.records()
    for piece in (piece for shard in pieces.shards for piece in shard):
        r = piece.record["repetition"]
        if records[r]["xxh3_128"] != piece.record["weights"]:
            raise ModelError(f"{run.path}: repetition {r} was trained again since {piece.name} was scored; score it again")
    check_fits(model, dataset)
    return model


def _redo(
    model: Model, features: Any, rows: npt.NDArray[np.int64], job: _Job, estimator: Estimator, top: TopK, certified: Bools
) -> None:
    """Replace the answers of the rows that are not certified by those of full scores."""
    lists = [job.choice.of(int(row), int(row) + 1, job.table.n_labels, job.k) for row in rows]
    only: dict[str, Any] = {"restrict": job.choice.restrict}
    if job.choice.exclude is not None:
        only["exclude"] = [each["exclude"][0] for each in lists]
    found = model.predict_topk(take(features, rows), job.k, estimator=estimator, **only)
    top.labels[~certified], top.scores[~certified] = found.labels, found.scores
    certified[:] = True
