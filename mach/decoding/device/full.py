"""`full_topk` on the outputs' own device: each chunk's k best are joined with the k best so far.

Axes: N samples, K labels, C labels of a chunk, L labels excluded in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from mach.decoding.device.labels import k_best
from mach.decoding.estimators import LIMIT, LOG_SIGMOID, LOG_SOFTMAX, SIGMOID, SOFTMAX, refuse
from mach.decoding.only import Lists
from mach.decoding.topk import TopK

Chunks = Callable[[], Iterator[tuple[int, Tensor]]]  # first label of each, and its outputs (N, C)


def full_topk_on_device(
    every: Chunks, allowed: Chunks, n_samples: int, k: int, kind: int, lists: Lists, device: torch.device, first_sample: int
) -> TopK:
    """Give the k best of what is allowed; see `mach.decoding.full`. Outputs are overwritten.

    What came in earlier chunks stands before a chunk's own: so of equal scores the smaller label stays the first.
    """
    is_good_N = torch.ones(n_samples, dtype=torch.bool, device=device)
    shares = _shares(every, is_good_N) if kind in (SOFTMAX, LOG_SOFTMAX) else None
    starts, excluded_L = torch.from_numpy(lists.starts), torch.from_numpy(lists.labels).to(device)
    rows_L = torch.repeat_interleave(torch.arange(n_samples), starts.diff()).to(device)
    scores = torch.full((n_samples, 0), -torch.inf, device=device)
    labels = torch.zeros((n_samples, 0), dtype=torch.int64, device=device)
    for start, z_NC in allowed():
        is_good_N &= _are_good(z_NC)
        scores_NC = _scores(z_NC, kind, shares)
        if len(excluded_L):
            here = (excluded_L >= start) & (excluded_L < start + z_NC.shape[1])
            scores_NC[rows_L[here], excluded_L[here] - start] = -torch.inf
        best = k_best(scores_NC, min(k, z_NC.shape[1]))
        joined = torch.cat([scores, scores_NC.gather(1, best)], 1), torch.cat([labels, best + start], 1)
        order = k_best(joined[0], min(k, joined[0].shape[1]))
        scores, labels = (x.gather(1, order) for x in joined)
    if not bool(is_good_N.all()):
        refuse(first_sample + int((~is_good_N).nonzero()[0]), 0)
    return TopK(labels.cpu().numpy(), scores.cpu().numpy())


def _are_good(z_NC: Tensor) -> Tensor:
    return (z_NC.abs() < float(LIMIT)).all(1)  # false for nan


def _shares(every: Chunks, is_good_N: Tensor) -> tuple[Tensor, Tensor]:
    """Give the greatest output and the logarithm of the sum over all labels of e**(output - it), (N, 1) each.

    Notes in is_good_N which outputs are out of range.
    """
    most = torch.full((len(is_good_N), 1), -torch.inf, device=is_good_N.device)
    total = torch.zeros_like(most)
    for _, z_NC in every():
        is_good_N &= _are_good(z_NC)
        higher = torch.maximum(most, z_NC.amax(1, keepdim=True))
        total = total * (most - higher).exp_() + (z_NC - higher).exp_().sum(1, keepdim=True)
        most = higher
    return most, total.log_()


def _scores(z_NC: Tensor, kind: int, shares: tuple[Tensor, Tensor] | None) -> Tensor:
    """Transform a chunk of outputs, as `device_bucket_scores` does whole rows, to rounding."""
    if kind == SIGMOID:
        return z_NC.sigmoid_()
    if kind == LOG_SIGMOID:
        return functional.logsigmoid(z_NC)
    if shares is None:
        return z_NC
    log_shares = z_NC.sub_(shares[0]).sub_(shares[1])
    return log_shares.exp_() if kind == SOFTMAX else log_shares
