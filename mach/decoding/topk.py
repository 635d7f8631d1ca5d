"""The k best labels: the type, the heap that every search keeps them in, and the plain top-k of a score matrix.

One order everywhere: the greater score is better, of equal scores the smaller label id. It is total, so the k best do not
depend on how the labels were split among threads.

Numba's cache does not see a change in another file: after editing `is_worse` or `replace_worst`, delete `__pycache__`.

Axes: N samples, K labels, k labels kept, P parts of the label range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.errors import ConfigError
from mach.kernels import N_THREADS, in_threads, jit

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

GROUP = 8  # samples a task takes
BLOCK = 4096  # labels scored, then compared with the k-th best so far; 128 KiB for a group: half the L2 of a small core
NO_LABEL = np.int64(2**63 - 1)  # worse than any label


@dataclass(frozen=True)
class TopK:
    """The k best labels of each sample: scores fall along a row, ties by the smaller label id."""

    labels: Int64  # (N, k)
    scores: Float32  # (N, k)


def check_k(k: int, n_labels: int) -> None:
    """Raise ConfigError unless 1 <= k <= K."""
    if not 1 <= k <= n_labels:
        raise ConfigError(f"k={k} must lie in [1, {n_labels}], the number of labels")


def topk_identity(scores_NK: Float32, k: int, *, n_threads: int = N_THREADS) -> TopK:
    """Give the k best labels where every label has its own score: the full head's decode, a plain top-k.

    Args:    scores_NK, float32, finite.
    Raises:  ConfigError if k is outside [1, K].
    """
    check_k(k, scores_NK.shape[1])
    return search(_offer_rows, (scores_NK,), len(scores_NK), scores_NK.shape[1], k, n_threads)


def search(offer: Callable[..., None], inputs: tuple[Any, ...], n_samples: int, n_labels: int, k: int, n_threads: int) -> TopK:
    """Split samples and labels into tasks, run them on all threads and merge what they found.

    `offer(*inputs, first, start, stop, scores_Nk, labels_Nk)` pushes the labels [start, stop) of the samples
    [first, first + GROUP) into those samples' heaps. Holds 12 bytes for each of P N k; P is 1 unless threads would idle.
    """
    firsts = range(0, n_samples, GROUP)
    n_parts = min(-(-n_threads // max(1, len(firsts))), -(-n_labels // BLOCK))
    scores_PNk = np.full((n_parts, n_samples, k), -np.inf, dtype=np.float32)
    labels_PNk = np.full((n_parts, n_samples, k), NO_LABEL)
    cuts = [p * n_labels // n_parts for p in range(n_parts + 1)]
    tasks = [
        (*inputs, first, cuts[p], cuts[p + 1], scores_PNk[p], labels_PNk[p]) for first in firsts for p in range(n_parts)
    ]  # fmt: skip
    in_threads(offer, tasks, n_threads)
    in_threads(finish, [(scores_PNk, labels_PNk, first) for first in firsts], n_threads)
    return TopK(labels_PNk[0], scores_PNk[0])


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Give a C-contiguous read-only view (a copy where the array is not contiguous), so that each kernel is compiled once."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


@jit
def is_worse(score: float, label: int, than_score: float, than_label: int) -> bool:
    """Compare two scored labels in the one order."""
    return score < than_score or (score == than_score and label > than_label)


@jit
def replace_worst(scores_k: Float32, labels_k: Int64, score: float, label: int) -> None:
    """Put a scored label in the place of the heap's worst, which stands at 0, and restore the heap."""
    k, at = len(scores_k), 0
    while 2 * at + 1 < k:
        child = 2 * at + 1
        if child + 1 < k and is_worse(scores_k[child + 1], labels_k[child + 1], scores_k[child], labels_k[child]):
            child += 1
        if not is_worse(scores_k[child], labels_k[child], score, label):
            break
        scores_k[at], labels_k[at] = scores_k[child], labels_k[child]
        at = child
    scores_k[at], labels_k[at] = score, label


@jit
def is_excluded(without: Int64, label: int) -> bool:
    """Tell whether a label is in a sorted list."""
    start, end = 0, len(without)
    while start < end:
        middle = (start + end) // 2
        if without[middle] < label:
            start = middle + 1
        else:
            end = middle
    return start < len(without) and without[start] == label


@jit
def finish(scores_PNk: Float32, labels_PNk: Int64, first: int) -> None:
    """Merge the heaps of all parts into part 0 and sort it, best first, for one group of samples."""
    P, N, k = scores_PNk.shape
    for n in range(first, min(first + GROUP, N)):
        scores_k, labels_k = scores_PNk[0, n], labels_PNk[0, n]
        for p in range(1, P):
            for i in range(k):
                if is_worse(scores_k[0], labels_k[0], scores_PNk[p, n, i], labels_PNk[p, n, i]):
                    replace_worst(scores_k, labels_k, scores_PNk[p, n, i], labels_PNk[p, n, i])
        for end in range(k - 1, 0, -1):
            worst_score, worst_label = scores_k[0], labels_k[0]
            replace_worst(scores_k[:end], labels_k[:end], scores_k[end], labels_k[end])
            scores_k[end], labels_k[end] = worst_score, worst_label


@jit
def _offer_rows(scores_NK: Float32, first: int, start: int, stop: int, top_Nk: Float32, labels_Nk: Int64) -> None:
    """Push labels [start, stop) of a group of samples; a block without a score above the k-th best costs one pass."""
    for n in range(first, min(first + GROUP, len(scores_NK))):
        floor = top_Nk[n, 0]
        for block in range(start, stop, BLOCK):
            scores = scores_NK[n, block : min(block + BLOCK, stop)]
            n_above = 0
            for j in range(len(scores)):
                n_above += scores[j] > floor
            if n_above == 0:
                continue
            for j in range(len(scores)):
                if scores[j] > floor:
                    replace_worst(top_Nk[n], labels_Nk[n], scores[j], block + j)
                    floor = top_Nk[n, 0]
