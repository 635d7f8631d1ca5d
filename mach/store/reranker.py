"""The re-ranker in a run folder: `reranker.safetensors`, and `reranker.json`, written last: with it, it is finished.

Tensors: indptr int64 (K + 1,), features int32 (nnz,), values bfloat16 (nnz,), bias float32 (K,). The record says depth, weight
and number of features, how it was fitted, size and checksum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from safetensors.torch import load_file, save_file

from mach.decoding.rerank import Reranker
from mach.errors import ModelError
from mach.files import atomic, checksum, read_json, write_json
from mach.kernels import array_of

WEIGHTS = "reranker.safetensors"
RECORD = "reranker.json"
AGAIN = "fit it again with `mach rerank`, or delete it"


def save_reranker(folder: Path, key: str, reranker: Reranker, facts: Mapping[str, Any]) -> None:
    """Store a re-ranker in the run folder of the key: its weights, then the record that makes it count.

    Raises: ModelError if the disk refuses.
    """
    weights, record = folder / WEIGHTS, folder / RECORD
    tensors = {
        "indptr": torch.from_numpy(reranker.indptr),
        "features": torch.from_numpy(reranker.features),
        "values": torch.from_numpy(reranker.values.view("int16")).view(torch.bfloat16),
        "bias": torch.from_numpy(reranker.bias),
    }
    try:
        record.unlink(missing_ok=True)
        with atomic(weights) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", "run": key})
        known = {
            "run": key,
            "depth": reranker.depth,
            "weight": reranker.weight,
            "n_features": reranker.n_features,
            "parameters": reranker.n_parameters,
            "bytes": weights.stat().st_size,
            "xxh3_128": checksum(weights),
            **facts,
        }
        write_json(record, {**known, "checksum": _own_checksum(known)})
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{weights}: cannot be written ({error}); the repetitions are safe") from error


def reranker_record(folder: Path) -> dict[str, Any] | None:
    """Give the record of a run folder's re-ranker; None if there is none.

    Raises: ModelError if it is broken.
    """
    path = folder / RECORD
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is broken ({error}); {AGAIN}") from error
    if record.get("checksum") != _own_checksum(record):
        raise ModelError(f"{path}: does not match its own checksum; {AGAIN}")
    return record


def load_reranker(folder: Path, key: str) -> Reranker | None:
    """Map a run folder's re-ranker; None if there is none. One that takes its place meanwhile is read instead.

    Raises: ModelError if it is broken, or of another run.
    """
    while (record := reranker_record(folder)) is not None:
        try:
            found = _load(folder, key, record)
        except ModelError:
            if reranker_record(folder) == record:
                raise
            continue
        if reranker_record(folder) == record:
            return found
    return None


def _load(folder: Path, key: str, record: Mapping[str, Any]) -> Reranker:
    path = folder / WEIGHTS
    if record["run"] != key:
        raise ModelError(f"{path}: is of another run, copied here by mistake; {AGAIN}")
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            raise ModelError(f"{path}: is cut short or changed: {size} bytes instead of {record['bytes']}; {AGAIN}")
        found = {name: array_of(tensor) for name, tensor in load_file(path).items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); {AGAIN}") from error
    known = {name: record[name] for name in ("n_features", "depth", "weight")}
    return Reranker(found["indptr"], found["features"], found["values"], found["bias"], **known)


def verify_reranker(folder: Path, key: str) -> list[str]:
    """Read a run folder's re-ranker whole, and name what is wrong with it: nothing if there is none."""
    try:
        record = reranker_record(folder)
        load_reranker(folder, key)
    except ModelError as error:
        return [str(error)]
    if record is not None and checksum(folder / WEIGHTS) != record["xxh3_128"]:
        return [f"the re-ranker has changed: {WEIGHTS} does not match its checksum"]
    return []


def _own_checksum(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(sorted((k, v) for k, v in record.items() if k != "checksum")).encode())
