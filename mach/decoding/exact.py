"""The exact top-k at the least predicted cost: the pruned search where it pays, the scan where it does not; equal bits.

The search (`pruned`) reads R B bucket scores and then only the labels of the best buckets; the scan (`scan`) looks up R K. Which
is quicker depends on how far the k best stand out, which only the scores tell: each sample is searched until its certificate is
predicted to cost more than its share of a scan, and such samples are scanned together: eight at a time, or, where scores are
added up and there are enough of them, 32 at a time in bytes (`coarse`).

Axes: N samples, R repetitions, B buckets, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mach.config import Estimator
from mach.decoding.coarse import LANES, coarse_topk
from mach.decoding.only import Int64, Lists, Only, allowed_of, check_exclude, check_restrict, lists_of, no_lists
from mach.decoding.pruned import GUESS_ROWS, Costs, prune
from mach.decoding.scan import AGGREGATES, MEDIAN, SUM, scan_topk
from mach.decoding.topk import GROUP, NO_LABEL, Float32, TopK, check_k, finish, frozen
from mach.decoding.work import Scratch, scratch
from mach.errors import ConfigError
from mach.hashing.table import LabelTable, bucket_dtype
from mach.kernels import N_THREADS, in_threads

# ns, one core of an AMD EPYC (Zen 5): fitted by `python experiments/exact/run.py fit`
COSTS = Costs(read=0.1, open=120.0, touch=1.35, score=3.5, scan=0.95, median=3.9, lay=0.6, coarse=1.1, pack=0.4, invert=8.0)

WASTE = 0.1  # of a scan's time, at most, is risked on searches that may be given up
FIRST_DEPTH = 192  # the most buckets of a repetition that are looked at before theta is known
MANY = 64  # times k labels, at least, are worth a scan in bytes: it holds candidates
MEMORY_LABELS = 1 << 20  # scored for one sample, at most: 24 MiB a thread


class Certificate(NamedTuple):
    """What proved each sample's k best: numbers of the pruned search, zero where the sample was scanned instead."""

    depth: Int64  # buckets opened in a repetition, at most, (N,); for min and median those of theta or more
    n_touched: Int64  # labels of opened buckets, each time they were walked, (N,)
    n_scored: Int64  # labels scored exactly, (N,)

    @property
    def scanned(self) -> npt.NDArray[np.bool_]:
        """Whether the sample was scanned, (N,)."""
        return np.equal(self.depth, 0)


