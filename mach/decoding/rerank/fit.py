"""Fit the weights of every label: a linear SVM with squared hinge loss against the labels that it is confused with.

    min over w, b   |w|^2 / 2 + b^2 / 2 + cost * sum over the label's pairs of max(0, 1 - y (w . x / |x| + b))^2

The pairs of a label are its positive samples (y = 1) and the samples on whose shortlist it stands without being one (y = -1).
Each label is solved alone, by coordinate descent in the dual with shrinking (Hsieh et al. 2008, A dual coordinate descent method
for large-scale linear SVM), so labels run in threads, and the answer depends on neither their number nor the blocks. Negatives
from shortlists instead of all samples are what trees train their last level on (Prabhu et al. 2018, Parabel).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mach.data import CSR
from mach.data.csr import read_only
from mach.decoding.rerank.linear import SparseWeights
from mach.kernels import N_THREADS, bits_of, in_threads, jit, jit_ieee

Array = npt.NDArray[np.generic]
Found = tuple[Array, Array, Array, Array]  # entries a label, their features, their values, biases: of a run of labels
Shortlists = Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]  # rows (n,), labels (n, m)

SMALLEST = 0.05  # weights nearer to zero are dropped: a quarter of them is left, and no accuracy lost
TOLERANCE = 0.1  # of the projected gradient
PASSES = 8  # at most, over the pairs of a label: more cost as much again, and no accuracy is gained
COPIED = 1 << 20  # entries of a label's samples, 8 bytes each
PAIRS = 32 << 20  # held at once, 4 bytes each
TASKS_A_THREAD = 8
UNSEEN = -1.0  # the margin of a label that no sample has


def fit_margins(
    features: CSR,
    labels: CSR,
    shortlists: Callable[[], Shortlists],
    *,
    costs: Sequence[float],
    pairs: int = PAIRS,
    progress: Callable[[int, int], None] | None = None,
) -> list[SparseWeights]:
    """Fit the weights of K labels on N samples with F features, once for each of some costs.

    Args:   costs, best rising: a label's solution for one is where the search for the next begins.
            shortlists, gives parts of (row numbers, their shortlists (n, m)) anew each time it is called, once a block of labels;
            samples that are in none of them are not trained on, not even as positives. A label of -1 is none.
            pairs, how many of (label, sample) are held at once: labels are done in blocks that have no more, or one by one.
            progress(labels done, K).
    """
    label_indptr, label_indices = read_only(labels.indptr), read_only(labels.indices)
    n_labels, used = labels.n_columns, np.zeros(len(labels), np.bool_)
    counts = np.zeros(n_labels, np.int64)
    for rows, listed in shortlists():
        used[rows] = True
        _count(rows, listed, label_indptr, label_indices, counts)
    fixed = scales_of(features)
    found: list[list[Found]] = [[] for _ in costs]
    for low, high in blocks(counts, pairs):
        starts = np.zeros(high - low + 1, np.int64)
        np.cumsum(counts[low:high], out=starts[1:])
        samples, at = np.empty(starts[-1], np.int32), starts[:-1].copy()
        _positives(label_indptr, label_indices, used, low, high, at, samples)
        n_positive = at - starts[:-1]
        for rows, listed in shortlists():
            _negatives(rows, listed, label_indptr, label_indices, low, high, at, samples)
        for part in _solve(fixed, features.n_columns, samples, starts, n_positive, low, np.array(costs)):
            for of_cost, one in zip(found, part, strict=True):
                of_cost.append(one)
        if progress is not None:
            progress(high, n_labels)
    return [_joined(parts, features.n_columns) for parts in found]


def _joined(parts: list[Found], n_features: int) -> SparseWeights:
    counts, features, values, bias = (np.concatenate([part[i] for part in parts]) for i in range(4))
    ends = np.zeros(len(bias) + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    return SparseWeights(ends, features, values, bias, n_features)


def blocks(counts: npt.NDArray[np.int64], pairs: int) -> list[tuple[int, int]]:
    """Cut the labels into runs of at most so many pairs each, or of one label."""
    found, low, total = [], 0, 0
    for label, count in enumerate(counts.tolist()):
        if total + count > pairs and label > low:
            found.append((low, label))
            low, total = label, 0
        total += count
    return [*found, (low, len(counts))]


def scales_of(features: CSR) -> tuple[Array, Array, Array, Array]:
    """Give the arrays of sparse rows as kernels take them, and what scales each row to length 1."""
    scales = np.empty(len(features), np.float32)
    values = np.ones(len(features.indices), np.float32) if features.values is None else features.values
    indptr, indices, values = (read_only(array) for array in (features.indptr, features.indices, values))
    _scales(indptr, values, scales)
    return indptr, indices, values, scales


def all_positives(labels: CSR, used_N: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Give the used samples of each label, one label's after another's, and where each begins, (K + 1,)."""
    indptr, indices = read_only(labels.indptr), read_only(labels.indices)
    starts = np.zeros(labels.n_columns + 1, np.int64)
    _count_used(used_N, indptr, indices, starts[1:])
    np.cumsum(starts, out=starts)
    samples = np.empty(starts[-1], np.int32)
    _positives(indptr, indices, used_N, 0, labels.n_columns, starts[:-1].copy(), samples)
    return samples, starts


