"""AdamW for dense parameters, chunk by chunk; row-wise Adam without momentum for the input layer's rows; a rule for the head.

A dense parameter is updated in one pass: by torch's fused kernel on a GPU, by our own on a CPU (`train/adamw.py`). A row of
the input layer is touched only by batches that hold its feature; it keeps one second moment a repetition instead of two
moments a weight (R floats against 2 R D). The head may have a rule, a step size and a storage of its own (`train/rules.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mach.encoders import Input, SparseInput
from mach.gpu import has_triton
from mach.heads import Rule, Ruled
from mach.heads.rounding import NARROW, key_of, narrow_rows
from mach.heads.rules import BETAS, EPSILON, State
from mach.train.adamw import adamw_
from mach.train.rows import update_rows_of
from mach.train.rules import Lost, apply_, state_of

HEAD = "head."
LOST = "head.weight.lost"


@dataclass(frozen=True, slots=True)
class RowRounding:
    """What the rounding of rows kept in bfloat16 is a function of, beside step, row and column."""

    seed: int = 0
    repetitions: tuple[int, ...] = (0,)  # their numbers


class Optimizer:
    """The state of one packed model's optimiser; every update happens in place.

    Moments are kept for each parameter (two of its shape) but the input weight (F, R) and what the head's rule keeps less of; all
    zeros at the start. Those of weights stored in less than float32 are float32.
    Source: Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101 (decoupled decay).
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], *, weight_decay: float, row_wise: str, head: Rule | None = None,
        slots_RB: Tensor | None = None, rounding: RowRounding = RowRounding(),
    ):  # fmt: skip
        """Start with zeros.

        Args: head, its rule, whose step and rate each step sets (default: as the other dense parameters); slots, of buckets that
              keep what rounding loses (`mach.train.rules.Lost`); rounding, of input rows kept in bfloat16.
        """
        self.parameters, self.weight_decay, self.row_wise, self.head = parameters, weight_decay, row_wise, head
        self.rounding = rounding
        self.step, self.rate, self.row_rate = 0, 0.0, 0.0
        self.state: dict[str, Tensor] = {}
        for name, value in parameters.items():
            if name == row_wise:
                self.state[f"{name}.second"] = _zeros_of_rows(value)
            else:
                kind = head.kind if head is not None and name.startswith(HEAD) else "adamw"
                self.state |= {f"{name}.{moment}": zeros for moment, zeros in state_of(kind, value).items()}
        self.lost: Lost | None = None
        if slots_RB is not None:
            weight = parameters["head.weight"]
            self.state[LOST] = weight.new_zeros(len(weight), int(slots_RB.max()) + 1, weight.shape[2])
            self.lost = Lost(self.state[LOST], slots_RB)

    def begin_step(self, *, rate: float, row_rate: float, head_rate: float = 0.0, head_steps: int = 0) -> None:
        """Start a step with its step sizes: one for the dense parameters, for the rows of the input layer, and for the head.

        `head_steps`: how many the head has taken before.
        """
        self.step, self.rate, self.row_rate = self.step + 1, rate, row_rate
        if self.head is not None:
            self.head = replace(self.head, rate=head_rate, step=head_steps)

    def begin_head(self, update: Callable[[str, slice, Tensor, Tensor | None], None]) -> Callable[..., None]:
        """Start a step of the head: give `update`, which ends in this optimiser's, with the rule by which it now goes."""
        if self.head is None:
            return update
        self.head = replace(self.head, step=self.head.step + 1)
        lost = None if self.lost is None else self.lost.weight_RSD
        slots = None if self.lost is None else self.lost.slots_RB
        first, second = (self.state.get(f"{HEAD}weight.{moment}") for moment in ("first", "second"))
        return Ruled(update, self.head, State(first=first, second=second, lost=lost, slots=slots))

    def update(self, name: str, part: slice, gradient: Tensor, low: Tensor | None = None) -> None:
        """Update `parameter[:, part]` with a gradient of that shape, and renew `low[:, part]`, its copy in bfloat16."""
        value, rule = self.parameters[name], self.head if name.startswith(HEAD) else None
        if rule is not None and (rule.kind != "adamw" or value.dtype in NARROW):
            moments = [self.state[f"{name}.{moment}"] for moment in ("first", "second") if f"{name}.{moment}" in self.state]
            apply_(rule, value, part, gradient, moments, low, self.lost if value.dim() == 3 else None)
        elif rule is not None:
            self._adamw(name, part, gradient, low, step=rule.step, rate=rule.rate, weight_decay=rule.weight_decay)
        else:
            self._adamw(name, part, gradient, low, step=self.step, rate=self.rate, weight_decay=self.weight_decay)

    def _adamw(
        self, name: str, part: slice, gradient: Tensor, low: Tensor | None, *, step: int, rate: float, weight_decay: float
    ) -> None:
        weight, first, second = (x[:, part] for x in (self.parameters[name], *self._moments(name)))
        gradient, copy = gradient.contiguous(), None if low is None else low[:, part]
        if gradient.device.type == "cpu":
            adamw_(
                weight, first, second, gradient, copy,
                step=step, rate=rate, betas=BETAS, epsilon=EPSILON, weight_decay=weight_decay,
            )  # fmt: skip
            return
        weights, gradients, firsts, seconds = (list(x.unbind(0)) for x in (weight, gradient.to(weight.dtype), first, second))
        steps = list(torch.full((len(weight),), step - 1.0, device=gradient.device).unbind(0))  # the kernel adds one
        adamw(
            weights, gradients, firsts, seconds, [], steps, fused=True, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=weight_decay, eps=EPSILON, maximize=False,
        )  # fmt: skip
        if copy is not None:
            copy.copy_(weight)

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.first"], self.state[f"{name}.second"]

    def update_input(self, layer: Input, batch: Any, grad_NRD: Tensor) -> None:
        """Update the input weight from the gradient of z on one batch."""
        visit = _visit_of(grad_NRD.device.type)
        if isinstance(layer, SparseInput) and visit is not None:
            grad, correction = layer.by_bag(grad_NRD), 1 - BETAS[1] ** self.step
            weight, second = self._rows(*grad.shape[1:])
            visit(
                weight, second, batch, grad, self._keys(),
                rate=self.row_rate, beta=BETAS[1], correction=correction, epsilon=EPSILON,
            )  # fmt: skip
        else:
            for rows, gradient in layer.gradient(batch, grad_NRD):
                self.update_rows(rows, gradient)

    def _keys(self) -> list[int]:
        """Give the keys of this step's rounding of rows, one a repetition."""
        return [key_of(self.rounding.seed, self.step, r) for r in self.rounding.repetitions]

    def _rows(self, R: int, D: int) -> tuple[Tensor, Tensor]:
        """Give the input weight and its moments as rows of R repetitions; one repetition a row where features are hashed."""
        return self.parameters[self.row_wise].view(-1, R, D), self.state[f"{self.row_wise}.second"].view(-1, R)

    def update_rows(self, rows: Tensor | None, gradient_URD: Tensor) -> None:
        """Update rows of the input weight (None: all of them), one step size a row and repetition.

        v <- b2 v + (1 - b2) mean_d g^2;  w <- w - rate g / (sqrt(v / (1 - b2^t)) + eps).  A row's v waits between its batches.
        """
        weight, second = self._rows(*gradient_URD.shape[1:])
        mean_square = torch.linalg.vector_norm(gradient_URD, dim=2).square_().div_(gradient_URD.shape[2])
        moment = (second if rows is None else second[rows]).lerp(mean_square, 1 - BETAS[1])
        scale = self.row_rate / ((moment / (1 - BETAS[1] ** self.step)).sqrt_() + EPSILON)
        change = gradient_URD.mul_(scale.unsqueeze(2))
        if rows is None:
            second.copy_(moment)
            weight.sub_(change)
            return
        second[rows] = moment
        if weight.dtype == second.dtype:
            weight.index_add_(0, rows, change, alpha=-1)
        else:
            weight[rows] = narrow_rows(weight[rows] - change, weight.dtype, self._keys(), rows)


def _zeros_of_rows(weight_FRD: Tensor) -> Tensor:
    """Give a row's moment for each row and repetition (F, R), of float32 at least."""
    wide = torch.float32 if weight_FRD.dtype == torch.bfloat16 else weight_FRD.dtype
    return torch.zeros(weight_FRD.shape[:2], dtype=wide, device=weight_FRD.device)


@cache
def _visit_of(device: str) -> Callable[..., None] | None:
    """Give what makes a row's gradient and updates it in one visit, on a GPU if Triton is there; else the two are done apart."""
    if device == "cpu":
        return update_rows_of
    if not has_triton():
        return None
    from mach.train import rows_triton

    return rows_triton.update_rows_of
