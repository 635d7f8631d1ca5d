"""Which way to order labels is the best, told by samples that neither stage has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FIRST = 5  # places that are judged: P@1, P@3 and P@5 are all parts of nDCG@5

Floats = npt.NDArray[np.floating]


def ndcg(scores_Nk: Floats, right_Nk: npt.NDArray[np.bool_], n_true_N: npt.NDArray[np.int64]) -> Floats:
    """Give the nDCG@5 of each sample, (N,), for k labels in the order of their scores, of which some are right.

    n_true is how many labels a sample has, found or not; one that has none gets 0.
    """
    discounts = 1 / np.log2(np.arange(2, 2 + min(FIRST, scores_Nk.shape[1])))
    ideal_N = np.cumsum(discounts)[np.clip(n_true_N, 1, len(discounts)) - 1]
    order_Nk = np.argsort(-scores_Nk, axis=1, kind="stable")[:, : len(discounts)]
    gains_N: Floats = np.take_along_axis(right_Nk, order_Nk, 1) @ discounts / ideal_N
    return gains_N


def best_of(tried: Sequence[Floats]) -> int:
    """Give which ordering has the best mean; the first, unless the best is ahead by more than two standard errors of its lead.

    Where many are tried, some come out ahead by luck.
    """
    best = int(np.argmax([each_N.mean() for each_N in tried]))
    lead_N = tried[best] - tried[0]
    return best if lead_N.mean() > 2 * lead_N.std() / math.sqrt(len(lead_N)) else 0
