"""A shard of a head: a run of its outputs, with the weights that the whole head would have there and the positives among them.

Axes: R repetitions, N samples, B buckets, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mach.heads.positives import Positives

DRAWN = 1 << 22  # random numbers of one draw; a multiple of ALIKE
ALIKE = 16  # torch draws normal numbers by sixteen; draws of fewer at once, and of what is left of sixteen, go another way


def normal_rows(
    shape: tuple[int, int], rows: range, generator: torch.Generator, made: Callable[[Tensor], Tensor] = lambda drawn: drawn
) -> Tensor:
    """Give some rows of `torch.randn(shape)`, float32, with the same bits, and leave the generator where that leaves it.

    Holds the rows, as `made` makes them of a run of numbers, and one draw of DRAWN numbers beside them, whatever the shape.
    """
    n, D = shape[0] * shape[1], shape[1]
    out = torch.empty(len(rows) * D, dtype=made(torch.empty(0)).dtype)
    first, last = rows.start * D, rows.stop * D
    start = 0
    while start < n:
        stop = n if n - start < DRAWN + ALIKE else start + DRAWN
        drawn = torch.randn(stop - start, generator=generator)
        low, high = max(first, start), min(last, stop)
        if low < high:
            out[low - first : high - first] = made(drawn[low - start : high - start])
        start = stop
    return out.view(len(rows), D)


def positives_within(positives: Positives, buckets: range) -> Positives:
    """Give the positives in a run of buckets, counted from its first; the counts of the samples stay those of all buckets."""
    inside = (positives.buckets >= buckets.start) & (positives.buckets < buckets.stop)
    return replace(
        positives,
        repetitions=positives.repetitions[inside],
        samples=positives.samples[inside],
        buckets=positives.buckets[inside] - buckets.start,
    )
