"""Predictions on disk: a Parquet file of columns row, labels list<int64>, scores list<float32>, best label first.

A job writes row groups one by one as small finished files and joins them at the end, so a killed job goes on where it was,
and the file at `out` is whole or absent. Nothing of size N K, nor N k, is held.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mach.config import Estimator
from mach.data import Dataset, take
from mach.decoding import TopK
from mach.errors import DataError
from mach.files import atomic
from mach.model import Model

GROUP_ROWS = 8192  # samples of a row group, and of the work a killed job can lose
KEY = b"mach"
SCHEMA = pa.schema(
    [("row", pa.int64()), ("labels", pa.list_(pa.int64())), ("scores", pa.list_(pa.float32()))],
)


def write_predictions(
    model: Model,
    dataset: Dataset,
    split: str,
    out: str | Path,
    *,
    k: int,
    estimator: Estimator,
    run_key: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Predict every sample of a split into a Parquet file, going on from what an earlier, killed job left.

    Args:   run_key, what identifies the model; progress(rows done, rows in all).
    Raises: DataError if the data set does not fit the model or lacks the split, or `out` cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give the name of the file to write")
    if (dataset.n_labels, dataset.n_features) != (model.sizes.n_labels, model.sizes.n_features):
        raise DataError(
            f"{dataset.path}: has {dataset.n_features} features and {dataset.n_labels} labels, the model was trained on "
            f"{model.sizes.n_features} and {model.sizes.n_labels}"
        )
    samples = dataset.split(split)
    facts = {
        "run": run_key,
        "repetitions": list(model.table.repetitions),
        "data": dataset.fingerprint,
        "split": split,
        "n_samples": samples.n_samples,
        "k": k,
        "estimator": estimator,
    }
    schema = SCHEMA.with_metadata({KEY: json.dumps(facts).encode()})
    parts = out.with_name(out.name + ".parts")
    try:
        parts.mkdir(parents=True, exist_ok=True)
        files = []
        for start in range(0, samples.n_samples, GROUP_ROWS):
            rows = np.arange(start, min(start + GROUP_ROWS, samples.n_samples))
            files.append(parts / f"rows-{start:012d}.parquet")
            if not _is_of(files[-1], schema):
                top = model.predict_topk(take(samples.features, rows), k, estimator=estimator)
                with atomic(files[-1]) as temporary:
                    pq.write_table(_table(rows, top, schema), temporary)
            if progress:
                progress(int(rows[-1]) + 1, samples.n_samples)
        with atomic(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for file in files:
                writer.write_table(pq.read_table(file, schema=schema))
        shutil.rmtree(parts)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{out}: predictions cannot be written ({error}); run the same command again to go on") from error
    finally:
        with suppress(OSError):
            parts.rmdir()  # where nothing was written


def _is_of(file: Path, schema: pa.Schema) -> bool:
    """Tell whether a part is there, whole, and of this very job."""
    try:
        return bool((pq.read_schema(file).metadata or {}).get(KEY) == schema.metadata[KEY])
    except (OSError, pa.ArrowException):
        return False


def _table(rows: np.ndarray, top: TopK, schema: pa.Schema) -> pa.Table:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * top.labels.shape[1]
    labels = pa.ListArray.from_arrays(offsets, top.labels.ravel())
    scores = pa.ListArray.from_arrays(offsets, top.scores.ravel())
    return pa.Table.from_arrays([pa.array(rows), labels, scores], schema=schema)


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


def read_predictions(path: str | Path) -> Iterator[tuple[np.ndarray, TopK]]:
    """Yield (rows (n,), their TopK) a row group at a time."""
    with pq.ParquetFile(path) as file:
        for i in range(file.num_row_groups):
            table = file.read_row_group(i)
            rows = table["row"].to_numpy()
            labels, scores = (table[name].combine_chunks().flatten().to_numpy() for name in ("labels", "scores"))
            yield rows, TopK(labels.reshape(len(rows), -1), scores.reshape(len(rows), -1))
