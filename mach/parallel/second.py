"""What the second stage takes, counted from a few numbers: memory while it is fitted, room on the disk, weights in the model.

Estimates. `experiments/memory` has them beside the peaks of real runs.

Symbols: N training samples, F features, K labels, R repetitions, B buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mach.config import Config
from mach.data import CSR, Dataset
from mach.decoding.full import CHUNK_BYTES
from mach.decoding.rerank.fit import COPIED, PAIRS
from mach.hashing.bounds import ensemble_cost
from mach.kernels import N_THREADS
from mach.model import FULL_ROWS, Sizes, chunk_rows, resolve_precision, resolve_rows
from mach.parallel.memory import PROCESS_BYTES, step_bytes
from mach.parallel.rerank import COSTS, n_listed
from mach.store.predictions import GROUP_ROWS

CPU = torch.device("cpu")
LATER_BYTES = 60 << 20  # of a process, that training does not load: what writes Parquet and weighs margins, kernels that decode
THREAD_BYTES = 12 << 20  # of a thread that decodes
LISTED_BYTES = 36  # a label of a shortlist that is made: id and score, found, joined and written
ON_DISK_BYTES = 8  # the same in a file
NEAR_BYTES = 4  # of a label in the file of what is near
WEIGHT_BYTES = 6  # a feature and a bfloat16
ENTRY_BYTES, START_BYTES = 4, 8  # a label of a sample that votes, and where its features or labels begin
LABEL_BYTES = 12  # in the model, where its weights begin, and a bias
DISTINCT = 4.0  # of the features of a label's samples, so many times the root get a weight: see `n_weights`


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What the training samples decide about the second stage, beside `Sizes`."""

    n: int  # N
    features: float  # that a sample has on average

    @classmethod
    def of(cls, dataset: Dataset) -> Samples:
        """Count the training samples of a data set."""
        split = dataset.split("train")
        nnz = split.features.nnz if isinstance(split.features, CSR) else split.features.size
        return cls(n=split.n_samples, features=nnz / max(1, split.n_samples))


@dataclass(frozen=True, kw_only=True, slots=True)
class Second:
    """What the second stage of a model is expected to take."""

    parameters: int
    bytes: int  # of its file
    lists_bytes: int  # of the shortlists, by products in float32; in bfloat16 their scores take half
    disk_bytes: int  # at its fullest: these twice, as their parts are joined, or once beside what is near and its file
    peak_bytes: int  # of the process that has trained all repetitions and fits it


def second_stage(config: Config, sizes: Sizes, samples: Samples) -> Second | None:
    """Estimate what the second stage takes after a training on the CPU; None if the config has none."""
    depth = min(config.n_reranked(sizes.features), sizes.n_labels)
    if not depth:
        return None
    listed, n_sets = n_listed(sizes, depth), 2 if config.rerank_weight == "auto" else 1
    weights = n_weights(sizes, samples)
    kept = round(samples.n * samples.features) if n_sets > 1 else 0  # of samples, if they vote
    size = n_sets * (WEIGHT_BYTES * weights + LABEL_BYTES * sizes.n_labels) + (_kept_bytes(sizes, samples) if kept else 0)
    lists = ON_DISK_BYTES * listed * samples.n
    near = NEAR_BYTES * listed * samples.n if n_sets > 1 else 0
    return Second(
        parameters=n_sets * (weights + sizes.n_labels) + kept,
        bytes=size,
        lists_bytes=lists,
        disk_bytes=lists + max(lists, near + size),
        peak_bytes=_peak_bytes(config, sizes, samples, listed, weights),
    )


def n_weights(sizes: Sizes, samples: Samples) -> int:
    """Estimate how many weights of the margins are kept, those near zero left out; and of prototypes.

    The features of a label's samples repeat, so different ones are fewer, as the root of all; and at most F. That was within 2.4
    times on seven data sets at a cost of 0.2; at a cost of 1 there were two to eight times as many.
    Source: Heaps 1978, Information Retrieval, section 7.5 (different words of a text grow as a power of its length).
    """
    of_a_label = samples.n * sizes.labels_a_sample * samples.features / sizes.n_labels
    return round(sizes.n_labels * min(sizes.n_features, of_a_label, DISTINCT * math.sqrt(of_a_label)))


def _kept_bytes(sizes: Sizes, samples: Samples) -> int:
    """Count what is stored of training samples that vote: their features and labels, and where each one's begin."""
    return round(samples.n * (WEIGHT_BYTES * samples.features + ENTRY_BYTES * sizes.labels_a_sample)) + 2 * START_BYTES * (
        samples.n + 1
    )


def _peak_bytes(config: Config, sizes: Sizes, samples: Samples, listed: int, weights: int) -> int:
    """Estimate the most memory that it takes: of what makes the shortlists, or of what fits the weights.

    The allocator still holds what came and went with a step of training. Shortlists take the mapped weights of all repetitions,
    bucket scores twice, those of one repetition beside them, and the lists of some thousand samples. The fit takes pairs, a
    number or two a feature and thread, copies of samples, and the weights of each fit, of prototypes, and of samples by row and
    by feature. Both map the features.
    """
    R, B, F = config.n_repetitions(sizes.n_labels, sizes.labels_a_sample), sizes.n_buckets, sizes.n_features
    is_full = config.table == "identity"
    products = resolve_precision(config.precision, CPU)
    model = ensemble_cost(
        n_labels=sizes.n_labels, n_buckets=B, n_repetitions=R, hidden=sizes.hidden, n_features=config.feature_buckets or F,
        layers=config.layers, settings=config, input_bytes=resolve_rows(config, sizes.features, products).itemsize,
    )  # fmt: skip
    held = model.weight_bytes + (0 if is_full else model.table_bytes)  # the identity is not held
    rows = min(samples.n, GROUP_ROWS)
    some = 4 * min(rows, FULL_ROWS if is_full else chunk_rows(R, B)) * R * B
    scores = min(some, CHUNK_BYTES["cpu"]) if is_full else some
    lists = held + 2 * scores + scores // R + N_THREADS * THREAD_BYTES + LISTED_BYTES * rows * listed
    pairs = min(PAIRS, round(samples.n * (listed + sizes.labels_a_sample)))
    n_fits = (len(COSTS) if config.rerank_cost == "auto" else 1) + (1 if config.rerank_weight == "auto" else 0)
    copies = 8 * N_THREADS * min(COPIED, round(samples.n * samples.features))
    fit = 4 * (pairs + samples.n + 2 * N_THREADS * F) + copies + n_fits * (WEIGHT_BYTES * weights + LABEL_BYTES * sizes.n_labels)
    if config.rerank_weight == "auto":  # samples that vote by row and by feature, and a sum and a number each a thread
        fit += _kept_bytes(sizes, samples) + round(WEIGHT_BYTES * samples.n * samples.features) + 8 * N_THREADS * samples.n
    mapped = round(8 * samples.n * samples.features)
    return PROCESS_BYTES + LATER_BYTES + step_bytes(config, sizes, R, device=CPU) + mapped + max(lists, fit)