def _solve(
    fixed: tuple[Array, Array, Array, Array], n_features: int, samples: Array, starts: Array, n_positive: Array, first: int,
    costs: Array,
) -> list[list[Found]]:  # fmt: skip
    """Solve a block of labels in threads; give what is found for each cost, of each run of them."""
    n_labels = len(n_positive)
    at = np.searchsorted(starts, np.linspace(0, starts[-1], TASKS_A_THREAD * N_THREADS + 1)[1:-1])
    cuts = list(itertools.pairwise(sorted({0, *np.minimum(at, n_labels).tolist(), n_labels})))
    parts: list[list[Found]] = [[]] * len(cuts)
    indptr, indices, values, scales = fixed

    def solve(i: int) -> None:
        low, high = cuts[i]
        parts[i] = _fit(
            indptr, indices, values, scales, n_features, samples, starts, n_positive, first, low, high, costs, SMALLEST, COPIED,
            PASSES, TOLERANCE,
        )  # fmt: skip

    in_threads(solve, [(i,) for i in range(len(cuts))], N_THREADS)
    return parts


@jit_ieee
def _scales(indptr: Array, values: Array, scales: Array) -> None:
    for n in range(len(indptr) - 1):
        square = np.float32(0)
        for i in range(indptr[n], indptr[n + 1]):
            square += values[i] * values[i]
        scales[n] = np.float32(1) / np.sqrt(square) if square > 0 else np.float32(0)


@jit
def _is_positive(label: int, indptr: Array, indices: Array, row: int) -> bool:
    at = indptr[row] + np.searchsorted(indices[indptr[row] : indptr[row + 1]], label)
    return bool(at < indptr[row + 1] and indices[at] == label)


@jit
def _count(rows: Array, listed: Array, indptr: Array, indices: Array, counts: Array) -> None:
    for n in range(len(rows)):
        for i in range(indptr[rows[n]], indptr[rows[n] + 1]):
            counts[indices[i]] += 1
        for label in listed[n]:
            if label >= 0 and not _is_positive(label, indptr, indices, rows[n]):
                counts[label] += 1


@jit
def _count_used(used: Array, indptr: Array, indices: Array, counts: Array) -> None:
    for row in range(len(used)):
        if used[row]:
            for i in range(indptr[row], indptr[row + 1]):
                counts[indices[i]] += 1


@jit
def _positives(indptr: Array, indices: Array, used: Array, low: int, high: int, ends: Array, samples: Array) -> None:
    for row in range(len(used)):
        if used[row]:
            for i in range(indptr[row], indptr[row + 1]):
                label = indices[i]
                if low <= label < high:
                    samples[ends[label - low]] = row
                    ends[label - low] += 1


@jit
def _negatives(
    rows: Array, listed: Array, indptr: Array, indices: Array, low: int, high: int, ends: Array, samples: Array
) -> None:
    for n in range(len(rows)):
        for label in listed[n]:
            if low <= label < high and not _is_positive(label, indptr, indices, rows[n]):
                samples[ends[label - low]] = rows[n]
                ends[label - low] += 1


