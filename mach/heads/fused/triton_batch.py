"""One batch as the fused step's kernels take it, the sizes of what they hold, and what any way of stepping begins with.

Axes: R repetitions, N samples, B outputs, D hidden width, T tiles of outputs, S stripes of tiles that run side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from mach.config import Loss
from mach.heads.fused import IN_REGISTERS
from mach.heads.fused import triton_kernels as kernels
from mach.heads.positives import Positives
from mach.heads.rules import BETAS, EPSILON, Rule, State
from mach.heads.scaled import Scaled

LOSSES = {"logistic": 0, "squared-hinge": 1, "softmax": 2}  # these as in the kernels
DENSE_STEP, MOMENTS, ROWS = range(3)
STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
POSITIVES = 16, 32  # of a program that makes their gradients; of a tile, written at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Sizes of what a program holds, powers of 2 from 16, and how it is run."""

    samples: int  # N of every product, and of the largest batch that stays in registers
    outputs: tuple[int, int]  # C of a tile of outputs and D of a slice of its products
    update: tuple[int, int]  # C and D of a block of weights
    n_warps: int
    n_stages: int  # slices in flight
    n_programs: int = 1  # at once on a multiprocessor, of kernels whose programs stay for many tiles


# On Hopper a product of 128 x 128 in bfloat16 by 8 warps keeps 64 sums a thread, 128 registers in all: with three pairs of slices
# of 16 KiB, two programs share a multiprocessor of 64 Ki registers and 227 KiB. The update keeps two sums (weights, hidden units)
# and the weights: half as many rows, or registers would spill.
LOW = Blocks(samples=IN_REGISTERS, outputs=(128, 64), update=(64, 128), n_warps=8, n_stages=3)
# A slice of outputs in float8 takes the same bytes at twice the width.
EIGHTH = replace(LOW, outputs=(128, 128))
# Products in float32 use no tensor cores: sums of 64 x 64, twice the bytes a number.
FULL = Blocks(samples=64, outputs=(64, 32), update=(64, 64), n_warps=4, n_stages=2)


@dataclass(frozen=True, slots=True)
class Ruling:
    """A rule as the kernels take it."""

    kind: int
    rate: float
    keep: float
    share_1: float = 0.0
    share_2: float = 0.0
    epsilon: float = EPSILON
    keep_moment: float = 1.0  # of a row
    share: float = 1.0
    correction: float = 1.0

    @classmethod
    def of(cls, rule: Rule) -> Ruling:
        """Turn what a rule says of one step into numbers."""
        keep = 1 - rule.rate * rule.weight_decay
        if rule.kind == "adamw":
            root = math.sqrt(1 - BETAS[1] ** rule.step)
            rate = rule.rate * root / (1 - BETAS[0] ** rule.step)
            return cls(MOMENTS, rate, keep, 1 - BETAS[0], 1 - BETAS[1], EPSILON * root)
        if rule.kind == "rowwise-adam":
            share, correction = 1 - BETAS[1], 1 / (1 - BETAS[1] ** rule.step)
            return cls(ROWS, rule.rate, keep, keep_moment=BETAS[1], share=share, correction=correction)
        return cls(DENSE_STEP if rule.kind == "sgd" else ROWS, rule.rate, keep)

    @property
    def of_rows(self) -> tuple[float, float, float]:
        """Give what the moments of rows take."""
        return self.keep_moment, self.share, self.correction


