"""The fused step of a batch that fits a block of samples: it is bound by reading and writing weights, so nothing else is.

Outputs and the weights' gradient live in registers; of the outputs' gradient a chunk reaches the cache.

Axes: R repetitions, N samples, B outputs, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mach.heads.fused import triton_update_kernels as kernels
from mach.heads.fused.triton_batch import ROWS, STORED, HeadBatch, Ruling, kept, n_slots, numbers_of
from mach.heads.rounding import signed, step_key
from mach.heads.rules import Rule, State

CACHED = 32 << 20  # bytes of a chunk's output gradients: half of the L2 cache of an H100 or H200


class InRegisters:
    """Two or three kernels a chunk of outputs."""

    def __init__(self, made: HeadBatch, rule: Rule, state: State, want_loss: bool):
        self.made, self.rule, self.state, self.want_loss = made, rule, state, want_loss
        self.ruling = Ruling.of(rule)

    def run(self, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take the step; a chunk's output gradients take `chunk_bytes`, but no more than the cache holds."""
        made, (R, _, D), tile = self.made, self.made.shape, self.made.blocks.outputs[0]
        each = R * made.padded * made.hidden.element_size() * tile
        n_chunk = min(made.n_tiles, max(1, min(chunk_bytes, CACHED) // each))
        gradients = made.hidden.new_empty(R, n_chunk * tile, made.padded)
        n_products = R * (made.wide // made.widths[1])
        parts = made.bias.new_zeros(max(1, made.n_programs // n_products), R, made.wide, made.padded)
        grad_bias = torch.empty_like(made.bias)
        at_positives, extra = made.positive_gradients(self.want_loss)
        losses = made.bias.new_zeros(R, made.n_tiles, 1) if self.want_loss else made.bias
        for first in range(0, made.n_tiles, n_chunk):
            n = min(n_chunk, made.n_tiles - first)
            made.output_gradients(gradients, first, n, at_positives, losses, self.want_loss)
            self._update(gradients, parts, first, n, grad_bias)
        scale = 1 / made.n_samples / (32 if made.weight.dtype == torch.float8_e4m3fn else 1)
        grad_hidden = (parts.sum(0)[:, :D, : made.n_samples].transpose(1, 2) * scale).contiguous()
        if not self.want_loss:
            return grad_hidden, grad_bias, None
        return grad_hidden, grad_bias, made.mean_loss(losses.sum((1, 2), dtype=torch.float64), extra)

    def _update(self, gradients: Tensor, parts: Tensor, first: int, n: int, grad_bias: Tensor) -> None:
        made, ruling, state = self.made, self.ruling, self.state
        (R, B, D), tile, C, width = made.shape, made.blocks.outputs[0], made.blocks.update[0], made.widths[1]
        start, n_tiles = first * tile // C, -(-min(n * tile, B - first * tile) // C)  # in tiles of C outputs
        scale, n_held, n_width_blocks = 1 / made.n_samples, gradients.shape[1], made.wide // width
        sizes: dict[str, Any] = {"C": C, "N": made.N, "D": width, **made.options}
        steps = made.bias  # where they are not read
        if ruling.kind == ROWS:
            steps = made.bias.new_empty(R, n_held)
            kernels.row_moments[(n_tiles, R)](
                gradients, made.hidden, state.second, steps, start, B, D, made.padded, made.wide, n_held,
                scale, ruling.rate, *ruling.of_rows, ruling.epsilon, **sizes,
            )  # fmt: skip
        kernels.update_weights[(len(parts) * n_width_blocks, R)](
            gradients, made.hidden, made.weight, grad_bias, parts, steps, *kept(state, made.bias),
            numbers_of(self.rule.repetitions, made.weight.device),
            start, B, D, made.padded, made.wide, n_tiles, n_held, n_width_blocks, n_slots(state),
            signed(step_key(self.rule.seed, self.rule.step)), self.rule.first,
            scale, ruling.rate, ruling.keep, ruling.share_1, ruling.share_2, ruling.epsilon,
            RULE=ruling.kind, STORAGE=STORED[made.weight.dtype], COMPENSATED=state.lost is not None, EVEN=D % width == 0, **sizes,
        )  # fmt: skip
