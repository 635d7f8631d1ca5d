"""Launches the fused step's kernels: a chunk of outputs at a time, two or three kernels each.

Axes: R repetitions, N samples, B outputs, D hidden width, T tiles of outputs, S stripes of tiles that run side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from mach.config import Loss
from mach.heads.fused import triton_kernels as kernels
from mach.heads.positives import Positives
from mach.heads.rounding import signed, step_key
from mach.heads.rules import BETAS, EPSILON, Rule, State
from mach.heads.scaled import Scaled

LOSSES = {"logistic": 0, "squared-hinge": 1, "softmax": 2}  # as in triton_kernels
DENSE_STEP, MOMENTS, ROWS = range(3)
STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
POSITIVES = 16, 32  # of a program that makes their gradients; of a tile, written at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Sizes of what a program holds, powers of 2 from 16, and how it is run."""

    samples: int  # N of every product; all of a batch in one block lets the update make the hidden gradient, too
    outputs: tuple[int, int]  # C of a tile of outputs and D of a slice of its products
    hidden: tuple[int, int]  # C of a slice and D of a block of the hidden gradient
    update: tuple[int, int]  # C and D of a block of weights
    n_warps: int
    n_stages: int  # slices in flight


# On Hopper a product of 128 x 128 in bfloat16 by 8 warps keeps 64 sums a thread, 128 registers in all: with three pairs of slices
# of 16 KiB, two programs share a multiprocessor of 64 Ki registers and 227 KiB. The update keeps two sums (weights, hidden units)
# and the weights: half as many rows, or registers would spill.
LOW = Blocks(samples=128, outputs=(128, 64), hidden=(64, 128), update=(64, 128), n_warps=8, n_stages=3)
# A slice of outputs in float8 takes the same bytes at twice the width.
EIGHTH = replace(LOW, outputs=(128, 128))
# Products in float32 use no tensor cores: sums of 64 x 64, twice the bytes a number.
FULL = Blocks(samples=64, outputs=(64, 32), hidden=(32, 64), update=(64, 64), n_warps=4, n_stages=2)


