"""The truth that every fast path is held to: float64 loops over one sample that read like the paper (arXiv:1910.13830).

Axes: K labels, B buckets, R repetitions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mach.config import Estimator, Loss


def log_probabilities(logits_B: Sequence[float], loss: Loss) -> list[float]:
    """Give log P(bucket | x) of one repetition: log-softmax for the softmax loss, log-sigmoid for the others."""
    if loss == "softmax":
        top = max(logits_B)
        log_total = top + math.log(sum(math.exp(z - top) for z in logits_B))
        return [z - log_total for z in logits_B]
    return [min(z, 0.0) - math.log1p(math.exp(-abs(z))) for z in logits_B]


def label_scores(
    logits_RB: Sequence[Sequence[float]],
    table_RK: Sequence[Sequence[int]],
    *,
    loss: Loss,
    estimator: Estimator,
    is_identity: bool = False,
) -> list[float]:
    """Score every label of one sample from the bucket it fell into, in each repetition.

    "mean" is unbiased if two labels share a bucket with chance 1/B. In the identity table no two do, so there the mean of P is
    already unbiased and is the score.

    Returns: K scores.
    """
    R, B, K = len(table_RK), len(logits_RB[0]), len(table_RK[0])
    logits_RB = [[float(z) for z in row] for row in logits_RB]
    log_probs_RB = [log_probabilities(row, loss) for row in logits_RB]
    scores_K = []
    for k in range(K):
        logits_R = [logits_RB[r][table_RK[r][k]] for r in range(R)]
        log_probs_R = [log_probs_RB[r][table_RK[r][k]] for r in range(R)]
        probs_R = [math.exp(log_p) for log_p in log_probs_R]
        if estimator == "logits":
            scores_K.append(sum(logits_R))
        elif estimator == "log-probs":
            scores_K.append(sum(log_probs_R))
        elif estimator == "min":  # count-min: a collision can only add
            scores_K.append(min(probs_R))
        elif estimator == "median":
            scores_K.append(statistics.median(probs_R))
        elif is_identity:  # R = 1
            scores_K.append(probs_R[0])
        else:
            scores_K.append(B / (B - 1) * (sum(probs_R) / R - 1 / B))
    return scores_K


def topk(scores_K: Sequence[float], k: int) -> list[int]:
    """Give the k labels of the greatest scores, greatest first; of equal scores the smaller label id goes first."""
    return sorted(range(len(scores_K)), key=lambda label: (-scores_K[label], label))[:k]
