"""Losses of a head, as what a step needs: the gradient, written over the outputs, and the value where it is asked for.

Outputs come in chunks of C buckets as z (R, N, C); `hits` are the flat positions of the positives within the chunk, each once.
The loss of a sample is the sum over its outputs. No dense target exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def logistic(z_RNC: Tensor, hits: Tensor, want_loss: bool) -> Tensor | None:
    """Binary cross-entropy of each output: sum over all of log(1 + e^z), less z where positive; gradient sigmoid(z) - y."""
    loss = _sums(-logsigmoid(-_wide(z_RNC)), z_RNC, hits, torch.neg) if want_loss else None
    at_hits = -torch.sigmoid(-_wide(z_RNC.view(-1)[hits]))  # sigmoid(z) - 1 would lose the small ones in bfloat16
    z_RNC.sigmoid_()
    z_RNC.view(-1)[hits] = at_hits.to(z_RNC.dtype)
    return loss


def squared_hinge(z_RNC: Tensor, hits: Tensor, want_loss: bool) -> Tensor | None:
    """max(0, 1 - s z)^2 with s = 1 where positive and -1 elsewhere; gradient -2 s max(0, 1 - s z)."""
    negative = (_wide(z_RNC) + 1).clamp_(min=0).square_() if want_loss else None
    loss = None
    if negative is not None:
        loss = _sums(negative, z_RNC, hits, lambda z: (1 - z).clamp(min=0).square() - (z + 1).clamp(min=0).square())
    at_hits = (z_RNC.view(-1)[hits] - 1).clamp_(max=0).mul_(2)
    z_RNC.add_(1).clamp_(min=0).mul_(2)
    z_RNC.view(-1)[hits] = at_hits
    return loss


def softmax(z_RNC: Tensor, hits: Tensor, want_loss: bool, log_total_RN: Tensor, share: Tensor, has_RN: Tensor) -> Tensor | None:
    """Give the cross-entropy against 1/n on each of a sample's n positives; its gradient is that of z less y.

    A sample without positives contributes nothing.

    Args: log_total_RN, log-sum-exp over all B outputs; share, 1/n for each hit; has_RN, 1 where a sample has positives.
    """
    rows = torch.div(hits, z_RNC.shape[2], rounding_mode="floor")  # of (R, N)
    log_share = _wide(z_RNC.view(-1)[hits]) - log_total_RN.view(-1)[rows]
    loss = None
    if want_loss:
        of = torch.div(rows, z_RNC.shape[1], rounding_mode="floor")
        loss = log_total_RN.new_zeros(len(z_RNC)).index_add_(0, of, -log_share * share)
    z_RNC -= log_total_RN.unsqueeze(2)
    z_RNC.exp_().mul_(has_RN.unsqueeze(2))
    z_RNC.view(-1)[hits] = (log_share.exp() - share).to(z_RNC.dtype)
    return loss


def _wide(z: Tensor) -> Tensor:
    """Give z in a type whose sums are worth having: bfloat16 as float32, others as they are."""
    return z.float() if z.dtype == torch.bfloat16 else z


def _sums(negatives_RNC: Tensor, z_RNC: Tensor, hits: Tensor, correction: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over samples and outputs (R,): `negatives` everywhere, plus a correction where positive."""
    total = negatives_RNC.sum((1, 2))
    rows = torch.div(hits, z_RNC.shape[1] * z_RNC.shape[2], rounding_mode="floor")
    return total.index_add_(0, rows, correction(_wide(z_RNC.view(-1)[hits])))
