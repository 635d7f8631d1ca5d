"""How much a margin, and in it a label's prototype, counts beside a mean logit: chosen on samples that neither stage has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

DEFAULT_WEIGHT = 1.5  # where there are no such samples: see experiments/accuracy
WEIGHTS = (DEFAULT_WEIGHT, 0.0, 0.4, 0.75, 3.0, 6.0, 12.0, 24.0)
PROTOTYPES = (0.0, 0.5, 1.0, 2.0, 4.0)
SAMPLES = 20_000  # of which a choice has enough
FIRST = 5  # places that are judged: P@1, P@3 and P@5 are all parts of nDCG@5

Floats = npt.NDArray[np.floating]


class Mix(NamedTuple):
    """How a label is scored: logit + weight (margin + prototype likeness)."""

    which: int  # of the margins tried
    weight: float
    prototype: float


def best_mix(
    logits_Nk: Floats, margins: Sequence[Floats], likeness_Nk: Floats, right_Nk: npt.NDArray[np.bool_],
    n_true_N: npt.NDArray[np.int64], *, weights: Sequence[float] = WEIGHTS,
) -> Mix:  # fmt: skip
    """Try all margins, weights and prototypes, and give the mix of the best nDCG@5.

    The first of each, without prototypes, is kept unless the best is better by more than the standard error of what it gains:
    with so many tried, some come out ahead by luck.

    Args: logits, mean logits of each sample's k best labels, best first; margins, of the same by each fit, and likenesses; right,
          whether they are true; n_true, how many labels each sample has.
    """
    discounts = 1 / np.log2(np.arange(2, 2 + min(FIRST, logits_Nk.shape[1])))
    ideal_N = np.cumsum(discounts)[np.clip(n_true_N, 1, len(discounts)) - 1]
    tried: list[tuple[Mix, Floats]] = []
    for which, margins_Nk in enumerate(margins):
        for weight in weights:
            for prototype in PROTOTYPES if weight else PROTOTYPES[:1]:
                order_Nk = np.argsort(-(logits_Nk + weight * (margins_Nk + prototype * likeness_Nk)), axis=1, kind="stable")
                gains_Nk = np.take_along_axis(right_Nk, order_Nk[:, : len(discounts)], 1)
                tried.append((Mix(which, weight, prototype), gains_Nk @ discounts / ideal_N))
    (usual, usual_N), (best, best_N) = tried[0], max(tried, key=lambda each: each[1].mean())
    gain_N = best_N - usual_N
    return best if gain_N.mean() > gain_N.std() / math.sqrt(len(gain_N)) else usual
