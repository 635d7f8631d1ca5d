"""The head's step fused: one call takes it whole, on a GPU with Triton; elsewhere the head goes chunk by chunk in torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mach.config import Loss

if TYPE_CHECKING:
    from mach.heads.linear import Positives

__all__ = ["Rule", "State", "can_fuse", "fused_step"]

KINDS = ("sgd", "adamw", "rowwise-adagrad", "rowwise-adam")
STORAGES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
CHUNK_BYTES = 32 << 20  # of a chunk's output gradients: half of the L2 cache of an H100 or H200


class Rule(Protocol):
    """The update rule of one step, with its numbers."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def rate(self) -> float: ...  # noqa: D102  step size
    @property
    def weight_decay(self) -> float: ...  # noqa: D102  decoupled
    @property
    def step(self) -> int: ...  # noqa: D102  from 1
    @property
    def seed(self) -> int: ...  # noqa: D102  of the rounding, in [0, 2**63)
    @property
    def repetitions(self) -> tuple[int, ...]: ...  # noqa: D102  their numbers
    @property
    def first(self) -> int: ...  # noqa: D102  number, in the whole head, of the first output held here


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a rule keeps of the steps before, on the weight's device, updated in place."""

    first: Tensor | None = None  # adamw: (R, B, D), float32
    second: Tensor | None = None  # adamw: (R, B, D); row-wise: (R, B), float32
    lost: Tensor | None = None  # bfloat16 (R, M, D), what rounding to the nearest left of M compensated rows
    slots: Tensor | None = None  # int32 (R, B), place of a row in `lost`, -1 for one that is rounded stochastically


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def can_fuse(weight_RBD: Tensor, bias_RB: Tensor, update: object) -> bool:
    """Tell whether the kernels can take this step.

    There is Triton and a GPU, or Triton's interpreter; `update.rule` is a `Rule` of a known kind, `update.state` its `State`; the
    weights are stored in a known type, the bias in float32.
    """
    rule, state = getattr(update, "rule", None), getattr(update, "state", None)
    if rule is None or not isinstance(state, State) or not _has_triton():
        return False
    fits = weight_RBD.dtype in STORAGES and bias_RB.dtype == torch.float32
    there = weight_RBD.device.type == "cuda" or is_interpreted()
    return there and fits and rule.kind in KINDS and weight_RBD.is_contiguous() and bias_RB.is_contiguous()


def fused_step(
    hidden_RND: Tensor, weight_RBD: Tensor, bias_RB: Tensor, positives: Positives, *, loss: Loss, rule: Rule, state: State,
    want_loss: bool, chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Update the weights on one batch, in place; give the gradients of hidden vectors and biases, and the loss if wanted.

    Neither outputs nor the weights' gradient reach memory; of the outputs' gradient a chunk does, in the type of the products:
    bfloat16 if the hidden vectors or the weights are, or the weights are float8; else float32, without TF32.

    Args:    as `LinearHead.step`; chunk_bytes, what a chunk may take: one tile of 128 outputs at least. `can_fuse` holds.
    Returns: gradient of the mean loss (R, N, D), float32; that of the biases (R, B), whose update is the caller's; the loss of
             each repetition (R,), float32, summed over outputs and averaged over samples.
    """
    from mach.heads.fused import triton_step

    return triton_step.step(
        hidden_RND, weight_RBD, bias_RB, positives,
        loss=loss, rule=rule, state=state, want_loss=want_loss, chunk_bytes=chunk_bytes,
    )  # fmt: skip
