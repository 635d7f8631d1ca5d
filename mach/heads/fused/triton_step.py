"""Takes the fused step, by the way that suits the batch."""

from __future__ import annotations

from torch import Tensor

from mach.config import Loss
from mach.gpu import launching_on
from mach.heads.fused.triton_batch import Blocks, HeadBatch
from mach.heads.fused.triton_products import ByProducts
from mach.heads.fused.triton_registers import InRegisters
from mach.heads.positives import Positives
from mach.heads.rules import Rule, State
from mach.heads.scaled import Scaled


def step(
    hidden_RND: Tensor, weight_RBD: Tensor, bias_RB: Tensor, positives: Positives,
    *, loss: Loss, rule: Rule, state: State, want_loss: bool, chunk_bytes: int, blocks: Blocks | None = None,
    narrow: Scaled | None = None, low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Take the step; see `mach.heads.fused.fused_step`."""
    with launching_on(weight_RBD):
        made = HeadBatch(hidden_RND, weight_RBD, bias_RB, positives, loss, blocks, narrow)
        if made.n_blocks == 1:
            assert low is None, "it would not be renewed"
            return InRegisters(made, rule, state, want_loss).run(chunk_bytes)
        return ByProducts(made, rule, state, want_loss, low).run(chunk_bytes)
