"""AdamW for dense parameters, chunk by chunk; a row-wise Adam without momentum for the rows of the input layer.

The fused kernel that updates a dense parameter in one pass is torch's. A row of the input layer is touched only by batches
that hold its feature; it keeps one second moment a repetition instead of two moments a weight (R floats against 2 R D).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Optimizer:
    """The state of one packed model's optimiser; every update happens in place.

    Moments are kept for each parameter (two of its shape) but the input weight (F, R), all zeros at the start.
    Source: Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101 (decoupled decay).
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, weight_decay: float, row_wise: str):
        self.parameters, self.weight_decay, self.row_wise = parameters, weight_decay, row_wise
        self.step, self.rate, self.row_rate = 0, 0.0, 0.0
        self.state: dict[str, Tensor] = {}
        for name, value in parameters.items():
            if name == row_wise:
                self.state[f"{name}.second"] = value.new_zeros(value.shape[:2])
            else:
                self.state[f"{name}.first"] = torch.zeros_like(value)
                self.state[f"{name}.second"] = torch.zeros_like(value)

    def begin_step(self, *, rate: float, row_rate: float) -> None:
        """Start a step with its step sizes: one for the dense parameters, one for the rows of the input layer."""
        self.step, self.rate, self.row_rate = self.step + 1, rate, row_rate

    def update(self, name: str, part: slice, gradient: Tensor) -> None:
        """Update `parameter[:, part]` with a gradient of that shape (AdamW)."""
        weight, first, second = (x[:, part].unbind(0) for x in (self.parameters[name], *self._moments(name)))
        steps = [torch.tensor(self.step - 1.0, device=gradient.device) for _ in weight]  # the kernel adds one
        adamw(
            list(weight),
            list(gradient.contiguous().unbind(0)),  # the kernel reads its memory in a row
            list(first),
            list(second),
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.rate,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.first"], self.state[f"{name}.second"]

    def update_rows(self, rows: Tensor | None, gradient_URD: Tensor) -> None:
        """Update rows of the input weight (None: all of them), one step size a row and repetition.

        v <- b2 v + (1 - b2) mean_d g^2;  w <- w - rate g / (sqrt(v / (1 - b2^t)) + eps).  A row's v waits between its batches.
        """
        weight, second = self.parameters[self.row_wise], self.state[f"{self.row_wise}.second"]
        mean_square = torch.linalg.vector_norm(gradient_URD, dim=2).square_().div_(gradient_URD.shape[2])
        moment = (second if rows is None else second[rows]).lerp(mean_square, 1 - BETAS[1])
        scale = self.row_rate / ((moment / (1 - BETAS[1] ** self.step)).sqrt_() + EPSILON)
        change = gradient_URD.mul_(scale.unsqueeze(2))
        if rows is None:
            second.copy_(moment)
            weight.sub_(change)
        else:
            second[rows] = moment
            weight.index_add_(0, rows, change, alpha=-1)
