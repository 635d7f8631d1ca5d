"""The head: z = h W^T + b for R packed repetitions, stepping over its buckets chunk by chunk.

Axes: R repetitions, N samples of the batch, B buckets, C buckets of a chunk, D hidden width.

A step visits a chunk once: outputs, gradient in place of the outputs, gradient of the hidden vectors, update of the
chunk's weights. Nothing of size N B or B D is kept beyond its chunk, so the full head of many labels fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mach.config import Loss
from mach.heads import losses

CHUNK_BYTES = 64 << 20  # of the outputs of one chunk of buckets

Update = Callable[[str, slice, Tensor], None]  # parameter name, buckets, their gradient


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
        tensors = (torch.from_numpy(x).to(device) for x in (repetitions, samples, buckets, counts))
        return cls(*tensors)


class LinearHead:
    """R heads of B outputs over D hidden units: weight (R, B, D), bias (R, B)."""

    def __init__(self, weight_RBD: Tensor, bias_RB: Tensor, *, chunk_bytes: int = CHUNK_BYTES):
        self.weight, self.bias, self.chunk_bytes = weight_RBD, bias_RB, chunk_bytes

    def logits(self, hidden_RND: Tensor) -> Tensor:
        """Give all outputs, shape (N, R, B), contiguous."""
        out = hidden_RND.new_empty(hidden_RND.shape[1], *self.weight.shape[:2])
        torch.baddbmm(self.bias.unsqueeze(1), hidden_RND, self.weight.transpose(1, 2), out=out.transpose(0, 1))
        return out

    def step(
        self, hidden_RND: Tensor, positives: Positives, *, loss: Loss, update: Update, want_loss: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Update the head on one batch and give the gradient of the mean loss with respect to the hidden vectors.

        `update(name, buckets, gradient)` is called once a chunk for "head.weight" and "head.bias", after the chunk's old
        weights have served. Losses are summed over outputs and averaged over samples.

        Returns: gradient (R, N, D); the loss of each repetition (R,) in nats a sample (squared units for the hinge), if wanted.
        """
        N = hidden_RND.shape[1]
        chunks = list(self._chunks(N))
        log_total = self._log_total(hidden_RND, chunks) if loss == "softmax" else None
        grad_hidden = torch.zeros_like(hidden_RND)
        total = hidden_RND.new_zeros(len(self.weight))
        for chunk in chunks:
            z = self._outputs(hidden_RND, chunk)
            value = self._gradient_in_place(z, positives, chunk, loss, want_loss, log_total)
            total += 0 if value is None else value
            z /= N
            torch.baddbmm(grad_hidden, z, self.weight[:, chunk], out=grad_hidden)
            update("head.weight", chunk, torch.bmm(z.transpose(1, 2), hidden_RND))
            update("head.bias", chunk, z.sum(1))
        return grad_hidden, total / N if want_loss else None

    def _chunks(self, n_samples: int) -> Iterator[slice]:
        R, B, _ = self.weight.shape
        width = max(1, self.chunk_bytes // (R * max(1, n_samples) * self.weight.element_size()))
        return (slice(b, min(b + width, B)) for b in range(0, B, width))

    def _outputs(self, hidden_RND: Tensor, chunk: slice) -> Tensor:
        return torch.baddbmm(self.bias[:, chunk].unsqueeze(1), hidden_RND, self.weight[:, chunk].transpose(1, 2))

    def _log_total(self, hidden_RND: Tensor, chunks: list[slice]) -> Tensor:
        """Give the log-sum-exp over all outputs, (R, N), in a pass of its own that keeps no outputs."""
        parts = [torch.logsumexp(self._outputs(hidden_RND, chunk), 2) for chunk in chunks]
        return torch.logsumexp(torch.stack(parts), 0)

    @staticmethod
    def _gradient_in_place(
        z_RNC: Tensor, positives: Positives, chunk: slice, loss: Loss, want_loss: bool, log_total_RN: Tensor | None
    ) -> Tensor | None:
        """Turn a chunk's outputs into the gradient of the summed loss; give the loss of each repetition if wanted."""
        inside = (positives.buckets >= chunk.start) & (positives.buckets < chunk.stop)
        repetitions, samples = positives.repetitions[inside], positives.samples[inside]
        _, N, C = z_RNC.shape
        hits = (repetitions * N + samples) * C + positives.buckets[inside] - chunk.start
        if loss == "logistic":
            return losses.logistic(z_RNC, hits, want_loss)
        if loss == "squared-hinge":
            return losses.squared_hinge(z_RNC, hits, want_loss)
        assert log_total_RN is not None
        counts = positives.counts_RN.to(z_RNC.dtype)
        share = counts[repetitions, samples].reciprocal()
        return losses.softmax(z_RNC, hits, want_loss, log_total_RN, share, (counts > 0).to(z_RNC.dtype))
