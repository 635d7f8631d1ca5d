"""How good ranked predictions are: P@k, nDCG@k, recall@k, their propensity-scored kin, MAP, micro and macro F1.

Axes: N samples, k places of a ranked list, K labels. Predictions are `labels_Nk`, label ids in falling score order, -1 where
a list ends early. The truth is anything with CSR arrays `indptr` (N+1,) and `indices`, the ids of a row rising strictly: a
`mach.data.CSR` or a SciPy CSR matrix (an entry stored as 0 counts as a label). `indptr` may begin above 0, as in a slice.

Rows without labels count as the tools of the Extreme Classification Repository count them (`pyxclib`,
xclib/evaluation/xc_metrics.py): every metric of such a row is 0 and the row stays in the mean. The propensity-scored
metrics are ratios of sums, to which such a row adds 0 above and below.

`Evaluator` takes chunks of rows; the plain functions take everything at once and run the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mach.errors import ConfigError, DataError
from mach.kernels import jit

Array = np.ndarray[Any, Any]

PROPENSITY_AB = {"amazon": (0.6, 2.6), "wikipedia": (0.5, 0.4), "other": (0.55, 1.5)}  # A and B of Jain et al. 2016, table 2


class Rows(Protocol):
    """The label ids of N samples as CSR arrays."""

    @property
    def indptr(self) -> Array:
        """Give where each row begins and ends in `indices`: integers, (N+1,)."""

    @property
    def indices(self) -> Array:
        """Give the label ids, rising strictly within a row."""


@jit
def _mark_hits(labels_Nk: Array, indptr: Array, indices: Array, hits_Nk: Array) -> tuple[int, int]:
    """Mark the predicted labels that are true; give (row, 1: truth not rising | 2: label predicted twice), (-1, 0) if fine."""
    used = np.full(len(indices), -1, np.int64)
    for i in range(len(labels_Nk)):
        row = indices[indptr[i] : indptr[i + 1]]
        for j in range(1, len(row)):
            if row[j - 1] >= row[j]:
                return i, 1
        for j in range(labels_Nk.shape[1]):
            place = np.searchsorted(row, labels_Nk[i, j])
            if place < len(row) and row[place] == labels_Nk[i, j]:
                if used[indptr[i] + place] >= 0:
                    return i, 2
                used[indptr[i] + place] = j
                hits_Nk[i, j] = True
    return -1, 0


@jit
def _best_gains(weights_L: Array, indptr: Array, k: int) -> Array:
    """Give the k greatest weights of each row's labels in falling order, 0 where a row has fewer: (N, k)."""
    best_Nk = np.zeros((len(indptr) - 1, k))
    for i in range(len(indptr) - 1):
        row = np.sort(weights_L[indptr[i] : indptr[i + 1]])[::-1][:k]
        best_Nk[i, : len(row)] = row
    return best_Nk


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some rows of predictions beside their truth, checked; each method gives one value a row."""

    labels_Nk: Array
    hits_Nk: Array  # bool
    indptr: Array  # from 0
    indices: Array

    @classmethod
    def of(cls, labels_Nk: Array, truth: Rows) -> _Chunk:
        labels_Nk = np.asarray(labels_Nk)
        if labels_Nk.ndim != 2 or labels_Nk.dtype.kind not in "iu":
            raise DataError(f"labels_Nk must be integers of shape (N, k), got {labels_Nk.dtype} of shape {labels_Nk.shape}")
        indptr = np.array(truth.indptr, dtype=np.int64)
        if len(indptr) != len(labels_Nk) + 1:
            raise DataError(f"{len(labels_Nk)} rows of predictions against {len(indptr) - 1} rows of truth: give the same rows")
        if labels_Nk.size and labels_Nk.min() < -1:
            raise DataError(f"predicted label id {labels_Nk.min()} is negative: only -1, the end of a list, may be")
        indices = np.array(truth.indices[indptr[0] : indptr[-1]], dtype=np.int64)
        indptr -= indptr[0]
        if indices.size and indices.min() < 0:
            raise DataError(f"true label id {indices.min()} is negative")
        hits_Nk = np.zeros(labels_Nk.shape, dtype=np.bool_)
        row, slip = _mark_hits(np.ascontiguousarray(labels_Nk, dtype=np.int64), indptr, indices, hits_Nk)
        if slip == 1:
            raise DataError(f"row {row}: the true label ids must rise strictly: sort them and drop repeated ones")
        if slip == 2:
            raise DataError(f"row {row}: a true label is predicted twice: a list may name a label once")
        return cls(labels_Nk, hits_Nk, indptr, indices)

    @property
    def n_true_N(self) -> Array:
        return np.diff(self.indptr)

    def precision_N(self, k: int) -> Array:
        precision_N: Array = self.hits_Nk[:, :k].sum(axis=1) / k
        return precision_N

    def recall_N(self, k: int) -> Array:
        recall_N: Array = self.hits_Nk[:, :k].sum(axis=1) / np.maximum(self.n_true_N, 1)
        return recall_N

    def ndcg_N(self, k: int) -> Array:
        return _dcg(self.hits_Nk, k) / self._ideal_N(k)

    def average_precision_N(self) -> Array:
        k = self.hits_Nk.shape[1]
        precision_Nk = np.cumsum(self.hits_Nk, axis=1) / np.arange(1, k + 1)
        average_N: Array = (precision_Nk * self.hits_Nk).sum(axis=1) / np.clip(self.n_true_N, 1, max(k, 1))
        return average_N

    def scored(self, weights_K: Array, ks: Sequence[int]) -> dict[str, Array]:
        """Give (attained, attainable) of PSP@k and PSnDCG@k, summed over the rows."""
        highest = max(self.indices.max(initial=-1), self.labels_Nk.max(initial=-1))
        if highest >= len(weights_K):
            raise DataError(f"label id {highest} has no propensity: there are {len(weights_K)}, one a label")
        gains_Nk = weights_K[self.labels_Nk] * self.hits_Nk
        best_Nk = _best_gains(weights_K[self.indices], self.indptr, max(ks, default=0))
        sums = {}
        for k in ks:
            ideal_N = self._ideal_N(k)
            sums[f"PSP@{k}"] = np.array([gains_Nk[:, :k].sum(), best_Nk[:, :k].sum()])
            sums[f"PSnDCG@{k}"] = np.array([(_dcg(gains_Nk, k) / ideal_N).sum(), (_dcg(best_Nk, k) / ideal_N).sum()])
        return sums

    def _ideal_N(self, k: int) -> Array:
        """Give the DCG@k of a list that begins with all true labels; 1 for a row without, whose DCG is 0."""
        return np.concatenate([[1.0], np.cumsum(_discounts(k))])[np.minimum(self.n_true_N, k)]


def hits(labels_Nk: Array, truth: Rows) -> Array:
    """Tell of each predicted label whether it is true: bool (N, k), False where a list has ended.

    Raises: DataError as the module says.
    """
    return _Chunk.of(labels_Nk, truth).hits_Nk


def _discounts(k: int) -> Array:
    return 1.0 / np.log2(np.arange(2, k + 2))


def _dcg(gains_Nk: Array, k: int) -> Array:
    gains_Nk = gains_Nk[:, :k]
    dcg_N: Array = gains_Nk @ _discounts(gains_Nk.shape[1])
    return dcg_N


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else 0.0


def _check_k(name: str, k: int, length: float = math.inf) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError(f"{name}={k!r} must be a whole number of at least 1")
    if k > length:
        raise ConfigError(f"{name}={k} exceeds the {length} labels a row of these predictions: predict with a larger top-k")


def _mean_at_k(labels_Nk: Array, truth: Rows, k: int, row_values: Callable[[_Chunk, int], Array]) -> float:
    chunk = _Chunk.of(labels_Nk, truth)
    _check_k("k", k, chunk.labels_Nk.shape[1])
    _check_rows(len(chunk.labels_Nk))
    return float(row_values(chunk, k).mean())


def _check_rows(n_samples: int) -> None:
    if not n_samples:
        raise DataError("there are no rows to evaluate: is the split empty?")


def precision_at_k(labels_Nk: Array, truth: Rows, k: int) -> float:
    """Give P@k, the share of the first k labels that are true: mean over rows of |top_k & true| / k.

    It divides by k also where a row has fewer true labels, so P@5 of one label a row is 0.2 at most.

    Raises: ConfigError if k < 1 or k exceeds the lists; DataError if the arrays disagree or are not as the module says.
    Source: Agrawal et al., WWW 2013; the definition of the Extreme Classification Repository.
    """
    return _mean_at_k(labels_Nk, truth, k, _Chunk.precision_N)


def recall_at_k(labels_Nk: Array, truth: Rows, k: int) -> float:
    """Give R@k, the share of the true labels among the first k: mean over rows of |top_k & true| / |true|, 0 without any.

    Raises: as `precision_at_k`.
    Source: Manning, Raghavan and Schuetze 2008, Introduction to Information Retrieval, 8.3; `recall` of pyxclib.
    """
    return _mean_at_k(labels_Nk, truth, k, _Chunk.recall_N)


def ndcg_at_k(labels_Nk: Array, truth: Rows, k: int) -> float:
    """Give nDCG@k with gains of 0 and 1: mean over rows of DCG@k / (DCG@k of the best list).

    DCG@k = sum over places j = 1..k of [label j is true] / log2(j + 1); the best list has min(k, |true|) hits at its head.

    Raises: as `precision_at_k`.
    Source: Jarvelin and Kekalainen, ACM TOIS 20(4), 2002; `ndcg` of pyxclib.
    """
    return _mean_at_k(labels_Nk, truth, k, _Chunk.ndcg_N)


def mean_average_precision(labels_Nk: Array, truth: Rows) -> float:
    """Give MAP over the lists as they are: mean over rows of (sum over hits at place j of P@j) / min(k, |true|).

    Dividing by min(k, |true|) lets a list of hits alone score 1 however short it is; where no row has more than k true
    labels this is MAP as TREC has it, with the true labels beyond the list never found.

    Raises: DataError as `precision_at_k`.
    Source: Manning, Raghavan and Schuetze 2008, Introduction to Information Retrieval, 8.4.
    """
    return _mean_at_k(labels_Nk, truth, 1, lambda chunk, _: chunk.average_precision_N())


def propensities(label_counts_K: Array, n_samples: int, a: float = 0.55, b: float = 1.5) -> Array:
    """Give each label's propensity, the modelled chance that it was recorded where it holds: float64 (K,) in (0, 1].

    p_l = 1 / (1 + C (N_l + b)^-a) with C = (log N - 1) (b + 1)^a, N training samples, N_l of them with label l.
    (a, b) is (0.6, 2.6) for Amazon, (0.5, 0.4) for Wikipedia, else (0.55, 1.5): `PROPENSITY_AB`.

    Raises: DataError if n_samples < 3 (log N - 1 is negative then) or a count lies outside [0, n_samples];
            ConfigError if a or b is not positive.
    Source: Jain, Prabhu and Varma, KDD 2016, section 5; `compute_inv_propesity` of pyxclib gives 1 / p.
    """
    if not (0 < a < math.inf and 0 < b < math.inf):
        raise ConfigError(f"propensity a={a} and b={b} must be positive, such as 0.55 and 1.5")
    if n_samples < 3:
        raise DataError(f"propensities need at least 3 training samples, got {n_samples}")
    counts_K = np.asarray(label_counts_K, dtype=np.float64)
    if counts_K.size and not (counts_K.min() >= 0 and counts_K.max() <= n_samples):
        raise DataError(
            f"label counts must lie in [0, {n_samples}], the training samples, got {counts_K.min()}..{counts_K.max()}"
        )
    c = (math.log(n_samples) - 1) * (b + 1) ** a
    propensity_K: Array = 1 / (1 + c * (counts_K + b) ** -a)
    return propensity_K


def psp_at_k(labels_Nk: Array, truth: Rows, propensities: Array, k: int) -> float:
    """Give PSP@k: sum over rows of sum over hits l in the top k of 1/p_l, against the greatest such sum attainable.

    The best list of a row names its true labels of the smallest propensity first. Ratio of sums over all rows, in [0, 1].

    Raises: as `precision_at_k`; ConfigError if a propensity lies outside (0, 1]; DataError if a label has none.
    Source: Jain, Prabhu and Varma, KDD 2016; normalised as `psprecision` of pyxclib.
    """
    return _scored_at_k("PSP", labels_Nk, truth, propensities, k)


def psndcg_at_k(labels_Nk: Array, truth: Rows, propensities: Array, k: int) -> float:
    """Give PSnDCG@k: as nDCG@k with a hit worth 1/p_l, against the same sum for the best attainable lists.

    Above: sum over rows of (sum over places j of [hit] / (p_l log2(j + 1))) / (sum over j <= min(k, |true|) of 1 / log2(j + 1)).
    Below: the same for the true labels in order of rising propensity.

    Raises: as `psp_at_k`.
    Source: Jain, Prabhu and Varma, KDD 2016; normalised as `psndcg` of pyxclib.
    """
    return _scored_at_k("PSnDCG", labels_Nk, truth, propensities, k)


def _scored_at_k(name: str, labels_Nk: Array, truth: Rows, propensity_K: Array, k: int) -> float:
    chunk = _Chunk.of(labels_Nk, truth)
    _check_k("k", k, chunk.labels_Nk.shape[1])
    _check_rows(len(chunk.labels_Nk))
    return _ratio(*chunk.scored(_inverse(propensity_K), [k])[f"{name}@{k}"])


def _inverse(propensity_K: Array) -> Array:
    propensity_K = np.asarray(propensity_K, dtype=np.float64)
    if not ((propensity_K > 0) & (propensity_K <= 1)).all():
        raise ConfigError("propensities must lie in (0, 1]: are these their inverses?")
    inverse_K: Array = 1 / propensity_K
    return inverse_K


def micro_macro_f1(labels_Nk: Array, scores_Nk: Array, truth: Rows, *, threshold: float, n_labels: int) -> tuple[float, float]:
    """Give micro and macro F1 where a listed label of score >= threshold is predicted and no other is.

    F1 = 2 TP / (2 TP + FP + FN). Micro: of the counts summed over labels. Macro: the mean of F1 over all K labels; one that is
    neither true nor predicted in any row counts as 0, as scikit-learn's `f1_score` has it with zero_division=0.

    Raises: DataError as `precision_at_k`, or if scores and labels differ in shape, or an id reaches n_labels.
    Source: Lewis et al., JMLR 5, 2004, section 5.3.
    """
    evaluator = Evaluator(n_labels, ks=(), recall_ks=(), threshold=threshold)
    evaluator.update(labels_Nk, scores_Nk, truth)
    result = evaluator.result()
    return result["micro-F1"], result["macro-F1"]


class Evaluator:
    """Adds up every metric over chunks of rows, in memory that does not grow with the rows.

    Args:   n_labels, K; ks, of P, nDCG, PSP and PSnDCG; recall_ks, of recall; propensities (K,), without which PSP and PSnDCG
            are left out; threshold, without which F1 is left out. A k beyond the length of the lists is left out of the result.
    Raises: ConfigError for a k below 1, a propensity outside (0, 1] or not one a label.
    """

    def __init__(
        self,
        n_labels: int,
        *,
        ks: Sequence[int] = (1, 3, 5),
        recall_ks: Sequence[int] = (10, 100),
        propensities: Array | None = None,
        threshold: float | None = None,
    ):
        for k in (*ks, *recall_ks):
            _check_k("k", k)
        if propensities is not None and len(propensities) != n_labels:
            raise ConfigError(f"{len(propensities)} propensities for {n_labels} labels: give one a label")
        self._n_labels, self._ks, self._recall_ks, self._threshold = n_labels, ks, recall_ks, threshold
        self._weights_K = None if propensities is None else _inverse(propensities)
        self._sums: dict[str, float] = {}
        self._pairs: dict[str, Array] = {}  # (attained, attainable)
        self._counts_3K = np.zeros((3, n_labels if threshold is not None else 0), dtype=np.int64)  # TP, predicted, true
        self._n_samples = 0
        self._length: int | None = None  # of the lists

    def update(self, labels_Nk: Array, scores_Nk: Array | None, truth: Rows) -> None:
        """Add some rows: their ranked labels, the labels' scores (None will do without a threshold), their truth.

        Raises: DataError as the module says, or if a label id reaches n_labels, or the lists differ in length between chunks.
        """
        chunk = _Chunk.of(labels_Nk, truth)
        self._check(chunk)
        self._length = chunk.labels_Nk.shape[1]
        ks = [k for k in self._ks if k <= self._length]
        values = {f"P@{k}": chunk.precision_N(k) for k in ks} | {f"nDCG@{k}": chunk.ndcg_N(k) for k in ks}
        values |= {f"R@{k}": chunk.recall_N(k) for k in self._recall_ks if k <= self._length}
        values["MAP"] = chunk.average_precision_N()
        for key, value_N in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value_N.sum())
        if self._weights_K is not None:
            for key, pair in chunk.scored(self._weights_K, ks).items():
                self._pairs[key] = self._pairs.get(key, 0.0) + pair
        if self._threshold is not None:
            self._count(chunk, scores_Nk, self._threshold)
        self._n_samples += len(chunk.labels_Nk)

    def _check(self, chunk: _Chunk) -> None:
        for whose, ids in (("predicted", chunk.labels_Nk), ("true", chunk.indices)):
            if ids.size and ids.max() >= self._n_labels:
                raise DataError(f"{whose} label id {ids.max()} is outside [0, {self._n_labels}): are these of another data set?")
        if self._length not in (None, chunk.labels_Nk.shape[1]):
            raise DataError(f"lists of {chunk.labels_Nk.shape[1]} labels after lists of {self._length}: pad the shorter with -1")

    def _count(self, chunk: _Chunk, scores_Nk: Array | None, threshold: float) -> None:
        scores_Nk = np.asarray(scores_Nk)
        if scores_Nk.shape != chunk.labels_Nk.shape:
            raise DataError(f"F1 at a threshold needs scores of shape {chunk.labels_Nk.shape}, got {scores_Nk.shape}")
        is_predicted_Nk: Array = (scores_Nk >= threshold) & (chunk.labels_Nk >= 0)
        np.add.at(self._counts_3K[0], chunk.labels_Nk[is_predicted_Nk & chunk.hits_Nk], 1)
        np.add.at(self._counts_3K[1], chunk.labels_Nk[is_predicted_Nk], 1)
        np.add.at(self._counts_3K[2], chunk.indices, 1)

    def result(self) -> dict[str, float]:
        """Give every metric of the rows so far, in [0, 1]: P@k, nDCG@k, R@k, PSP@k, PSnDCG@k, MAP, micro-F1, macro-F1.

        Raises: DataError if there were no rows.
        """
        _check_rows(self._n_samples)
        means = {key: total / self._n_samples for key, total in self._sums.items()}
        scored = {key: _ratio(*pair) for key, pair in self._pairs.items()}
        if self._threshold is None:
            return means | scored
        hits_K, others_K = 2 * self._counts_3K[0], self._counts_3K[1] + self._counts_3K[2]
        macro = float((hits_K / np.maximum(others_K, 1)).mean())
        return means | scored | {"micro-F1": _ratio(hits_K.sum(), others_K.sum()), "macro-F1": macro}