class HeadBatch:
    """One batch, ready for the kernels, and what any way of taking the step begins with."""

    def __init__(
        self, hidden_RND: Tensor, weight_RBD: Tensor, bias_RB: Tensor, positives: Positives, loss: Loss, blocks: Blocks | None,
        narrow: Scaled | None,
    ):  # fmt: skip
        self.shape = weight_RBD.shape
        _, B, D = self.shape
        self.n_samples = hidden_RND.shape[1]
        is_full = hidden_RND.dtype == weight_RBD.dtype == torch.float32
        self.products = torch.float32 if is_full else torch.bfloat16
        self.blocks = blocks or (FULL if is_full else LOW if narrow is None else EIGHTH)
        self.N = _power(self.n_samples, self.blocks.samples)
        self.widths = [_power(D, d) for d in (self.blocks.outputs[1], self.blocks.update[1])]
        if narrow is not None:
            self.widths[0] = max(32, self.widths[0])  # the least that a product of float8 takes
        self.padded, self.wide = _whole(self.n_samples, self.N), _whole(D, max(self.widths))
        self.n_blocks, self.n_tiles = self.padded // self.N, -(-B // self.blocks.outputs[0])
        self.weight, self.bias, self.loss, self.given = weight_RBD, bias_RB, loss, hidden_RND
        self.is_narrow, self.scales = narrow is not None, self.bias  # the latter where it is not read
        self.hidden = _padded(hidden_RND, self.padded, self.wide, self.products)
        self.seen = self.hidden  # of the outputs
        if narrow is not None:
            self.seen = _padded(narrow.values, self.padded, self.wide, narrow.values.dtype)
            self.scales = torch.nn.functional.pad(narrow.scales.float(), (0, self.padded - self.n_samples))
        self.n_programs = self.blocks.n_programs * _n_multiprocessors(weight_RBD.device)
        self.options = {"num_warps": self.blocks.n_warps if self.N >= 64 else 4, "num_stages": self.blocks.n_stages}
        self._find(positives)
        self.log_total = self._log_total() if loss == "softmax" else self.bias  # the latter where it is not read

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

    def positive_gradients(self, want_loss: bool) -> tuple[Tensor, Tensor]:
        """Give dLoss/dz of each positive, and its loss, or less what it adds as a negative; empty unless wanted."""
        _, B, D = self.shape
        n = len(self.buckets)
        out, losses = self.bias.new_empty(2, n)
        if n:
            kernels.positive_gradients[(-(-n // POSITIVES[0]),)](
                self.seen, self.scales, self.weight, self.bias, self.buckets, self.samples, self.repetitions, self.log_total,
                self.share, out, losses, n, B, D, self.padded, self.wide,
                LOSS=LOSSES[self.loss], WANT_LOSS=want_loss, STORAGE=STORED[self.weight.dtype],
                P=POSITIVES[0], D=_power(D, 128), num_warps=4,
            )  # fmt: skip
        return out, losses

    def output_gradients(self, out: Tensor, first: int, n: int, at_positives: Tensor, losses: Tensor, want_loss: bool) -> None:
        """Write dLoss/dz of n tiles into `out` (R, held outputs, padded samples), and the losses (R, tiles, blocks) if wanted."""
        R, B, D = self.shape
        C, _ = self.blocks.outputs
        kernels.output_gradients[(n * self.n_blocks, R)](
            self.seen, self.scales, self.weight, self.bias, self.buckets, self.samples, at_positives, self.offsets,
            self.log_total, self.share, out, losses,
            first, B, self.n_samples, D, self.padded, self.wide, self.n_tiles, self.n_blocks, out.shape[1],
            LOSS=LOSSES[self.loss], WANT_LOSS=want_loss, STORAGE=STORED[self.weight.dtype],
            EVEN=D % self.widths[0] == 0, C=C, N=self.N, D=self.widths[0], P=POSITIVES[1], **self.options,
        )  # fmt: skip

    def mean_loss(self, total_R: Tensor, extra: Tensor) -> Tensor:
        """Give the loss of each repetition (R,): the sum of all outputs' as negatives, in float64, and what positives change."""
        return (total_R.index_add_(0, self.repetitions, extra.double()) / self.n_samples).to(self.bias.dtype)


def kept(state: State, unused: Tensor) -> list[Tensor]:
    """Give what a rule keeps, as the kernels take it: first and second moments, what rounding lost, and of which rows."""
    return [unused if x is None else x for x in (state.first, state.second, state.lost, state.slots)]


def n_slots(state: State) -> int:
    """Give how many rows of a repetition keep what rounding loses."""
    return 0 if state.lost is None else state.lost.shape[1]


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
def numbers_of(repetitions: tuple[int, ...], device: torch.device) -> Tensor:
    """Give the numbers of the repetitions on a device, int32 (R,)."""
    return torch.tensor(repetitions, dtype=torch.int32, device=device)


@cache
def _n_multiprocessors(device: torch.device) -> int:
    """Give how many a device has; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
