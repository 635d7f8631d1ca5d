"""A head's update rule, taken on a chunk of buckets in one pass: read weights and gradient, change, round, write.

Axes: R repetitions, C buckets of the chunk, D hidden width, S buckets of a repetition that keep what rounding loses.
On a CPU a kernel a rule, row by row through a buffer of one row; elsewhere the same in torch. The rules: `mach.heads.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mach.config import HeadOptimizer
from mach.heads.rounding import NARROW, load_row, narrow_randomly, row_key, store_compensated, store_row, widen
from mach.heads.rules import BETAS, EPSILON, Rule
from mach.kernels import array_of, float_of, in_threads, jit, jit_ieee, jit_sums, read, write

LEAST = 1 << 16  # weights of one task; below, handing out tasks costs more than it saves
BLOCK = 1 << 22  # weights that torch changes at a time, each in a handful of numbers of its own


@dataclass(frozen=True, slots=True)
class Lost:
    """What rounding to bfloat16 loses of some buckets' weights: bfloat16 (R, S, D)."""

    weight_RSD: Tensor
    slots_RB: Tensor  # int32: a bucket's place in it, or -1


def apply_(
    rule: Rule, weight_RBD: Tensor, part: slice, gradient_RCD: Tensor, moments: Sequence[Tensor], low_RBD: Tensor | None = None,
    lost: Lost | None = None,
) -> None:  # fmt: skip
    """Change `weight[:, part]`, its moments and its copy for products in place; the same bits for any chunks and threads.

    Args: weight, (R, B, D), or (R, B), rows of width 1; moments, what the rule keeps (`state_of`): nothing (sgd), one number a
          bucket (R, B), or two a weight; gradient, of the type of the weights or bfloat16.
    """
    start, stop, _ = part.indices(weight_RBD.shape[1])
    chunk = slice(start, stop)
    if weight_RBD.dim() == 2:
        wide = [x.unsqueeze(2) if rule.kind == "adamw" else x for x in moments]
        _apply_in_blocks(rule, weight_RBD.unsqueeze(2), chunk, gradient_RCD.unsqueeze(2), wide, None, None)
    elif weight_RBD.device.type == "cpu":
        _apply_here(rule, weight_RBD, chunk, gradient_RCD, moments, low_RBD, lost)
    else:
        _apply_in_blocks(rule, weight_RBD, chunk, gradient_RCD, moments, low_RBD, lost)


