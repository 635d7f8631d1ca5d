"""Bucket scores of R repetitions -> the k best of K labels, exactly.

    head outputs (N, R, B) -> estimators.bucket_scores, in place -> scan.scan_topk, or the plain top-k of the full head -> TopK

`decode_topk` is the one entry. Read `reference` first: it is the truth in loops.
"""

from __future__ import annotations

from mach.config import Estimator, Loss
from mach.decoding.estimators import Float32, bucket_scores
from mach.decoding.scan import scan_topk
from mach.decoding.topk import TopK, check_k, topk_identity
from mach.errors import ConfigError
from mach.hashing.table import LabelTable
from mach.kernels import N_THREADS

__all__ = ["TopK", "decode_topk"]


def decode_topk(
    logits_NRB: Float32, table: LabelTable, k: int, *, loss: Loss, estimator: Estimator, n_threads: int = N_THREADS
) -> TopK:
    """Give the k best labels of each sample from the raw outputs of the heads.

    With the identity table "mean", "min" and "median" are all P itself: no two labels share a bucket, so there is no bias to
    take out. The result has the same bits for any number of threads.

    Args:    logits_NRB, float32, C-contiguous: overwritten. The rows are the table's repetitions, in its order.
    Raises:  ConfigError if k is outside [1, K], R or B is not the table's, or an output is not finite (names the repetition).
    """
    check_k(k, table.n_labels)
    if logits_NRB.shape[1:] != (table.n_repetitions, table.n_buckets):
        raise ConfigError(
            f"head outputs of shape {logits_NRB.shape} do not fit the table: they must be "
            f"(N, {table.n_repetitions}, {table.n_buckets}), its repetitions and buckets"
        )
    if table.is_identity and estimator == "mean":
        estimator = "min"
    scores_NRB = bucket_scores(logits_NRB, loss=loss, estimator=estimator, repetitions=table.repetitions, n_threads=n_threads)
    if table.is_identity:
        return topk_identity(scores_NRB[:, 0], k, n_threads=n_threads)
    return scan_topk(scores_NRB, table.array(), k, estimator=estimator, n_threads=n_threads)
