"""`bucket_scores` on a tensor's own device: what `mach.decoding.estimators` does to numpy arrays, with torch's functions.

Equal to it to float32 rounding, not in bits: each has its own exp. Near-ties may so be ordered otherwise on another device.

Axes: N samples, R repetitions, B buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mach.config import Estimator, Loss
from mach.decoding.estimators import LIMIT
from mach.errors import ConfigError


def device_bucket_scores(logits_NRB: Tensor, *, loss: Loss, estimator: Estimator, repetitions: Sequence[int] = ()) -> Tensor:
    """Turn head outputs into bucket scores such that aggregating them over r scores a label.

    Args:    logits_NRB, float32: unchanged. repetitions, the number of each row, for the error text.
    Returns: float32 (N, R, B); finite.
    Raises:  ConfigError if an output is not finite or reaches 1e30.
    """
    _check_finite(logits_NRB, repetitions)
    if estimator == "logits":
        return logits_NRB
    if estimator == "log-probs":
        return torch.log_softmax(logits_NRB, 2) if loss == "softmax" else functional.logsigmoid(logits_NRB)
    probs_NRB = torch.softmax(logits_NRB, 2) if loss == "softmax" else torch.sigmoid(logits_NRB)
    if estimator == "mean":
        R, B = logits_NRB.shape[1:]
        probs_NRB.mul_(B / ((B - 1) * R)).sub_(1 / ((B - 1) * R))
    return probs_NRB


def _check_finite(logits_NRB: Tensor, repetitions: Sequence[int]) -> None:
    good_NR = (logits_NRB.abs() < float(LIMIT)).all(dim=2)  # false for nan
    if not bool(good_NR.all()):
        sample, row = (~good_NR).nonzero()[0].tolist()
        raise ConfigError(
            f"sample {sample}, repetition {repetitions[row] if repetitions else row}: the head gave an output that is not a "
            f"finite number below {LIMIT:.0e}; train or copy this repetition again, or decode without it"
        )
