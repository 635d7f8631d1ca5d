"""The fused step of a batch that fits no block of samples: products by torch's library, what lies between by kernels.

A chunk's outputs, their gradient in the same place and the weights' gradient reach memory, in the type of the products; an
optimiser's pass reads and writes weights and moments once. On an H200 in bfloat16 the library's products run at 700 to 800
TFLOP/s, those of a kernel of ours at 420: from some 256 samples that outweighs the bytes.

Axes: R repetitions, N samples, C outputs of a chunk, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mach.heads.fused import triton_kernels, triton_update_kernels
from mach.heads.fused.triton_batch import LOSSES, POSITIVES, STORED, HeadBatch, Ruling, kept, n_slots, numbers_of
from mach.heads.rounding import signed, step_key, widen
from mach.heads.rules import Rule, State

WEIGHTS = 4096  # of a program of `apply_rule`, at least one row
SAMPLES = 32  # of a pass of `slopes`
PROGRAMS = 8  # of `slopes` that a multiprocessor has at once
ALIGNED = 8  # outputs: 16 bytes of bfloat16
ADDS_WIDE = hasattr(torch.ops.aten.baddbmm, "dtype")  # torch 2.8 and later add products of bfloat16 to sums in float32, on GPUs


class ByProducts:
    """A step's products, one after the other over all samples and a chunk of outputs."""

    def __init__(self, made: HeadBatch, rule: Rule, state: State, want_loss: bool, low: Tensor | None):
        self.made, self.rule, self.state, self.want_loss, self.low = made, rule, state, want_loss, low
        self.ruling = Ruling.of(rule)

    def run(self, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take the step; a chunk takes `chunk_bytes`, one tile of outputs at least."""
        made, (R, B, D), N, tile = self.made, self.made.shape, self.made.n_samples, self.made.blocks.outputs[0]
        hidden = made.given.to(made.products)
        at_positives, extra = made.positive_gradients(self.want_loss)
        grad_hidden, grad_bias = made.bias.new_zeros(R, N, D), torch.empty_like(made.bias)
        total = made.bias.new_zeros(R, dtype=torch.float64)  # the loss
        for first, n in self._chunks(chunk_bytes):
            part = slice(first * tile, min((first + n) * tile, B))
            weight = (made.weight if self.low is None else self.low)[:, part]
            if weight.dtype != made.products:
                weight = widen(weight, hidden.new_empty(weight.shape))
            if made.loss == "softmax" or made.is_narrow:
                gradient, losses = self._by_tiles(part, first, n, at_positives, grad_bias)
            else:
                gradient, losses = self._by_slopes(hidden, weight, part, first, n, at_positives, grad_bias)
            total += losses.sum((0, 2), dtype=torch.float64) if self.want_loss else 0
            grad_hidden = _added(grad_hidden, gradient, weight)
            del weight
            self._apply(torch.bmm(gradient.transpose(1, 2), hidden), part)
            del gradient  # or the next chunk's were made beside it
        return grad_hidden.div_(N), grad_bias, made.mean_loss(total, extra) if self.want_loss else None

    def _chunks(self, chunk_bytes: int) -> Iterator[tuple[int, int]]:
        """Give the first tile and the number of tiles of each chunk: chunks alike, but for a last tile of its own.

        Products of many outputs are slow where their number is none of ALIGNED.
        """
        made, (R, B, D), tile = self.made, self.made.shape, self.made.blocks.outputs[0]
        n_copies = 1 if self.low is not None or made.weight.dtype == made.products else 2  # of weights: their gradient, too
        most = max(1, chunk_bytes // (R * tile * made.products.itemsize * (made.padded + D * n_copies)))
        n_tiles = made.n_tiles if B % ALIGNED == 0 else B // tile
        width = -(-n_tiles // max(1, -(-n_tiles // most)))
        yield from ((first, min(width, n_tiles - first)) for first in range(0, n_tiles, max(1, width)))
        if n_tiles < made.n_tiles:
            yield n_tiles, 1

    def _by_tiles(self, part: slice, first: int, n: int, at_positives: Tensor, grad_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Give dLoss/dz of a chunk (R, N, C) by a kernel's own products, and losses (1, R, tiles and blocks)."""
        made, (R, _, _) = self.made, self.made.shape
        out = made.hidden.new_empty(R, n * made.blocks.outputs[0], made.padded)
        losses = made.bias.new_zeros(R, made.n_tiles, made.n_blocks) if self.want_loss else made.bias
        made.output_gradients(out, first, n, at_positives, losses, self.want_loss)
        gradient = out[:, : part.stop - part.start, : made.n_samples]
        grad_bias[:, part] = gradient.sum(2, dtype=grad_bias.dtype) / made.n_samples
        return gradient.transpose(1, 2), losses.view(1, R, -1) if self.want_loss else losses

    def _by_slopes(
        self, hidden: Tensor, weight: Tensor, part: slice, first: int, n: int, at_positives: Tensor, grad_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give the same in place of outputs that torch's library makes, and losses (S, R, tiles)."""
        made, (R, B, _), N = self.made, self.made.shape, self.made.n_samples
        held = n * made.blocks.outputs[0]  # rows of memory that all begin alike, or products with them are slow
        z = hidden.new_empty(R, N, held)[..., : part.stop - part.start]
        torch.bmm(hidden, weight.transpose(1, 2), out=z)
        n_stripes = max(1, min(-(-N // SAMPLES), PROGRAMS * made.n_programs // (n * R)))
        biases = made.bias.new_empty(n_stripes, R, held)
        losses = made.bias.new_empty(n_stripes, R, n) if self.want_loss else made.bias
        triton_kernels.slopes[(n * n_stripes, R)](
            z, made.bias, biases, made.buckets, made.samples, at_positives, made.offsets, losses,
            first, n, held, B, N, made.n_tiles, 1 / N,
            LOSS=LOSSES[made.loss], WANT_LOSS=self.want_loss, C=made.blocks.outputs[0], N=SAMPLES, P=POSITIVES[1], num_warps=4,
        )  # fmt: skip
        grad_bias[:, part] = biases.sum(0)[:, : z.shape[2]]
        return z, losses

    def _apply(self, gradient: Tensor, part: slice) -> None:
        """Update a chunk's weights from the sum over samples of their gradients (R, C, D)."""
        made, ruling, state = self.made, self.ruling, self.state
        R, B, D = made.shape
        n, width = part.stop - part.start, max(16, 1 << (D - 1).bit_length())
        rows = max(1, WEIGHTS // width)
        triton_update_kernels.apply_rule[(-(-n // rows), R)](
            gradient, made.weight, made.weight if self.low is None else self.low, *kept(state, made.bias),
            numbers_of(self.rule.repetitions, made.weight.device),
            part.start, n, B, D, n_slots(state), signed(step_key(self.rule.seed, self.rule.step)), self.rule.first,
            1 / made.n_samples, ruling.rate, ruling.keep, ruling.share_1, ruling.share_2, ruling.epsilon, *ruling.of_rows,
            RULE=ruling.kind, STORAGE=STORED[made.weight.dtype], COMPENSATED=state.lost is not None,
            COPIES=self.low is not None, C=rows, D=width, num_warps=4 if rows * width <= WEIGHTS else 8,
        )  # fmt: skip


def _added(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Give a sum in float32 plus products of matrices."""
    if ADDS_WIDE and a.device.type == "cuda" and a.dtype != total.dtype:
        return torch.baddbmm(total, a, b, out_dtype=total.dtype)
    return total.add_(torch.bmm(a, b))