def step(
    hidden_RND: Tensor, weight_RBD: Tensor, bias_RB: Tensor, positives: Positives,
    *, loss: Loss, rule: Rule, state: State, want_loss: bool, chunk_bytes: int, blocks: Blocks | None = None,
    narrow: Scaled | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Take the step; see `mach.heads.fused.fused_step`."""
    with torch.cuda.device_of(weight_RBD):  # type: ignore[no-untyped-call]  # torch has none
        made = _Step(hidden_RND, weight_RBD, bias_RB, positives, loss, blocks, narrow)
        return made.run(rule, state, want_loss, chunk_bytes)


class _Step:
    """One batch, ready for the kernels."""

    def __init__(
        self, hidden_RND: Tensor, weight_RBD: Tensor, bias_RB: Tensor, positives: Positives, loss: Loss, blocks: Blocks | None,
        narrow: Scaled | None,
    ):  # fmt: skip
        self.shape = weight_RBD.shape
        _, B, D = self.shape
        self.n_samples = hidden_RND.shape[1]
        is_full = hidden_RND.dtype == weight_RBD.dtype == torch.float32
        self.blocks = blocks or (FULL if is_full else LOW if narrow is None else EIGHTH)
        self.N = _power(self.n_samples, self.blocks.samples)
        self.widths = [_power(D, d) for _, d in (self.blocks.outputs, self.blocks.hidden, self.blocks.update)]
        if narrow is not None:
            self.widths[0] = max(32, self.widths[0])  # the least that a product of float8 takes
        self.padded, self.wide = _whole(self.n_samples, self.N), _whole(D, max(self.widths))
        self.hidden = _padded(hidden_RND, self.padded, self.wide, torch.float32 if is_full else torch.bfloat16)
        self.weight, self.bias, self.loss = weight_RBD, bias_RB, loss
        self.seen, self.scales = self.hidden, self.bias  # of the outputs; the latter where it is not read
        if narrow is not None:
            self.seen = _padded(narrow.values, self.padded, self.wide, narrow.values.dtype)
            self.scales = torch.nn.functional.pad(narrow.scales.float(), (0, self.padded - self.n_samples))
        self.n_blocks, self.n_tiles = self.padded // self.N, -(-B // self.blocks.outputs[0])
        self.n_programs = _n_programs(weight_RBD.device)
        self.options = {"num_warps": self.blocks.n_warps if self.N >= 64 else 4, "num_stages": self.blocks.n_stages}
        self._find(positives)

    def _find(self, positives: Positives) -> None:
        """Sort the positives by output, so that a tile's lie in a row."""
        R, B, _ = self.shape
        keys, order = torch.sort(positives.repetitions * B + positives.buckets)
        listed = (positives.samples, positives.buckets, positives.repetitions)
        self.samples, self.buckets, self.repetitions = (x[order].int() for x in listed)
        borders = _borders(R, B, self.blocks.outputs[0], self.weight.device)
        self.offsets = torch.searchsorted(keys, borders, out_int32=True)
        self.share = self.bias  # where it is not read
        if self.loss == "softmax":
            shares = torch.where(positives.counts_RN > 0, positives.counts_RN.float().reciprocal(), 0.0)
            self.share = torch.nn.functional.pad(shares, (0, self.padded - self.n_samples))

    def run(self, rule: Rule, state: State, want_loss: bool, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor | None]:
        R, _, D = self.shape
        tile = self.blocks.outputs[0]
        n_chunk = min(self.n_tiles, max(1, chunk_bytes // (R * self.padded * self.hidden.element_size() * tile)))
        self.gradients = self.hidden.new_empty(R, n_chunk * tile, self.padded)
        n_products = R * self.n_blocks * (self.wide // self.widths[1])
        self.parts = self.bias.new_zeros(max(1, self.n_programs // n_products), R, self.wide, self.padded)
        grad_bias = torch.empty_like(self.bias)
        log_total = self._log_total() if self.loss == "softmax" else self.bias  # the latter where it is not read
        at_positives, extra = self._positive_gradients(want_loss, log_total)
        losses = self.bias.new_zeros(R, self.n_tiles, self.n_blocks) if want_loss else self.bias
        for first in range(0, self.n_tiles, n_chunk):
            n = min(n_chunk, self.n_tiles - first)
            self._output_gradients(first, n, at_positives, losses, log_total, want_loss)
            if self.n_blocks > 1:
                self._hidden_gradients(first, n)
            self._update(first, n, grad_bias, rule, state)
        scale = 1 / self.n_samples / (32 if self.weight.dtype == torch.float8_e4m3fn else 1)
        grad_hidden = self.parts.sum(0)[:, :D, : self.n_samples].transpose(1, 2) * scale
        if not want_loss:
            return grad_hidden.contiguous(), grad_bias, None
        total = losses.sum((1, 2), dtype=torch.float64).index_add_(0, self.repetitions, extra.double())
        return grad_hidden.contiguous(), grad_bias, (total / self.n_samples).to(self.bias.dtype)

    def _log_total(self) -> Tensor:
        R, B, D = self.shape
        C, _ = self.blocks.outputs
        n_stripes = max(1, min(self.n_tiles, self.n_programs // (self.n_blocks * R)))
        out = self.bias.new_empty(n_stripes, R, self.padded)
        kernels.log_totals[(n_stripes * self.n_blocks, R)](
            self.seen, self.scales, self.weight, self.bias, out, B, D, self.padded, self.wide, self.n_tiles, self.n_blocks,
            STORAGE=STORED[self.weight.dtype], EVEN=D % self.widths[0] == 0, C=C, N=self.N, D=self.widths[0], **self.options,
        )  # fmt: skip
        return torch.logsumexp(out, 0)

    def _positive_gradients(self, want_loss: bool, log_total: Tensor) -> tuple[Tensor, Tensor]:
        _, B, D = self.shape
        n = len(self.buckets)
        out, losses = self.bias.new_empty(2, n)
        if n:
            kernels.positive_gradients[(-(-n // POSITIVES[0]),)](
                self.seen, self.scales, self.weight, self.bias, self.buckets, self.samples, self.repetitions, log_total,
                self.share, out, losses, n, B, D, self.padded, self.wide,
                LOSS=LOSSES[self.loss], WANT_LOSS=want_loss, STORAGE=STORED[self.weight.dtype],
                P=POSITIVES[0], D=_power(D, 128), num_warps=4,
            )  # fmt: skip
        return out, losses

    def _output_gradients(
        self, first: int, n: int, at_positives: Tensor, losses: Tensor, log_total: Tensor, want_loss: bool
    ) -> None:
        R, B, D = self.shape
        C, _ = self.blocks.outputs
        kernels.output_gradients[(n * self.n_blocks, R)](
            self.seen, self.scales, self.weight, self.bias, self.buckets, self.samples, at_positives, self.offsets, log_total,
            self.share, self.gradients, losses,
            first, B, self.n_samples, D, self.padded, self.wide, self.n_tiles, self.n_blocks, self.gradients.shape[1],
            LOSS=LOSSES[self.loss], WANT_LOSS=want_loss, STORAGE=STORED[self.weight.dtype],
            EVEN=D % self.widths[0] == 0, C=C, N=self.N, D=self.widths[0], P=POSITIVES[1], **self.options,
        )  # fmt: skip

    def _tiles(self, C: int, first: int, n: int) -> tuple[int, int]:
        """Give the first tile of C outputs of a chunk, and how many it has, from those of the outputs' tiles."""
        tile = self.blocks.outputs[0]
        return first * tile // C, -(-min(n * tile, self.shape[1] - first * tile) // C)

    def _hidden_gradients(self, first: int, n: int) -> None:
        R, B, D = self.shape
        C, width = self.blocks.hidden[0], self.widths[1]
        start, n_tiles = self._tiles(C, first, n)
        n_width_blocks = self.wide // width
        kernels.hidden_gradients[(len(self.parts) * self.n_blocks * n_width_blocks, R)](
            self.gradients, self.weight, self.parts, start, B, D, self.padded, self.wide, n_tiles, self.gradients.shape[1],
            self.n_blocks, n_width_blocks, EVEN=D % width == 0, C=C, N=self.N, D=width, **self.options,
        )  # fmt: skip

    def _update(self, first: int, n: int, grad_bias: Tensor, rule: Rule, state: State) -> None:
        R, B, D = self.shape
        C, width = self.blocks.update[0], self.widths[2]
        start, n_tiles = self._tiles(C, first, n)
        scale, n_held, n_width_blocks = 1 / self.n_samples, self.gradients.shape[1], self.wide // width
        kind, steps = DENSE_STEP, self.bias
        rate, share_1, share_2, epsilon = rule.rate, 0.0, 0.0, 0.0
        if rule.kind == "adamw":
            kind, (share_1, share_2) = MOMENTS, (1 - beta for beta in BETAS)
            root = math.sqrt(1 - BETAS[1] ** rule.step)
            rate, epsilon = rule.rate * root / (1 - BETAS[0] ** rule.step), EPSILON * root
        elif rule.kind != "sgd":
            kind, steps = ROWS, self.bias.new_empty(R, n_held)
            is_adam = rule.kind == "rowwise-adam"
            keep_moment, share = (BETAS[1], 1 - BETAS[1]) if is_adam else (1.0, 1.0)
            correction = 1 / (1 - BETAS[1] ** rule.step) if is_adam else 1.0
            kernels.row_moments[(n_tiles, R)](
                self.gradients, self.hidden, state.second, steps, start, B, D, self.padded, self.wide, n_held,
                scale, rule.rate, keep_moment, share, correction, EPSILON, C=C, N=self.N, D=width, **self.options,
            )  # fmt: skip
        is_whole = self.n_blocks == 1
        n_stripes = len(self.parts) if is_whole else n_tiles
        unused = self.bias
        kernels.update_weights[(n_stripes * n_width_blocks, R)](
            self.gradients, self.hidden, self.weight, grad_bias, self.parts, steps,
            *(unused if x is None else x for x in (state.first, state.second, state.lost, state.slots)),
            _numbers(rule.repetitions, self.weight.device),
            start, B, D, self.padded, self.wide, n_tiles, n_held, n_width_blocks,
            0 if state.lost is None else state.lost.shape[1],
            signed(step_key(rule.seed, rule.step)), rule.first,
            scale, rate, 1 - rule.rate * rule.weight_decay, share_1, share_2, epsilon,
            RULE=kind, STORAGE=STORED[self.weight.dtype], HIDDEN=is_whole, COMPENSATED=state.lost is not None,
            EVEN=D % width == 0, C=C, N=self.N, D=width, **self.options,
        )  # fmt: skip


def _power(n: int, most: int) -> int:
    """Give the power of 2 that holds n, from 16 to `most`."""
    return min(most, max(16, 1 << (n - 1).bit_length()))


def _whole(n: int, block: int) -> int:
    return -(-n // block) * block


def _padded(hidden_RND: Tensor, n_samples: int, width: int, dtype: torch.dtype) -> Tensor:
    """Give the hidden vectors as whole blocks, with zeros at their ends."""
    R, N, D = hidden_RND.shape
    if (N, D, dtype) == (n_samples, width, hidden_RND.dtype):
        return hidden_RND.contiguous()
    out = hidden_RND.new_zeros(R, n_samples, width, dtype=dtype)
    out[:, :N, :D] = hidden_RND
    return out


@lru_cache(maxsize=4)
def _borders(R: int, B: int, tile: int, device: torch.device) -> Tensor:
    """Give where tiles begin and end among the outputs of all repetitions, int64 (R, T + 1)."""
    within = torch.arange(0, B + tile, tile, device=device).clamp_(max=B)
    return within + B * torch.arange(R, device=device)[:, None]


@lru_cache(maxsize=4)
def _numbers(repetitions: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(repetitions, dtype=torch.int32, device=device)


@cache
def _n_programs(device: torch.device) -> int:
    """Give how many programs run at once: one a multiprocessor, as large as they are; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
