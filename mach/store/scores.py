"""What one repetition says of one shard of samples, on disk: what one machine produces, and another decodes with the rest.

    scores-003.0-of-4.json          repetition 3, shard 0 of 4: run, data, rows, sizes, label table, checksums; written last
    scores-003.0-of-4.outputs.npy   the head's raw outputs, float32 (N, B), from which every estimator's scores are made
    label_names_*.npy               as in the run folder

    scores-003.0-of-4.table.npy     where the repetition has learnt its label table, its buckets (K,)

Or only the m best buckets of each sample, and what the others do not exceed:

    scores-003.0-of-4.outputs.npy   the m greatest outputs, falling, float32 (N, m)
    scores-003.0-of-4.buckets.npy   their buckets, the smallest unsigned type (N, m)
    scores-003.0-of-4.bounds.npy    the (m + 1)-th output, float32 (N,)
    scores-003.0-of-4.totals.npy    for the softmax loss, log sum exp(z - max z) over all buckets, float32 (N,)

A folder holds any number of these; folders of several machines are decoded together, or their files copied into one.

Axes: N samples of a shard, B buckets, m buckets kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from mach.config import Loss
from mach.data import Dataset, take
from mach.decoding.estimators import bucket_scores
from mach.decoding.topk import topk_identity
from mach.errors import ConfigError, DataError
from mach.files import atomic, checksum, clear_leftovers, map_array, read_json, write_json
from mach.hashing.table import bucket_dtype
from mach.model import Model
from mach.store.folder import Run, versions
from mach.store.predictions import check_fits, cuts

FORMAT = 1
TABLE = "table"  # the name of the array that is not of samples

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """One repetition's scores of one shard, as a record says that they lie in a folder."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name the piece for people."""
        return f"repetition {self.record['repetition']}, shard {self.record['shard']}/{self.record['n_shards']}"

    def file(self, part: str) -> Path:
        """Give where an array lies."""
        return _file(self.folder, self.record, f"{part}.npy")

    def array(self, part: str) -> npt.NDArray[Any]:
        """Map an array.

        Raises: DataError if it cannot be mapped.
        """
        try:
            return map_array(self.file(part))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.file(part)}: cannot be mapped ({error}); score {self.name} again") from error

    def trouble(self, *, by_checksum: bool = False) -> str:
        """Say what is wrong with the arrays, in their sizes or in every byte; nothing if all is well."""
        for part, known in self.record["files"].items():
            file = self.file(part)
            if not file.is_file():
                return f"{file.name} is missing"
            if file.stat().st_size != known["bytes"]:
                return f"{file.name} has {file.stat().st_size} bytes instead of {known['bytes']}"
            if by_checksum and checksum(file) != known["xxh3_128"]:
                return f"{file.name} has changed"
        return ""


def write_scores(
    run: Run,
    dataset: Dataset,
    out: str | Path,
    *,
    split: str,
    repetition: int,
    shard: tuple[int, int] = (0, 1),
    top_buckets: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Piece:
    """Write one repetition's scores of shard i of n of a split; what is there already stays.

    Outputs are computed in products of the shapes that `mach predict` of all the run's repetitions takes, so that both decode to
    the same bits, where shards are whole row groups (see `shard_rows`).

    Args:   shard, (i, n), i from 0; top_buckets, m: keep the m best buckets of each sample only; progress(rows done, in all).
    Raises: ConfigError if the shard, or m, is out of range; ModelError if the repetition is not there; DataError if the data set
            does not fit, or the folder holds this piece made in another way, or cannot be written.
    """
    out = Path(out)
    samples, n_buckets = dataset.split(split), run.sizes.n_buckets
    if top_buckets is not None and not 1 <= top_buckets < n_buckets:
        raise ConfigError(f"top_buckets={top_buckets} must lie in [1, {n_buckets}), the number of buckets")
    start, stop = shard_rows(samples.n_samples, *shard)
    model = run.load([repetition], device=device)
    check_fits(model, dataset)
    record = _record(run, model, dataset, split, repetition, shard, (start, stop), samples.n_samples, top_buckets)
    if there := _there(out, record):
        return there
    try:
        out.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out, prefix=_stem(record))
        for name in run.manifest["files"]:
            if name.startswith("label_names_") and not (out / name).exists():
                with atomic(out / name) as temporary:
                    shutil.copyfile(run.path / name, temporary)
        _file(out, record, "json").unlink(missing_ok=True)  # a record never speaks of other arrays
        sums = _write_arrays(out, record, model, samples.features, progress)
        whole = record | {"files": sums, "versions": versions()}
        write_json(_file(out, record, "json"), whole | {"checksum": _own_checksum(whole)})
    except OSError as error:
        raise DataError(f"{out}: scores cannot be written ({error}); run the same command again") from error
    return Piece(out, whole)


