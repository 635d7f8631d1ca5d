"""How much a margin counts beside a mean logit: fitted on samples that neither stage has seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DEFAULT_WEIGHT = 1.5  # where there are no such samples: see experiments/accuracy
MOST = 30.0
SAMPLES = 20_000  # of which a fit has enough


def fit_weight(logits_Nk: npt.ArrayLike, margins_Nk: npt.ArrayLike, right_Nk: npt.ArrayLike) -> float:
    """Give the weight of margins in the logistic regression of `right` on mean logits and margins, in [0, MOST].

    DEFAULT_WEIGHT where the samples cannot tell: all right, all wrong, or logits that say nothing.
    """
    from sklearn.linear_model import LogisticRegression

    right = np.asarray(right_Nk, bool)[:SAMPLES].ravel()
    both = np.stack([np.asarray(x, np.float64)[:SAMPLES].ravel() for x in (logits_Nk, margins_Nk)], 1)
    if right.all() or not right.any():
        return DEFAULT_WEIGHT
    logit, margin = LogisticRegression(C=1e3).fit(both, right).coef_[0]
    return float(np.clip(margin / logit, 0, MOST)) if logit > 0 else DEFAULT_WEIGHT
