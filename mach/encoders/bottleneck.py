"""A linear layer between hidden vectors and head, R repetitions packed: it makes the head, the largest part, narrower."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WEIGHT = "bottleneck.weight"
Update = Callable[[str, slice, Tensor, Tensor | None], None]  # see `mach.heads`


class Bottleneck:
    """h (R, N, D) -> h W (R, N, V), V wide, without activation: weight (R, D, V).

    Source: Sainath et al. 2013, ICASSP (a last layer of low rank).
    """

    def __init__(self, weight_RDV: Tensor):
        self.weight = weight_RDV

    def __call__(self, hidden_RND: Tensor) -> Tensor:
        """Give the narrow vectors (R, N, V), multiplied in the type of the hidden vectors."""
        return torch.bmm(hidden_RND, self.weight.to(hidden_RND.dtype))

    def backward(self, hidden_RND: Tensor, grad_RNV: Tensor, update: Update) -> Tensor:
        """Give the gradient of the hidden vectors, of the type of that of the narrow ones, and update the weight."""
        low = grad_RNV.to(hidden_RND.dtype)
        grad_hidden = torch.bmm(low, self.weight.to(low.dtype).transpose(1, 2)).to(grad_RNV.dtype)
        update(WEIGHT, slice(None), torch.bmm(hidden_RND.transpose(1, 2), low), None)
        return grad_hidden