def exact_topk(
    scores_NRB: Float32,
    table: LabelTable,
    k: int,
    *,
    estimator: Estimator,
    restrict: npt.ArrayLike | None = None,
    exclude: Sequence[npt.ArrayLike] | None = None,
    n_threads: int = N_THREADS,
    costs: Costs = COSTS,
) -> tuple[TopK, Certificate]:
    """Give the k best labels of each sample and what certifies them, to the bits of `scan_topk`.

    Holds, a thread, about 12 MiB and 24 R B bytes, of which it touches little; and, once, what `LabelTable.inverse` holds:
    nothing for Carter-Wegman. A sample that has to be scanned needs `LabelTable.array`.

    Args:    scores_NRB, float32 from `bucket_scores`, finite. restrict, labels to choose among, for all samples. exclude, N lists
             of labels that each sample may not find.
    Raises:  ConfigError if the table is the identity, or does not fit the scores; if a label is outside [0, K); or if fewer than
             k labels are left to a sample.
    """
    N, R, B = scores_NRB.shape
    K = table.n_labels
    if table.is_identity:
        raise ConfigError("the identity table has nothing to prune: take topk_identity")
    if (R, B) != (table.n_repetitions, table.n_buckets):
        raise ConfigError(
            f"scores (N, {R}, {B}) do not fit the table: {table.n_repetitions} repetitions, {table.n_buckets} buckets"
        )
    check_k(k, K)
    subset = None if restrict is None else check_restrict(restrict, K, k)
    n_allowed = K if subset is None else len(subset)
    lists = no_lists(N) if exclude is None else check_exclude(exclude, N, K, subset, k)
    scan_ns, in_bytes, may_pay = _plan(R, B, K, n_allowed, N, k, estimator, table.has_inverse, n_threads, costs)
    if not may_pay:
        return _scan(scores_NRB, table, k, estimator, subset, lists, in_bytes, n_threads), Certificate(
            *np.zeros((3, N), np.int64)
        )
    numbers_N3 = np.zeros((N, 3), np.int64)
    top = TopK(np.full((N, k), NO_LABEL), np.full((N, k), -np.inf, np.float32))
    _search(scores_NRB, table, top, numbers_N3, estimator, Only(*lists, allowed_of(subset, K)), scan_ns, n_threads, costs)
    left = np.flatnonzero(numbers_N3[:, 0] < 0)
    numbers_N3[left] = 0
    if 0 < len(left) < min(N, GROUP):  # too few to share a scan: each may cost more of a search
        rows = [lists.labels[lists.starts[n] : lists.starts[n + 1]] for n in left]
        how: dict[str, Any] = {"estimator": estimator, "restrict": subset, "n_threads": n_threads, "costs": costs}
        found, proof = exact_topk(scores_NRB[left], table, k, exclude=rows, **how)
        numbers_N3[left] = np.stack([proof.depth, proof.n_scored, proof.n_touched], axis=1)
        top.labels[left], top.scores[left] = found.labels, found.scores
    elif len(left):
        in_bytes = _scan_ns(R, B, len(left), n_allowed, k, estimator, costs)[1]
        found = _scan(scores_NRB[left], table, k, estimator, subset, lists_of(lists, left), in_bytes, n_threads)
        top.labels[left], top.scores[left] = found.labels, found.scores
    return top, Certificate(*numbers_N3[:, [0, 2, 1]].T.copy())


