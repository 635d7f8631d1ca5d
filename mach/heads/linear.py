"""The head: z = h W^T + b for R packed repetitions, stepping over its buckets chunk by chunk.

Axes: R repetitions, N samples of the batch, B buckets, C buckets of a chunk, D hidden width.

A step visits a chunk once: outputs, gradient in place of the outputs, gradient of the hidden vectors, update of the
chunk's weights. Nothing of size N B or B D is kept beyond its chunk, so the full head of many labels fits.

The three products of a step may run in bfloat16, from a copy of the weights that is kept beside them: sums are taken in
float32 inside a product, the weights and the optimiser stay float32, and what is asked of a trained head is float32 too.
Source: Micikevicius et al. 2018, arXiv:1710.03740 (master weights); Kalamkar et al. 2019, arXiv:1905.12322 (bfloat16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mach.config import Loss
from mach.heads import losses
from mach.heads.fused import CHUNK_BYTES as FUSED_BYTES
from mach.heads.fused import can_fuse, fused_step

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of the outputs of one chunk of buckets

Update = Callable[[str, slice, Tensor, Tensor | None], None]  # parameter name, buckets, their gradient, a copy to renew


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
    """R heads of B outputs over D hidden units: weight (R, B, D), bias (R, B).

    `step` multiplies in the type of the hidden vectors it is given.
    """

    def __init__(self, weight_RBD: Tensor, bias_RB: Tensor, *, chunk_bytes: int | None = None):
        self.weight, self.bias = weight_RBD, bias_RB
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES[weight_RBD.device.type]
        self._low: Tensor | None = None  # the weights in the type of the products, where that is another
        self._rooms: dict[str, Tensor] = {}  # memory of a chunk, kept: handing it back and forth costs more than its use

    def logits(self, hidden_RND: Tensor) -> Tensor:
        """Give all outputs, shape (N, R, B), contiguous."""
        out = hidden_RND.new_empty(hidden_RND.shape[1], *self.weight.shape[:2])
        torch.baddbmm(self.bias.unsqueeze(1), hidden_RND, self.weight.transpose(1, 2), out=out.transpose(0, 1))
        return out

    def step(
        self, hidden_RND: Tensor, positives: Positives, *, loss: Loss, update: Update, want_loss: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Update the head on one batch and give the gradient of the mean loss with respect to the hidden vectors.

        `update(name, buckets, gradient, copy)` is called once a chunk for "head.weight" and "head.bias", after the chunk's old
        weights have served; `copy` (R, B, D) holds the weights in the type of the products, where that is another, or is None.
        Losses are summed over outputs and averaged over samples.

        Where `mach.heads.fused.can_fuse`, kernels update the weights by the rule that `update` carries, and `update` is called
        once, for all biases.

        Returns: gradient (R, N, D), of the weights' type; the loss of each repetition (R,) in nats a sample (squared units
                 for the hinge), if wanted.
        """
        if can_fuse(self.weight, self.bias, update):
            self._low, how = None, {"rule": update.rule, "state": update.state}  # type: ignore[attr-defined]
            how |= {"loss": loss, "want_loss": want_loss, "chunk_bytes": min(self.chunk_bytes, FUSED_BYTES)}
            grad_hidden, grad_bias, value = fused_step(hidden_RND, self.weight, self.bias, positives, **how)
            update("head.bias", slice(0, self.bias.shape[1]), grad_bias, None)
            return grad_hidden, value
        N = hidden_RND.shape[1]
        weight = self._weight_as(hidden_RND.dtype)
        chunks = list(self._chunks(N, hidden_RND.element_size()))
        log_total = self._log_total(hidden_RND, weight, chunks) if loss == "softmax" else None
        mean_hidden = hidden_RND / N  # so that no pass over the outputs is spent on the division
        grad_hidden = torch.zeros_like(hidden_RND, dtype=self.weight.dtype)
        total = torch.zeros_like(self.bias[:, 0])
        for chunk in chunks:
            z = self._outputs(hidden_RND, weight, chunk)
            value = self._gradient_in_place(z, positives, chunk, loss, want_loss, log_total)
            total += 0 if value is None else value
            grad_hidden += torch.bmm(z, weight[:, chunk])
            gradient = self._room("gradient", z.dtype, len(weight), z.shape[2], weight.shape[2])
            update("head.weight", chunk, torch.bmm(z.transpose(1, 2), mean_hidden, out=gradient), self._low)
            update("head.bias", chunk, z.sum(1, dtype=self.bias.dtype).div_(N), None)
        return grad_hidden.div_(N), total / N if want_loss else None

    def _weight_as(self, dtype: torch.dtype) -> Tensor:
        """Give the weights in the type of the products; a copy is kept, and brought up to date by `step` chunk by chunk."""
        if dtype == self.weight.dtype:
            self._low = None
            return self.weight
        if self._low is None or self._low.dtype != dtype:
            self._low = self.weight.to(dtype)
        return self._low

    def _room(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Give memory of a shape, of no certain content: the same one each time, as long as it is large enough."""
        room, n = self._rooms.get(name), math.prod(shape)
        if room is None or room.dtype != dtype or room.numel() < n:
            self._rooms[name] = room = torch.empty(n, dtype=dtype, device=self.weight.device)
        return room[:n].view(shape)

    def _chunks(self, n_samples: int, n_bytes: int) -> Iterator[slice]:
        R, B, _ = self.weight.shape
        width = max(1, self.chunk_bytes // (R * max(1, n_samples) * n_bytes))
        return (slice(b, min(b + width, B)) for b in range(0, B, width))

    def _outputs(self, hidden_RND: Tensor, weight_RBD: Tensor, chunk: slice) -> Tensor:
        bias = self.bias[:, chunk].unsqueeze(1).to(hidden_RND.dtype)
        (R, N, _), C = hidden_RND.shape, bias.shape[2]
        z = self._room("outputs", hidden_RND.dtype, R, N, C)
        return torch.baddbmm(bias, hidden_RND, weight_RBD[:, chunk].transpose(1, 2), out=z)

    def _log_total(self, hidden_RND: Tensor, weight_RBD: Tensor, chunks: list[slice]) -> Tensor:
        """Give the log-sum-exp over all outputs, (R, N), in a pass of its own that keeps no outputs."""
        kept = self.weight.dtype
        parts = [torch.logsumexp(self._outputs(hidden_RND, weight_RBD, chunk).to(kept), 2) for chunk in chunks]
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
        counts = positives.counts_RN.to(log_total_RN.dtype)
        share = counts[repetitions, samples].reciprocal()
        return losses.softmax(z_RNC, hits, want_loss, log_total_RN, share, counts > 0)
