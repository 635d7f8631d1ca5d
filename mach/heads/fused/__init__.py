"""The head's step fused: one call takes it whole, on a GPU with Triton; elsewhere the head goes chunk by chunk in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mach.config import Loss
from mach.gpu import has_triton
from mach.heads.rules import Rule, State

if TYPE_CHECKING:
    from mach.heads.positives import Positives
    from mach.heads.scaled import Scaled

__all__ = ["can_fuse", "fused_step"]

KINDS = ("sgd", "adamw", "rowwise-adagrad", "rowwise-adam")
STORAGES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
IN_REGISTERS = 128  # samples of the largest batch of which outputs and weights' gradients stay in registers; 64 in float32
ON_CPU = False  # whether to fuse there too, in Triton's interpreter, far slower than torch: for tests


def can_fuse(weight_RBD: Tensor, bias_RB: Tensor, rule: Rule) -> bool:
    """Tell whether the kernels can take this step.

    There is Triton, and the weights are on a GPU (or ON_CPU); the rule is of a known kind; the weights are stored in a type that
    both know, the bias in float32.
    """
    if not has_triton():
        return False
    fits = weight_RBD.dtype in STORAGES and bias_RB.dtype == torch.float32
    there = ON_CPU or (weight_RBD.device.type == "cuda" and _knows(weight_RBD.device, weight_RBD.dtype))
    return there and fits and rule.kind in KINDS and weight_RBD.is_contiguous() and bias_RB.is_contiguous()


def _knows(device: torch.device, storage: torch.dtype) -> bool:
    """Tell whether a GPU has a type; Triton compiles nothing with e4m3 for those before Ada and Hopper."""
    return storage != torch.float8_e4m3fn or torch.cuda.get_device_capability(device) >= (8, 9)


def fused_step(
    hidden_RND: Tensor, weight_RBD: Tensor, bias_RB: Tensor, positives: Positives, *, loss: Loss, rule: Rule, state: State,
    want_loss: bool, chunk_bytes: int, narrow: Scaled | None = None, low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Update the weights on one batch, in place; give the gradients of hidden vectors and biases, and the loss if wanted.

    Of a batch of IN_REGISTERS samples at most, neither outputs nor the weights' gradient reach memory; of the outputs'
    gradient a chunk does. Of a larger one all three do, a chunk at a time. In the type of the products: bfloat16 if the hidden
    vectors or the weights are, or the weights are float8; else float32, without TF32.

    Args:    as `LinearHead.step`; chunk_bytes, what a chunk may take: one tile of 128 outputs at least; narrow, the hidden
             vectors of which outputs are made, by products of float8, for weights stored in it; low, for a larger batch, a copy
             of float32 weights in bfloat16, of which products are taken, renewed with them. `can_fuse` holds.
    Returns: gradient of the mean loss (R, N, D), float32; that of the biases (R, B), whose update is the caller's; the loss of
             each repetition (R,), float32, summed over outputs and averaged over samples.
    """
    from mach.heads.fused import triton_step

    return triton_step.step(
        hidden_RND, weight_RBD, bias_RB, positives,
        loss=loss, rule=rule, state=state, want_loss=want_loss, chunk_bytes=chunk_bytes, narrow=narrow, low=low,
    )  # fmt: skip