def read_piece(file: Path) -> Piece:
    """Read a record.

    Raises: DataError if it is broken, or of another format.
    """
    try:
        record = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); delete it and score this piece again") from error
    if record.get("format") != FORMAT:
        raise DataError(f"{file}: has score format {record.get('format')}, this version of mach reads format {FORMAT}")
    if record.get("checksum") != _own_checksum(record):
        raise DataError(f"{file}: does not match its own checksum; delete it and score this piece again")
    return Piece(file.parent, record)


def parse_shard(text: str) -> tuple[int, int]:
    """Turn `0/4` into (0, 4): the first of four shards.

    Raises: ConfigError if it is no such text.
    """
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ConfigError(f"shard={text!r} must be i/n with i from 0 to n - 1, such as 0/4 for the first of four")
    return int(i), int(n)


def shard_rows(n_samples: int, i: int, n: int) -> tuple[int, int]:
    """Give the samples [start, stop) of shard i of n: whole row groups where there are n of them, else an equal share.

    Raises: ConfigError if i is outside [0, n).
    """
    if not 0 <= i < n:
        raise ConfigError(f"shard={i}/{n} must be i/n with i from 0 to n - 1")
    ends = cuts(0, n_samples)
    n_groups = len(ends) - 1
    if n_groups < n:
        return i * n_samples // n, (i + 1) * n_samples // n
    return ends[i * n_groups // n], ends[(i + 1) * n_groups // n]


def kept_arrays(outputs_NB: Float32, top_buckets: int | None, loss: Loss) -> dict[str, npt.NDArray[Any]]:
    """Give what is kept of the outputs of some samples: everything, or the m best buckets and what bounds the others."""
    if top_buckets is None:
        return {"outputs": outputs_NB}
    top = topk_identity(outputs_NB, top_buckets + 1)
    kept: dict[str, npt.NDArray[Any]] = {
        "outputs": top.scores[:, :-1],
        "buckets": top.labels[:, :-1],
        "bounds": top.scores[:, -1],
    }
    if loss != "softmax":
        return kept
    logs_N1B = bucket_scores(outputs_NB[:, None].copy(), loss=loss, estimator="log-probs")
    return kept | {"totals": -logs_N1B[np.arange(len(logs_N1B)), 0, top.labels[:, 0]]}


def _record(
    run: Run, model: Model, dataset: Dataset, split: str, repetition: int, shard: tuple[int, int], rows: tuple[int, int],
    n_samples: int, top_buckets: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Give what a piece is, before what its files are."""
    table = model.table.to_dict()
    del table["repetitions"]
    return {
        "format": FORMAT,
        "run": run.manifest["key"],
        "repetition": repetition,
        "n_repetitions": max(run.manifest["repetitions"], repetition + 1),
        "weights": run.records()[repetition]["xxh3_128"],
        "data": dataset.fingerprint,
        "split": split,
        "n_samples": n_samples,
        "shard": shard[0],
        "n_shards": shard[1],
        "rows": list(rows),
        "n_buckets": model.sizes.n_buckets,
        "top_buckets": top_buckets,
        "loss": model.config.loss,
        "table": table,
        "names": {name: known for name, known in run.manifest["files"].items() if name.startswith("label_names_")},
    }


def _write_arrays(
    out: Path, record: Mapping[str, Any], model: Model, features: Any, progress: Callable[[int, int], None] | None
) -> dict[str, dict[str, Any]]:
    """Write the arrays of a piece side by side, some rows at a time; give their sizes and checksums."""
    (start, stop), top_buckets, loss = record["rows"], record["top_buckets"], record["loss"]
    parts, n_done = _parts(record["n_buckets"], top_buckets, loss), 0
    with ExitStack() as whole:
        temporaries = {part: whole.enter_context(atomic(_file(out, record, f"{part}.npy"))) for part in parts}
        given = model.table.given.get(record["repetition"])
        with ExitStack() as opened:
            files = {part: opened.enter_context(open(path, "wb")) for part, path in temporaries.items()}
            for part, (width, dtype) in parts.items():
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(files[part], header | {"shape": (stop - start, *width)})
            for outputs_NB in _outputs(model, features, (start, stop), record["n_repetitions"]):
                for part, array in kept_arrays(outputs_NB, top_buckets, loss).items():
                    files[part].write(np.ascontiguousarray(array, parts[part][1]).tobytes())
                n_done += len(outputs_NB)
                if progress:
                    progress(n_done, stop - start)
        if given is not None:
            temporaries[TABLE] = whole.enter_context(atomic(_file(out, record, f"{TABLE}.npy")))
            with open(temporaries[TABLE], "wb") as file:
                np.save(file, given, allow_pickle=False)
        return {part: {"bytes": path.stat().st_size, "xxh3_128": checksum(path)} for part, path in temporaries.items()}


def _there(out: Path, record: Mapping[str, Any]) -> Piece | None:
    """Give the piece if it is there; refuse one of another kind."""
    file = _file(out, record, "json")
    if not file.exists():
        return None
    piece = read_piece(file)
    differ = [name for name in record if piece.record.get(name) != record[name]]
    if differ:
        texts = "; ".join(f"{name}={piece.record.get(name)} there, {record[name]} now" for name in differ)
        raise DataError(f"{file}: is of another job ({texts}); delete it, or choose another --out")
    return None if piece.trouble() else piece


def _parts(n_buckets: int, top_buckets: int | None, loss: str) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Give the arrays of a piece: what follows N in the shape, and the type."""
    real = np.dtype(np.float32)
    if top_buckets is None:
        return {"outputs": ((n_buckets,), real)}
    parts = {"outputs": ((top_buckets,), real), "buckets": ((top_buckets,), bucket_dtype(n_buckets)), "bounds": ((), real)}
    return parts | {"totals": ((), real)} if loss == "softmax" else parts


def _outputs(model: Model, features: Any, rows: tuple[int, int], n_repetitions: int) -> Iterator[Float32]:
    """Yield the outputs of the one repetition, (N, B), as many rows at a time as predicting with all of them would."""
    for start, stop in pairwise(cuts(*rows)):
        for chunk in model.row_chunks(model.features_of(take(features, np.arange(start, stop))), n_repetitions):
            outputs_N1B = model.bucket_logits(chunk)
            bucket_scores(outputs_N1B, loss=model.config.loss, estimator="logits", repetitions=model.table.repetitions)  # finite
            yield outputs_N1B[:, 0]


def _stem(record: Mapping[str, Any]) -> str:
    return f"scores-{record['repetition']:03d}.{record['shard']}-of-{record['n_shards']}."


def _file(folder: Path, record: Mapping[str, Any], end: str) -> Path:
    return folder / (_stem(record) + end)


def _own_checksum(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(sorted((k, v) for k, v in record.items() if k != "checksum")).encode())
