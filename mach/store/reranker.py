"""The re-ranker in a run folder: `reranker.safetensors`, and `reranker.json`, written last: with it, it is finished.

Tensors: indptr int64 (K + 1,), features int32 (nnz,), values bfloat16 (nnz,), bias float32 (K,). With networks also the same of
the prototypes, as `prototypes.indptr` and so on; counts int32 (K,); `network.first` and the other arrays of a `Network`, float32.
Where these hear training samples, they are kept: `samples.indptr`, `samples.features` and `samples.values`, and
`samples.labels.indptr` int64 (S + 1,) and `samples.labels.indices` int32.
The record says depth, weight, labels found by neighbours and number of features, how it was fitted, size and checksum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from safetensors.torch import load_file, save_file

from mach.data import CSR
from mach.decoding.rerank import N_OPINIONS, Evidence, Neighbours, Network, Opinions, Reranker, SparseWeights
from mach.decoding.rerank.neighbours import rows_of
from mach.decoding.rerank.network import NAMES
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
    tensors = _tensors("", reranker.weights)
    if (more := reranker.opinions) is not None:
        tensors |= _evidence_tensors(more.evidence)
        tensors |= {f"network.{name}": torch.from_numpy(getattr(more.network, name)) for name in NAMES}
    try:
        record.unlink(missing_ok=True)
        with atomic(weights) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", "run": key})
        known = {
            "run": key,
            "depth": reranker.depth,
            "weight": reranker.weight,
            "near": 0 if reranker.opinions is None else reranker.opinions.n_near,
            "n_features": reranker.weights.n_features,
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
    opinions = None
    if "counts" in found:
        network = Network(*(found[f"network.{name}"] for name in NAMES))
        if network.skip.shape[1] != N_OPINIONS:
            raise ModelError(f"{path}: hears {network.skip.shape[1]} numbers of a label, this version {N_OPINIONS}; {AGAIN}")
        evidence = Evidence(_weights("prototypes.", found, record), found["counts"], _neighbours(found, record))
        opinions = Opinions(evidence, network, record["near"])
    return Reranker(_weights("", found, record), record["depth"], record["weight"], opinions)


def _tensors(prefix: str, weights: SparseWeights) -> dict[str, torch.Tensor]:
    """Give the arrays of sparse weights by name, as they are stored."""
    return {
        f"{prefix}indptr": torch.from_numpy(weights.indptr),
        f"{prefix}features": torch.from_numpy(weights.features),
        f"{prefix}values": torch.from_numpy(weights.values.view("int16")).view(torch.bfloat16),
        f"{prefix}bias": torch.from_numpy(weights.bias),
    }


def _evidence_tensors(evidence: Evidence) -> dict[str, torch.Tensor]:
    """Give what is kept of training samples by name, as it is stored."""
    tensors = _tensors("prototypes.", evidence.prototypes) | {"counts": torch.from_numpy(evidence.counts)}
    if (kept := evidence.neighbours) is not None:
        tensors |= _tensors("samples.", kept.samples)
        del tensors["samples.bias"]  # of zeros
        tensors |= {f"samples.labels.{name}": torch.from_numpy(getattr(kept.labels, name)) for name in ("indptr", "indices")}
    return tensors


def _weights(prefix: str, found: Mapping[str, Any], record: Mapping[str, Any]) -> SparseWeights:
    """Give the sparse weights that `_tensors` stored."""
    indptr, features, values, bias = (found[prefix + name] for name in ("indptr", "features", "values", "bias"))
    return SparseWeights(indptr, features, values, bias, record["n_features"])


def _neighbours(found: Mapping[str, Any], record: Mapping[str, Any]) -> Neighbours | None:
    """Give the training samples that are kept; None if there are none."""
    if "samples.indptr" not in found:
        return None
    starts, features, values = (found[f"samples.{name}"] for name in ("indptr", "features", "values"))
    rows = rows_of(starts, features, values, record["n_features"])
    labels = CSR(found["samples.labels.indptr"], found["samples.labels.indices"], None, len(found["counts"]))
    return Neighbours(rows, labels)


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
