"""The full head's k best of K labels, fused with its product: outputs are made a chunk at a time, gone over once and forgotten.

Labels come in rising order. A sample keeps the k best so far, and a gate: an output that is not above it cannot score more than
the worst of them, so that one comparison an output rejects nearly all. Only what passes is transformed, by the very function that
`estimators` maps over whole rows, and compared by its score: of outputs that round to one score (sigmoids of 20 and 30 are both
1) the smaller label id is best, as ever. `_gate_of` leads from a score back to an output, with room for the rounding of both.

Probabilities of a softmax need the greatest output and the sum over all K first, to the bits of `estimators`: two more passes of
products. Axes: N samples, K labels, C labels of a chunk, L labels excluded in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mach.config import Estimator, Loss
from mach.decoding.estimators import (
    LIMIT,
    LOG_SIGMOID,
    LOG_SOFTMAX,
    RAW,
    SIGMOID,
    SOFTMAX,
    exp_of,
    log_sigmoid_of,
    refuse,
    sigmoid_of,
    transform_of,
)
from mach.decoding.only import Lists, check_exclude, check_restrict, no_lists
from mach.decoding.topk import GROUP, NO_LABEL, Float32, Int64, TopK, check_k, finish, is_excluded, replace_worst
from mach.kernels import N_THREADS, array_of, in_threads, jit_ieee

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of a chunk's outputs; on a CPU the weights they are made of lie beside them
TASKS = 4  # a thread, so that none waits long for the last
BLOCK = 128  # outputs compared with the gate before one is looked at alone

SHARES = (SOFTMAX, LOG_SOFTMAX)
LEAST_EXPONENT = -86.0  # below, a little, `exp_of` gives the same for all
LEAST_SCORE = 1e-36  # below lie numbers that float32 holds with fewer bits
ROOM = 2.4e-7  # 4 * 2**-24: for rounding an output to float32
ROOM_SIGMOID = 2e-6  # for what a sigmoid or its logarithm errs by, 3 units in the last place
ROOM_SOFTMAX = 2e-5  # for what a softmax errs by, whose exponent is rounded at up to 87

Outputs = Callable[[slice | Int64], "torch.Tensor"]
Chunks = Callable[[], Iterator[tuple[int, "torch.Tensor"]]]  # first label of each, and its outputs


def full_topk(
    outputs: Outputs,
    n_samples: int,
    n_labels: int,
    k: int,
    *,
    loss: Loss,
    estimator: Estimator,
    width: int,
    restrict: npt.ArrayLike | None = None,
    exclude: Sequence[npt.ArrayLike] | None = None,
    device: torch.device | None = None,
    n_threads: int = N_THREADS,
    first_sample: int = 0,
) -> TopK:
    """Give the k best labels of each sample, best first, to the bits of `decode_topk` on the same outputs, all given at once.

    Holds the result, and what `outputs` holds: nothing of N K.

    Args:    outputs(labels), of at most `width` label ids, a slice or a rising list: gives their outputs (N, C), float32,
             contiguous, perhaps where the call before put its own. restrict, label ids to choose among, for all samples: only
             their outputs are asked for, but that a softmax's probabilities are shares of all labels. exclude, N lists of label
             ids, what each sample may not find. device, of the outputs, if not the CPU. first_sample, its number in errors.
    Raises:  ConfigError if k is outside [1, K], an output is not finite, a label outside [0, K), or fewer than k labels are left.
    """
    check_k(k, n_labels)
    subset = None if restrict is None else check_restrict(restrict, n_labels, k)
    lists = no_lists(n_samples) if exclude is None else check_exclude(exclude, n_samples, n_labels, subset, k)
    if subset is not None:  # from here on a place in the subset stands for its label
        lists = Lists(lists.starts, np.searchsorted(subset, lists.labels))
    kind = transform_of(loss, "min" if estimator == "mean" else estimator)
    chunks = [slice(a, min(a + width, n_labels)) for a in range(0, n_labels, width)]
    n_allowed = n_labels if subset is None else len(subset)
    some = [slice(a, min(a + width, n_allowed)) for a in range(0, n_allowed, width)]

    def every() -> Iterator[tuple[int, torch.Tensor]]:
        return ((chunk.start, outputs(chunk)) for chunk in chunks)

    def allowed() -> Iterator[tuple[int, torch.Tensor]]:
        return ((chunk.start, outputs(chunk if subset is None else subset[chunk])) for chunk in some)

    if not n_samples:
        return TopK(np.zeros((0, k), dtype=np.int64), np.zeros((0, k), dtype=np.float32))
    if is_host(device):
        found = _Search(n_samples, kind, n_threads, first_sample).run(every, allowed, k, lists)
    else:
        from mach.decoding.device.full import full_topk_on_device  # here, as it loads torch

        assert device is not None
        found = full_topk_on_device(every, allowed, n_samples, k, kind, lists, device, first_sample)
    return found if subset is None else TopK(subset[found.labels], found.scores)


def is_host(device: torch.device | None) -> bool:
    """Tell whether outputs on a device are the CPU's own memory, which kernels read."""
    return device is None or device.type == "cpu"