def _apply_here(
    rule: Rule, weight: Tensor, part: slice, gradient: Tensor, moments: Sequence[Tensor], low: Tensor | None, lost: Lost | None
) -> None:
    R, D = len(weight), weight.shape[2]
    dtype = np.dtype(np.float64 if weight.dtype == torch.float64 else np.float32).type
    (kernel, numbers), keys = _kernel_of(rule), rule.keys
    none = np.empty((0, D), np.uint16), np.empty((0, D), np.uint16), np.empty(0, np.int32)
    rows, tasks = max(1, LEAST // D, -(-(part.stop - part.start) // torch.get_num_threads())), []
    for r in range(R):
        for start in range(part.start, part.stop, rows):
            end = min(start + rows, part.stop)
            arrays = [array_of(x[r, start:end]) for x in (weight, *moments)]
            g = array_of(gradient[r, start - part.start : end - part.start])
            copy = none[0] if low is None else array_of(low[r, start:end])
            kept = none[1:] if lost is None else (array_of(lost.weight_RSD[r]), lost.slots_RB[r, start:end].numpy())
            where = np.uint32(keys[r]), rule.first + start
            tasks.append((*arrays, g, copy, *kept, np.empty(D, dtype), *where, *map(dtype, numbers)))
    in_threads(kernel, tasks, torch.get_num_threads())


def _kernel_of(rule: Rule) -> tuple[Callable[..., None], tuple[float, ...]]:
    """Give a rule's kernel, and the numbers that it takes last."""
    keep, rate = 1 - rule.rate * rule.weight_decay, rule.rate
    if rule.kind == "sgd":
        return _sgd, (keep, rate)
    if rule.kind == "adamw":
        root = (1 - BETAS[1] ** rule.step) ** 0.5
        return _adamw, (keep, rate * root / (1 - BETAS[0] ** rule.step), 1 - BETAS[0], 1 - BETAS[1], root * EPSILON)
    return _rowwise, (keep, rate, *_averaging(rule), EPSILON)


def _averaging(rule: Rule) -> tuple[float, float, float]:
    """Give by how much a row's moment shrinks, by how much of the new square it grows, and by what it is then read."""
    if rule.kind == "rowwise-adagrad":
        return 1.0, 1.0, 1.0
    return BETAS[1], 1 - BETAS[1], 1 / (1 - BETAS[1] ** rule.step)


@jit
def _begin(row: np.ndarray, stored: np.ndarray, lost: np.ndarray, slot: int) -> None:
    load_row(row, stored)
    if slot >= 0:
        for d in range(len(row)):
            row[d] += float_of(lost[slot, d])


@jit
def _end(stored: np.ndarray, row: np.ndarray, key: np.uint32, number: int, lost: np.ndarray, slot: int) -> None:
    if slot >= 0:
        store_compensated(stored, lost[slot], row)
    else:
        store_row(stored, row, row_key(key, number))


@jit
def _copy(low_CD: np.ndarray, c: int, row: np.ndarray) -> None:
    if len(low_CD):
        low = low_CD[c]
        for d in range(len(row)):
            write(low, d, row[d])


@jit_sums
def _mean_square(gradient: np.ndarray, zero: float) -> float:
    total = zero
    for d in range(len(gradient)):
        total += read(gradient[d]) * read(gradient[d])
    return total / len(gradient)


@jit_ieee
def _sgd(
    weight: np.ndarray, gradient: np.ndarray, low: np.ndarray, lost: np.ndarray, slots: np.ndarray, row: np.ndarray,
    key: np.uint32, first: int, keep: float, rate: float,
) -> None:  # fmt: skip
    for c in range(len(weight)):
        slot, g = slots[c] if len(slots) else -1, gradient[c]
        _begin(row, weight[c], lost, slot)
        for d in range(len(row)):
            row[d] = keep * row[d] - rate * read(g[d])
        _end(weight[c], row, key, first + c, lost, slot)
        _copy(low, c, row)


@jit_ieee
def _rowwise(
    weight: np.ndarray, second: np.ndarray, gradient: np.ndarray, low: np.ndarray, lost: np.ndarray, slots: np.ndarray,
    row: np.ndarray, key: np.uint32, first: int, keep: float, rate: float, shrink: float, grow: float, correct: float,
    epsilon: float,
) -> None:  # fmt: skip
    for c in range(len(weight)):
        slot, g = slots[c] if len(slots) else -1, gradient[c]
        second[c] = shrink * second[c] + grow * _mean_square(g, rate * 0)
        scale = rate / (np.sqrt(correct * second[c]) + epsilon)
        _begin(row, weight[c], lost, slot)
        for d in range(len(row)):
            row[d] = keep * row[d] - scale * read(g[d])
        _end(weight[c], row, key, first + c, lost, slot)
        _copy(low, c, row)


@jit_ieee
def _adamw(
    weight: np.ndarray, first_moment: np.ndarray, second_moment: np.ndarray, gradient: np.ndarray, low: np.ndarray,
    lost: np.ndarray, slots: np.ndarray, row: np.ndarray, key: np.uint32, first: int, keep: float, rate: float, share_1: float,
    share_2: float, epsilon: float,
) -> None:  # fmt: skip
    for c in range(len(weight)):
        slot, g, m, v = slots[c] if len(slots) else -1, gradient[c], first_moment[c], second_moment[c]
        _begin(row, weight[c], lost, slot)
        for d in range(len(row)):
            x = read(g[d])
            moment = m[d] + share_1 * (x - m[d])
            square = v[d] + share_2 * (x * x - v[d])
            m[d], v[d] = moment, square
            row[d] = keep * row[d] - rate * moment / (np.sqrt(square) + epsilon)
        _end(weight[c], row, key, first + c, lost, slot)
        _copy(low, c, row)


def _apply_in_blocks(
    rule: Rule, weight: Tensor, part: slice, gradient: Tensor, moments: Sequence[Tensor], low: Tensor | None, lost: Lost | None
) -> None:
    """Do the same in torch, some rows at a time, so that what it makes on the way stays small."""
    R, D = len(weight), weight.shape[2]
    wide = torch.float32 if weight.dtype in NARROW else weight.dtype
    rows = max(1, BLOCK // (R * D))
    for start in range(part.start, part.stop, rows):
        block = slice(start, min(start + rows, part.stop))
        g = gradient[:, block.start - part.start : block.stop - part.start].to(wide)
        row = widen(weight[:, block], torch.empty(g.shape, dtype=wide, device=g.device))
        slots = None if lost is None else lost.slots_RB[:, block]
        if lost is not None and slots is not None:
            for r, of in enumerate(slots):
                row[r, of >= 0] += lost.weight_RSD[r, of[of >= 0]].to(wide)
        change = _change(rule, g, [x[:, block] for x in moments])
        row.mul_(1 - rule.rate * rule.weight_decay).sub_(change)
        is_narrow = weight.dtype in NARROW
        weight[:, block] = narrow_randomly(row, weight.dtype, rule.keys, rule.first + start) if is_narrow else row
        if lost is not None and slots is not None:
            for r, of in enumerate(slots):
                exact, nearest = row[r, of >= 0], row[r, of >= 0].to(weight.dtype)
                weight[r, block][of >= 0] = nearest
                lost.weight_RSD[r, of[of >= 0]] = (exact - nearest.to(wide)).to(weight.dtype)
        if low is not None:
            low[:, block] = row


def _change(rule: Rule, g: Tensor, moments: Sequence[Tensor]) -> Tensor:
    """Renew the moments, in place; give what is to be taken from the weights."""
    if rule.kind == "sgd":
        return g * rule.rate
    if rule.kind == "adamw":
        first, second = moments
        first.lerp_(g, 1 - BETAS[0])
        second.lerp_(g.square(), 1 - BETAS[1])
        below = (second / (1 - BETAS[1] ** rule.step)).sqrt_().add_(EPSILON)
        return (first / below).mul_(rule.rate / (1 - BETAS[0] ** rule.step))
    (second,) = moments
    shrink, grow, correct = _averaging(rule)
    second.mul_(shrink).add_(torch.linalg.vector_norm(g, dim=2).square_().div_(g.shape[2]), alpha=grow)
    return g * (rule.rate / ((second * correct).sqrt_() + EPSILON)).unsqueeze(2)


def state_of(kind: HeadOptimizer, weight: Tensor) -> dict[str, Tensor]:
    """Give what a rule keeps for a weight (R, B) or (R, B, D), zeros at the start."""
    wide = torch.float32 if weight.dtype in NARROW else weight.dtype
    if kind == "sgd":
        return {}
    if kind == "adamw":
        return {name: torch.zeros_like(weight, dtype=wide) for name in ("first", "second")}
    return {"second": torch.zeros(weight.shape[:2], dtype=wide, device=weight.device)}
