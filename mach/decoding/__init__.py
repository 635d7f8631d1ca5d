"""Bucket scores of R repetitions -> the k best of K labels, exactly.

    head outputs (N, R, B) -> estimators.bucket_scores, in place -> exact.exact_topk: pruned where it pays, else scanned -> TopK
                                                               or the plain top-k of the full head
    outputs on another device than the CPU                  -> the same in `device`, there

`decode_topk` is the one entry, `decode_scores` its second half, for who holds bucket scores already. Read `reference` first: it
is the truth in loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mach.config import Estimator, Loss
from mach.decoding.estimators import Float32, bucket_scores
from mach.decoding.exact import exact_topk
from mach.decoding.only import check_exclude, check_restrict
from mach.decoding.topk import TopK, check_k, topk_identity
from mach.errors import ConfigError
from mach.hashing.table import LabelTable
from mach.kernels import N_THREADS, array_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TopK", "decode_scores", "decode_topk"]


def decode_topk(
    logits_NRB: Float32 | Tensor,
    table: LabelTable,
    k: int,
    *,
    loss: Loss,
    estimator: Estimator,
    restrict: npt.ArrayLike | None = None,
    exclude: Sequence[npt.ArrayLike] | None = None,
    n_threads: int = N_THREADS,
) -> TopK:
    """Give the k best labels of each sample from the raw outputs of the heads.

    With the identity table "mean", "min" and "median" are all P itself: no two labels share a bucket, so there is no bias to
    take out. The result has the same bits for any number of threads. On another device than the CPU the transform of the outputs
    may round otherwise ("logits" has none), and so the scores; what is made of them is the same.

    Args:    logits_NRB, float32, C-contiguous, an array or a tensor, which is decoded on its own device: overwritten if on the
             CPU. The rows are the table's repetitions, in its order.
             restrict, label ids to choose among, for all samples. exclude, N lists of label ids, what each sample may not find.
    Raises:  ConfigError if k is outside [1, K], R or B is not the table's, or an output is not finite (names the repetition);
             if a label is outside [0, K), or fewer than k labels are left to a sample.
    """
    check_k(k, table.n_labels)
    _check_fits(logits_NRB, table)
    estimator = estimator_for(table, estimator)
    how: dict[str, Any] = {"restrict": restrict, "exclude": exclude}
    if not isinstance(logits_NRB, np.ndarray) and logits_NRB.device.type != "cpu":
        return _on_device(logits_NRB, table, k, loss, estimator, how)
    outputs_NRB: Float32 = logits_NRB if isinstance(logits_NRB, np.ndarray) else array_of(logits_NRB)
    scores_NRB = bucket_scores(outputs_NRB, loss=loss, estimator=estimator, repetitions=table.repetitions, n_threads=n_threads)
    return decode_scores(scores_NRB, table, k, estimator=estimator, n_threads=n_threads, **how)


def estimator_for(table: LabelTable, estimator: Estimator) -> Estimator:
    """Give the estimator that stands for another in this table: "min" for "mean" in the identity, where it is P itself."""
    return "min" if table.is_identity and estimator == "mean" else estimator


def decode_scores(
    scores_NRB: Float32,
    table: LabelTable,
    k: int,
    *,
    estimator: Estimator,
    restrict: npt.ArrayLike | None = None,
    exclude: Sequence[npt.ArrayLike] | None = None,
    n_threads: int = N_THREADS,
) -> TopK:
    """Give the k best labels of each sample from what `bucket_scores` gave for `estimator_for` this table; see `decode_topk`.

    With the identity table the scores of excluded labels are overwritten.
    """
    check_k(k, table.n_labels)
    _check_fits(scores_NRB, table)
    if table.is_identity:
        return _identity(scores_NRB[:, 0], k, restrict, exclude, n_threads)
    how: dict[str, Any] = {"restrict": restrict, "exclude": exclude, "n_threads": n_threads}
    return exact_topk(scores_NRB, table, k, estimator=estimator, **how)[0]


def _on_device(logits_NRB: Tensor, table: LabelTable, k: int, loss: Loss, estimator: Estimator, how: dict[str, Any]) -> TopK:
    from mach.decoding.device import device_bucket_scores, topk_on_device  # here, as they load torch

    scores_NRB = device_bucket_scores(logits_NRB, loss=loss, estimator=estimator, repetitions=table.repetitions)
    found = topk_on_device(scores_NRB, table, k, estimator=estimator, **how)
    return TopK(found.labels.cpu().numpy(), found.scores.cpu().numpy())


def _check_fits(outputs_NRB: Float32 | Tensor, table: LabelTable) -> None:
    if outputs_NRB.shape[1:] != (table.n_repetitions, table.n_buckets):
        raise ConfigError(
            f"head outputs of shape {outputs_NRB.shape} do not fit the table: they must be "
            f"(N, {table.n_repetitions}, {table.n_buckets}), its repetitions and buckets"
        )


def _identity(
    scores_NK: Float32, k: int, restrict: npt.ArrayLike | None, exclude: Sequence[npt.ArrayLike] | None, n_threads: int
) -> TopK:
    """Give the plain top-k, of the labels that may be found; overwrites the scores of the others."""
    N, K = scores_NK.shape
    subset = None if restrict is None else check_restrict(restrict, K, k)
    if exclude is not None:
        lists = check_exclude(exclude, N, K, subset, k)
        scores_NK[np.repeat(np.arange(N), np.diff(lists.starts)), lists.labels] = -np.inf
    if subset is None:
        return topk_identity(scores_NK, k, n_threads=n_threads)
    found = topk_identity(scores_NK[:, subset], k, n_threads=n_threads)
    return TopK(subset[found.labels], found.scores)