class _Search:
    """What is known of each sample between the chunks."""

    def __init__(self, n_samples: int, kind: int, n_threads: int, first_sample: int):
        self.kind, self.n_threads, self.first_sample = kind, n_threads, first_sample
        self.most_N = np.full(n_samples, -np.inf, dtype=np.float32)  # the greatest output, where a share is asked for
        self.total_N = np.zeros(n_samples)  # ... and the sum over all labels of e**(output - most)
        self.is_broken_N = np.zeros(n_samples, dtype=np.bool_)

    def run(self, every: Chunks, allowed: Chunks, k: int, lists: Lists) -> TopK:
        """Give the k best of what is allowed."""
        n_samples = len(self.most_N)
        top = TopK(np.full((n_samples, k), NO_LABEL), np.full((n_samples, k), -np.inf, dtype=np.float32))
        if self.kind in SHARES:
            for _, z in every():
                self._over_samples(_find_most, array_of(z), self.most_N, self.is_broken_N)
            self._refuse_broken()
            for _, z in every():
                self._over_samples(_add_up, array_of(z), self.most_N, self.total_N)
        gate_N = np.full(n_samples, -np.inf, dtype=np.float32)
        for start, z in allowed():
            self._over_samples(
                _offer, array_of(z), start, self.kind, self.most_N, self.total_N, lists.starts, lists.labels,
                gate_N, self.is_broken_N, top.scores, top.labels,
            )  # fmt: skip
        self._refuse_broken()
        groups = [(top.scores[None], top.labels[None], first) for first in range(0, n_samples, GROUP)]
        in_threads(finish, groups, self.n_threads)
        return top

    def _over_samples(self, kernel: Callable[..., None], *arguments: Any) -> None:
        n_samples = len(self.most_N)
        n_each = -(-n_samples // (TASKS * self.n_threads)) or 1
        tasks = [(*arguments, a, min(a + n_each, n_samples)) for a in range(0, n_samples, n_each)]
        in_threads(kernel, tasks, self.n_threads)

    def _refuse_broken(self) -> None:
        if self.is_broken_N.any():
            refuse(self.first_sample + int(np.argmax(self.is_broken_N)), 0)


@jit_ieee
def _offer(
    z_NC: Float32, first_label: int, kind: int, most_N: Float32, total_N: npt.NDArray[np.float64], starts_N: Int64,
    without_L: Int64, gate_N: Float32, is_broken_N: npt.NDArray[np.bool_], scores_Nk: Float32, labels_Nk: Int64,
    begin: int, end: int,
) -> None:  # fmt: skip
    """Push a chunk of labels into the heaps of the samples [begin, end)."""
    for n in range(begin, end):
        gate, most, total = gate_N[n], most_N[n], total_N[n]
        without = without_L[starts_N[n] : starts_N[n + 1]]
        for block in range(0, z_NC.shape[1], BLOCK):
            z = z_NC[n, block : block + BLOCK]
            n_above = n_good = np.int32(0)  # as wide as an output, so that as many are counted at once as are compared
            for j in range(len(z)):
                n_above = np.int32(n_above + np.int32(z[j] > gate))
                n_good = np.int32(n_good + np.int32(abs(z[j]) < LIMIT))  # false for nan
            if n_good < len(z):
                is_broken_N[n] = True
            if n_above == 0:
                continue
            for j in range(len(z)):
                if z[j] > gate:
                    score, label = _score_of(kind, z[j], most, total), first_label + block + j
                    if score > scores_Nk[n, 0] and not is_excluded(without, label):
                        replace_worst(scores_Nk[n], labels_Nk[n], score, label)
                        gate = _gate_of(kind, scores_Nk[n, 0], most, total)
        gate_N[n] = gate


@jit_ieee
def _score_of(kind: int, z: np.float32, most: np.float32, total: float) -> Any:
    """Transform one output to the bits of `estimators.bucket_scores`."""
    if kind == RAW:
        return z
    if kind == SIGMOID:
        return sigmoid_of(z)
    if kind == LOG_SIGMOID:
        return log_sigmoid_of(z)
    if kind == LOG_SOFTMAX:
        return (z - most) - np.float32(math.log(total))
    return exp_of(z - most) * np.float32(1 / total)


@jit_ieee
def _gate_of(kind: int, score: np.float32, most: np.float32, total: float) -> np.float32:
    """Give an output such that neither it nor a smaller one scores more than `score`.

    What a transform gives errs by a share of itself, at most: so the exact one is turned round, at a score that much lower. Where
    scores are held constant or have fewer bits than that, the gate stands open.
    """
    if kind == RAW or score == -np.inf:
        return score
    exact, top = float(score), float(most)
    if kind == SIGMOID:
        if score >= 1:
            return np.float32(np.inf)  # none is greater
        p = exact * (1 - ROOM_SIGMOID)
        z = math.log(p / (1 - p))
        is_open = z < LEAST_EXPONENT
    elif kind == LOG_SIGMOID:
        p = min(exact * (1 + ROOM_SIGMOID), -LEAST_SCORE)
        z = p - math.log(-math.expm1(p))
        is_open = False
    elif kind == LOG_SOFTMAX:
        log_total = math.log(total)
        z = exact + log_total + top - ROOM * (abs(exact) + 2 * log_total + 2 * abs(top) + 1)
        is_open = False
    else:
        below = math.log(max(exact, LEAST_SCORE) * (1 - ROOM_SOFTMAX) * total)
        z = top + below - ROOM * (abs(top) + abs(below))
        is_open = exact < LEAST_SCORE or below < LEAST_EXPONENT
    return np.float32(-np.inf if is_open else z - ROOM * abs(z))


@jit_ieee
def _find_most(z_NC: Float32, most_N: Float32, is_broken_N: npt.NDArray[np.bool_], begin: int, end: int) -> None:
    """Note the greatest output so far of the samples [begin, end), and whether one is out of range."""
    for n in range(begin, end):
        most, n_good = most_N[n], 0
        for c in range(z_NC.shape[1]):
            most = max(most, z_NC[n, c])
            n_good += abs(z_NC[n, c]) < LIMIT
        most_N[n] = most
        is_broken_N[n] |= n_good < z_NC.shape[1]


@jit_ieee
def _add_up(z_NC: Float32, most_N: Float32, total_N: npt.NDArray[np.float64], begin: int, end: int) -> None:
    """Add e**(output - most) of a chunk, label after label, as a whole row is added up."""
    powers = np.empty(BLOCK, dtype=np.float32)
    for n in range(begin, end):
        total, most = total_N[n], most_N[n]
        for block in range(0, z_NC.shape[1], BLOCK):
            z = z_NC[n, block : block + BLOCK]
            for j in range(len(z)):
                powers[j] = exp_of(z[j] - most)
            for j in range(len(z)):
                total += powers[j]
        total_N[n] = total