def first_depth(k: int, n_buckets: int) -> int:
    """Give how many buckets of each repetition to look at first: the k best labels are most often among so many."""
    return max(1, min(max(8, min(2 * k, 8 + 3 * k // 2)), FIRST_DEPTH, n_buckets // 16))


@lru_cache
def _plan(
    R: int, B: int, K: int, n_allowed: int, n_samples: int, k: int, estimator: Estimator, has_inverse: bool, n_threads: int,
    costs: Costs,
) -> tuple[float, bool, bool]:  # fmt: skip
    """Predict what a scan costs a sample, tell whether that in bytes is the quicker, and whether searches may be quicker still.

    They may if they can be quicker than scans, and their failures cost less than WASTE of the scans. The k best labels lie in
    about k buckets of a repetition, which a search has to open at least. Kept, as it takes as long as scanning few labels.
    """
    scan_ns, in_bytes = _scan_ns(R, B, n_samples, n_allowed, k, estimator, costs)
    try_ns = _try_ns(R, B, K, k, costs)
    if AGGREGATES[estimator] != SUM:
        try_ns *= 3  # given up later, and at a cost that is less sure
    n_each = -(-n_samples // n_threads)
    n_failures = (n_each.bit_length() + 1) // 2  # the tries of a batch where none succeeds: see `prune`
    may_pay = (
        n_samples > 0
        and (has_inverse or costs.invert * R * K <= n_samples * scan_ns)
        and try_ns + costs.touch * R * k * K / B < scan_ns
        and try_ns * n_failures <= WASTE * scan_ns * n_each
    )
    return scan_ns, in_bytes, may_pay


def _scan_ns(R: int, B: int, n_samples: int, n_allowed: int, k: int, estimator: Estimator, costs: Costs) -> tuple[float, bool]:
    """Predict what a scan costs a sample, and tell whether that in bytes is the quicker."""
    n, look_ns = max(1, n_samples), costs.median if AGGREGATES[estimator] == MEDIAN else costs.scan
    plain_ns = R * (n_allowed * look_ns / min(n, GROUP) + B * costs.lay)
    bytes_ns = R * (n_allowed * costs.coarse / min(n, LANES) + B * costs.pack * (1 + 1 / min(n, LANES)))
    may = AGGREGATES[estimator] == SUM and n_allowed >= MANY * k
    return (bytes_ns, True) if may and bytes_ns < plain_ns else (plain_ns, False)


def _try_ns(R: int, B: int, K: int, k: int, costs: Costs) -> float:
    """Predict what a search costs until theta is known."""
    depth = first_depth(k, B)
    n_guess = 3 * min(R, GUESS_ROWS) * min(depth, 12 + 3 * k // 4)  # buckets, as often as they are walked
    guess_ns = costs.touch * n_guess * K / B + costs.score * R * 2 * (k + 4)
    return costs.read * R * B + costs.open * R * depth + guess_ns


def _search(
    scores_NRB: Float32, table: LabelTable, top: TopK, numbers_N3: Int64, estimator: Estimator,
    only: Only, scan_ns: float, n_threads: int, costs: Costs,
) -> None:  # fmt: skip
    """Run the pruned search on all threads, a run of samples each, and sort what it found."""
    (N, k), (R, B) = top.labels.shape, scores_NRB.shape[1:]
    inverse, frozen_NRB, depth = table.inverse, frozen(scores_NRB), first_depth(k, B)
    n_seen = 1 << max(12, math.ceil(math.log2(64 * k + min(MEMORY_LABELS, table.n_labels // 32))))
    n_each = -(-N // n_threads)
    sizes, try_ns = (R, B, n_seen, longest_bucket(table)), _try_ns(R, B, table.n_labels, k, costs)
    firsts = range(0, N, n_each)
    works = [_take(sizes) for _ in firsts]
    tasks: list[tuple[Any, ...]] = [
        (
            frozen_NRB,
            inverse,
            AGGREGATES[estimator],
            depth,
            costs,
            try_ns,
            scan_ns,
            only,
            work,
            first,
            min(first + n_each, N),
            top.scores,
            top.labels,
            numbers_N3,
        )
        for first, work in zip(firsts, works, strict=True)
    ]
    in_threads(prune, tasks, n_threads)
    for work in works:
        _keep(sizes, work)
    for first in range(0, N, GROUP):
        finish(top.scores[None], top.labels[None], first)


_Sizes = tuple[int, int, int, int]
_idle: list[tuple[_Sizes, Scratch]] = []  # memory of calls that are over: fresh pages would double the time of a single sample


def _take(sizes: _Sizes) -> Scratch:
    """Give memory of these sizes, an earlier call's if there is some; memory of other sizes is let go."""
    while _idle:
        try:
            held, work = _idle.pop()  # atomic, as callers may be threads
        except IndexError:
            break
        if held == sizes:
            return work
    return scratch(*sizes)


def _keep(sizes: _Sizes, work: Scratch) -> None:
    if len(_idle) < N_THREADS:
        _idle.append((sizes, work))


def longest_bucket(table: LabelTable) -> int:
    """Give the number of labels in the fullest bucket, or a little more."""
    if table.is_arithmetic:
        return int(table.inverse.p) // table.n_buckets + 1
    return int(np.diff(table.inverse.starts_RB, axis=1).max())


def _scan(
    scores_NRB: Float32, table: LabelTable, k: int, estimator: Estimator, subset: Int64 | None, lists: Lists, in_bytes: bool,
    n_threads: int,
) -> TopK:  # fmt: skip
    """Scan all labels, or the subset alone where there is one."""
    if subset is None:
        table_RM = table.array()
    else:
        lists = Lists(lists.starts, np.searchsorted(subset, lists.labels))
        if table.is_arithmetic:
            dtype = bucket_dtype(table.n_buckets)
            table_RM = np.stack([table.buckets(subset, row).astype(dtype) for row in range(table.n_repetitions)])
        else:
            table_RM = np.ascontiguousarray(table.array()[:, subset])
    if in_bytes:
        found = coarse_topk(scores_NRB, table_RM, k, without=lists, n_threads=n_threads)
    else:
        found = scan_topk(scores_NRB, table_RM, k, estimator=estimator, without=lists, n_threads=n_threads)
    return found if subset is None else TopK(subset[found.labels], found.scores)
