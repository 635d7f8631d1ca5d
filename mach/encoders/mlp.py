"""What follows the input layer: bias, ReLU, dropout and residual layers, R repetitions packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Mask = Callable[[Tensor], Tensor]


class MLP:
    """z (N, R, D) -> hidden vectors (R, N, D): h = relu(z + b), then h + relu(h W + b) for each further layer.

    parameters: `input.bias` (R, D) and, for layer i, `layers.i.weight` (R, D, D) and `layers.i.bias` (R, D).
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.bias = parameters["input.bias"]
        n_layers = sum(name.startswith("layers.") and name.endswith(".weight") for name in parameters)
        self.layers = [(parameters[f"layers.{i}.weight"], parameters[f"layers.{i}.bias"]) for i in range(n_layers)]

    def forward(self, z_NRD: Tensor, drop: Mask | None = None) -> Tensor:
        """Give the hidden vectors (R, N, D). `drop` maps a (R, N, D) tensor to itself with some entries dropped."""
        drop = drop or (lambda x: x)
        hidden = drop(torch.relu((z_NRD + self.bias).transpose(0, 1)))
        for weight, bias in self.layers:
            hidden = hidden + drop(torch.relu(torch.baddbmm(bias.unsqueeze(1), hidden, weight)))
        return hidden
