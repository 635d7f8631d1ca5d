"""What one sample's pruned search reads and the memory that it works in.

Axes: R repetitions, B buckets, M peaks, k labels kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mach.decoding.topk import Float32, Int64
from mach.hashing.inverse import Inverse

PEAK = 32  # buckets of a peak: two vectors of 64 bytes
MAX_CELLS = 1 << 22
BINS = 256
SOME_HITS = 64  # labels found before they are scored

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Cells = npt.NDArray[np.uint16]


class Task(NamedTuple):
    """One sample's search."""

    scores_RB: Float32
    inverse: Inverse
    aggregate: int
    without: Int64
    allowed: npt.NDArray[np.uint8]
    top_k: Float32  # a heap, the worst first
    labels_k: Int64


class Scratch(NamedTuple):
    """Memory of one thread, used again for each sample."""

    peaks_RM: Float32
    keys_B: Int64
    scores_RB: Float32  # the best scores of each repetition, best first; as many as were asked for
    buckets_RB: Int32
    n_R: Int64  # how many
    best_R: Float32
    below_R: Float32  # at least every score that is not among them
    floor_R: Float64  # t_r
    excess_R: Float64
    order_R: Int64
    rows: Int32  # buckets to open, at most R B
    buckets: Int32
    amounts: Int64
    cells: Cells
    hits: Int64  # labels to score
    bins: Int64
    seen: Int64  # labels scored for this sample, plus 1, by open addressing; 0: empty
    used: Int64  # the places in `seen` that are taken
    counts: Int64  # labels scored, labels touched, and the predicted ns of the sweep
    values_R: Float32
    buckets_R: Int32


def scratch(n_repetitions: int, n_buckets: int, n_seen: int, longest: int) -> Scratch:
    """Give a thread's memory: 8 MiB for the cells and 24 R B bytes, of which a search touches little."""
    R, B = n_repetitions, n_buckets
    return Scratch(
        peaks_RM=np.empty((R, -(-B // PEAK)), np.float32),
        keys_B=np.empty(B, np.int64),
        scores_RB=np.empty((R, B), np.float32),
        buckets_RB=np.empty((R, B), np.int32),
        n_R=np.zeros(R, np.int64),
        best_R=np.empty(R, np.float32),
        below_R=np.empty(R, np.float32),
        floor_R=np.empty(R),
        excess_R=np.empty(R),
        order_R=np.empty(R, np.int64),
        cells=np.zeros(MAX_CELLS, np.uint16),
        rows=np.empty(R * B, np.int32),
        buckets=np.empty(R * B, np.int32),
        amounts=np.empty(R * B, np.int64),
        hits=np.empty(SOME_HITS + longest, np.int64),
        bins=np.empty(BINS, np.int64),
        seen=np.zeros(2 * n_seen, np.int64),
        used=np.empty(n_seen, np.int64),
        counts=np.zeros(3, np.int64),
        values_R=np.empty(R, np.float32),
        buckets_R=np.empty(R, np.int32),
    )