@jit_ieee
def _fit(
    indptr: Array, indices: Array, values: Array, scales: Array, n_features: int, samples: Array, starts: Array,
    n_positive: Array, first: int, low: int, high: int, costs: Array, smallest: float, copied: int, passes: int, tolerance: float,
) -> list[Found]:  # fmt: skip
    """Solve the labels [low, high) of a block whose first is `first`, for each cost; keep what is not near zero.

    The samples of a label are copied, unless they are too many for that, with their features numbered from 0: pass after pass
    finds them and their weights in cache, whatever N and F.
    """
    number, met = np.full(n_features, -1, np.int32), np.empty(n_features, np.int32)
    own_features, own_values = np.empty(copied, np.int32), np.empty(copied, np.float32)
    counts, bias = np.zeros((len(costs), high - low), np.int64), np.full((len(costs), high - low), np.float32(UNSEEN))
    found, kept = [np.empty(1024, np.int32) for _ in costs], [np.empty(1024, np.uint16) for _ in costs]
    size = np.zeros(len(costs), np.int64)
    for label in range(low, high):
        if n_positive[label] == 0:
            continue
        rows = samples[starts[label] : starts[label + 1]]
        begins, ends, factors = indptr[rows], indptr[rows + 1], scales[rows]
        factors[n_positive[label] :] *= np.float32(-1)
        is_copied, n_met, at = (ends - begins).sum() <= copied, 0, 0
        for j in range(len(rows)):
            begin = at
            for i in range(begins[j], ends[j]):
                feature = indices[i]
                if number[feature] < 0:
                    number[feature], met[n_met] = n_met if is_copied else feature, feature
                    n_met += 1
                if is_copied:
                    own_features[at], own_values[at] = number[feature], values[i]
                    at += 1
            if is_copied:
                begins[j], ends[j] = begin, at
        weights = np.zeros((n_met if is_copied else n_features) + 1, np.float32)  # the last is the bias
        duals, known = np.zeros(len(rows), np.float32), np.sort(met[:n_met])
        of_features, of_values = (own_features, own_values) if is_copied else (indices, values)
        for c in range(len(costs)):
            _descend(
                begins, ends, of_features, of_values, factors, n_positive[label], costs[c], first + label, passes, tolerance,
                weights, duals,
            )  # fmt: skip
            if size[c] + n_met > len(kept[c]):
                more = max(n_met, len(kept[c]))
                found[c] = np.concatenate((found[c], np.empty(more, np.int32)))
                kept[c] = np.concatenate((kept[c], np.empty(more, np.uint16)))
            begin = size[c]
            for feature in known:
                weight = weights[number[feature]]
                if abs(weight) >= smallest:
                    found[c][size[c]], kept[c][size[c]] = feature, bits_of(weight)
                    size[c] += 1
            counts[c, label - low], bias[c, label - low] = size[c] - begin, weights[-1]
        for feature in known:
            number[feature] = -1
    return [(counts[c], found[c][: size[c]].copy(), kept[c][: size[c]].copy(), bias[c]) for c in range(len(costs))]


@jit_ieee
def _descend(
    begins: Array, ends: Array, features: Array, values: Array, factors: Array, n_positive: int, cost: float, seed: int,
    passes: int, tolerance: float, weights: Array, duals: Array,
) -> None:  # fmt: skip
    """Solve one label for a cost, from weights and the dual variable of each pair that belong together; leave others there.

    Pair j has the entries from begins[j] to ends[j], its factor is y / |x|; the feature that is always one has the last weight.
    """
    n, ridge, state = len(duals), np.float32(0.5 / cost), np.uint64(seed)
    order = np.arange(n)
    active, highest = n, np.float32(np.inf)
    for _ in range(passes):
        for i in range(active - 1, 0, -1):
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            j = np.int64(((state >> np.uint64(32)) * np.uint64(i + 1)) >> np.uint64(32))
            order[i], order[j] = order[j], order[i]
        most, least, at = np.float32(-np.inf), np.float32(np.inf), 0
        while at < active:
            j = order[at]
            i, stop, sign = begins[j], ends[j], np.float32(1 if j < n_positive else -1)
            one = two = three = four = np.float32(0)  # none waits for another
            while i + 4 <= stop:
                one += weights[features[i]] * values[i]
                two += weights[features[i + 1]] * values[i + 1]
                three += weights[features[i + 2]] * values[i + 2]
                four += weights[features[i + 3]] * values[i + 3]
                i += 4
            while i < stop:
                one += weights[features[i]] * values[i]
                i += 1
            total = (one + two) + (three + four)
            slope = total * factors[j] + sign * weights[-1] - np.float32(1) + ridge * duals[j]
            if duals[j] == 0 and slope > 0:
                if slope > highest:  # will stay at zero: not looked at again before the others have settled
                    active -= 1
                    order[at], order[active] = order[active], order[at]
                    continue
                most = max(most, np.float32(0))
                least = min(least, np.float32(0))
                at += 1
                continue
            most, least = max(most, slope), min(least, slope)
            curve = ridge + np.float32(2 if factors[j] != 0 else 1)
            dual = max(np.float32(0), duals[j] - slope / curve)
            step = dual - duals[j]
            duals[j] = dual
            if step != 0:
                for i in range(begins[j], stop):
                    weights[features[i]] += step * factors[j] * values[i]
                weights[-1] += sign * step
            at += 1
        if most - least <= tolerance:
            if active == n:
                break
            active, highest = n, np.float32(np.inf)
        else:
            highest = most if most > 0 else np.float32(np.inf)
