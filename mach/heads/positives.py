"""The positive buckets of a batch: what a head learns from, without a dense target.

Axes: R repetitions, N samples of the batch, P positives of all repetitions and samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mach.gpu import send


@dataclass(frozen=True, slots=True)
class Positives:
    """The positive buckets of a batch, each (repetition, sample, bucket) once, in rising order, on one device."""

    repetitions: Tensor  # int64 (P,)
    samples: Tensor  # int64 (P,)
    buckets: Tensor  # int64 (P,)
    counts_RN: Tensor  # int64 (R, N), positives of each sample

    @classmethod
    def of(cls, buckets_of: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> Positives:
        """Join one CSR (indptr (N + 1,), buckets) a repetition."""
        counts = np.stack([np.diff(indptr) for indptr, _ in buckets_of])
        R, N = counts.shape
        samples = np.repeat(np.tile(np.arange(N), R), counts.ravel())
        repetitions = np.repeat(np.arange(R), counts.sum(1))
        buckets = np.concatenate([indices[: indptr[-1] - indptr[0]] for indptr, indices in buckets_of]).astype(np.int64)
        return cls(*(send(x, device) for x in (repetitions, samples, buckets, counts)))

    def of_samples(self, rows: slice) -> Positives:
        """Give the positives of a run of the samples, counted from its start."""
        inside = (self.samples >= rows.start) & (self.samples < rows.stop)
        repetitions, samples, buckets = (x[inside] for x in (self.repetitions, self.samples, self.buckets))
        return Positives(repetitions, samples - rows.start, buckets, self.counts_RN[:, rows])
