"""The head: z = h W^T + b for R packed repetitions, stepping over its buckets chunk by chunk.

Axes: R repetitions, N samples of the batch, B buckets, C buckets of a chunk, D hidden width.

A step visits a chunk once: outputs, gradient in place of the outputs, gradient of the hidden vectors, update of the
chunk's weights. Nothing of size N B or B D is kept beyond its chunk, so the full head of many labels fits.

The three products of a step may run in bfloat16. From float32 weights, by a copy that is kept beside them, or made chunk by
chunk where it were large; weights stored in bfloat16 serve as they are, those in float8 are widened chunk by chunk
(`mach.heads.rounding`), and there is no other copy. Outputs of these may come of hidden vectors rounded to float8 too
(`mach.heads.scaled`): products of float8 where the fused step runs, of the same numbers widened elsewhere. Sums are taken in
float32 inside a product, the bias, the gradient of the hidden vectors and the optimiser are float32 whatever the storage, and
what is asked of a trained head is computed in float32 too.
Source: Micikevicius et al. 2018, arXiv:1710.03740 (master weights); Kalamkar et al. 2019, arXiv:1905.12322 (bfloat16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mach.config import Loss
from mach.heads import losses
from mach.heads.fused import IN_REGISTERS, can_fuse, fused_step
from mach.heads.positives import Positives
from mach.heads.rounding import NARROW, widen
from mach.heads.rules import Ruled
from mach.heads.scaled import scaled
from mach.kernels import array_of, in_threads, jit_ieee, read

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # that a step takes for one chunk of buckets
ALIGNED = 64  # buckets of which a chunk's width is a multiple: products with rows that begin anywhere take twice as long on a GPU
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # of a copy of the weights that is kept, at most
SUMS = 2048  # over samples that a thread takes at a time: they stay in its cache
LATE_CHUNKS = 2  # whose weights are updated after the hidden vectors' gradient is told: each holds its outputs until then

Update = Callable[[str, slice, Tensor, Tensor | None], None]  # parameter name, buckets, their gradient, a copy to renew


def keeps_copy(n_weights: int, *, products: torch.dtype, storage: torch.dtype, device: torch.device) -> bool:
    """Tell whether a head keeps a copy of wide weights for its products; of many, a chunk at a time is made anew in each step."""
    return storage not in NARROW and storage != products and n_weights * products.itemsize <= COPY_BYTES[device.type]


def bucket_bytes(n_samples: int, width: int, *, products: torch.dtype) -> int:
    """Give the bytes that a bucket of a chunk takes in a step: outputs, passes for the loss, gradient, weights for products."""
    return n_samples * (products.itemsize + 3 * max(4, products.itemsize)) + 2 * width * products.itemsize


class LinearHead:
    """R heads of B outputs over D hidden units: weight (R, B, D), bias (R, B).

    `step` multiplies in the type of the hidden vectors it is given. `chunk_bytes` bounds what it takes beside weights, hidden
    vectors and their gradients. With `in_float8`, for weights stored in it, it makes outputs of hidden vectors rounded to float8.
    """

    def __init__(self, weight_RBD: Tensor, bias_RB: Tensor, *, chunk_bytes: int | None = None, in_float8: bool = False):
        self.weight, self.bias, self.in_float8 = weight_RBD, bias_RB, in_float8
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES[weight_RBD.device.type]
        self._low: Tensor | None = None  # the weights in the type of the products, where that is another
        self._rooms: dict[str, Tensor] = {}  # memory of a chunk, kept: handing it back and forth costs more than its use

    def logits(self, hidden_RND: Tensor) -> Tensor:
        """Give all outputs, shape (N, R, B), contiguous, of the type of the hidden vectors; threads may ask at once."""
        N, dtype = hidden_RND.shape[1], hidden_RND.dtype
        out = hidden_RND.new_empty(N, *self.weight.shape[:2])
        for chunk in [slice(None)] if self.weight.dtype == dtype else self._chunks(N, dtype):
            weight, bias = self.weight[:, chunk], self.bias[:, chunk].unsqueeze(1).to(dtype)
            if weight.dtype != dtype:
                weight = widen(weight, torch.empty_like(weight, dtype=dtype))
            torch.baddbmm(bias, hidden_RND, weight.transpose(1, 2), out=out.transpose(0, 1)[..., chunk])
        return out

    def some_logits(self, hidden_RND: Tensor, outputs: slice | Tensor, room: Tensor) -> Tensor:
        """Give some of the outputs, a run or a list of C of them: (R, N, C), contiguous, at the beginning of a flat room."""
        weight, bias = self.weight[:, outputs], self.bias[:, outputs].unsqueeze(1).to(hidden_RND.dtype)
        (R, N, _), C = hidden_RND.shape, weight.shape[1]
        if weight.dtype != hidden_RND.dtype:
            weight = widen(weight, torch.empty_like(weight, dtype=hidden_RND.dtype))
        return torch.baddbmm(bias, hidden_RND, weight.transpose(1, 2), out=room[: R * N * C].view(R, N, C))

    def step(
        self, hidden_RND: Tensor, positives: Positives, *, loss: Loss, update: Update, want_loss: bool,
        join_log_total: Callable[[Tensor], Tensor] | None = None, tell_gradient: Callable[[Tensor], None] | None = None,
        lap: Callable[[str], None] = lambda part: None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Update the head on one batch and give the gradient of the mean loss with respect to the hidden vectors.

        `update(name, buckets, gradient, copy)` is called once a chunk for "head.weight" and "head.bias", after the chunk's old
        weights have served; `copy` (R, B, D) is that of wide weights in the type of the products, where that is another,
        or None. What it does, `mach.heads.rules.rule_of(update)` may tell. Losses are summed over outputs and averaged over
        samples. `lap("head forward")` is called when a chunk's outputs have become their gradients; what follows, but for the
        updates, is the way back.

        A head that is a shard of a larger one turns the log-sum-exp (R, N) of its own outputs into that of all by
        `join_log_total`, for the softmax. `tell_gradient` gets the gradient to be returned, complete, before the weights of the
        last LATE_CHUNKS chunks are updated, so that sending it runs beside that.

        Where `mach.heads.fused.can_fuse`, kernels update the weights by the rule that `update` carries, and `update` is called
        once, for all biases.

        Returns: gradient (R, N, D), of the bias's type; the loss of each repetition (R,) in nats a sample (squared units
                 for the hinge), if wanted.
        """
        R, N, D = hidden_RND.shape
        narrow = scaled(hidden_RND) if self.in_float8 else None
        is_whole = loss != "softmax" or join_log_total is None
        if isinstance(update, Ruled) and update.state is not None and is_whole and can_fuse(self.weight, self.bias, update.rule):
            if N > IN_REGISTERS:
                self._renew_low(hidden_RND.dtype)
            else:
                self._low = None
            grad_hidden, grad_bias, value = fused_step(
                hidden_RND, self.weight, self.bias, positives,
                loss=loss, rule=update.rule, state=update.state, want_loss=want_loss, chunk_bytes=self.chunk_bytes, narrow=narrow,
                low=self._low,
            )  # fmt: skip
            if tell_gradient is not None:
                tell_gradient(grad_hidden)
            update("head.bias", slice(0, self.bias.shape[1]), grad_bias, None)
            return grad_hidden, value
        self._renew_low(hidden_RND.dtype)
        chunks = list(self._chunks(N, hidden_RND.dtype))
        seen = hidden_RND if narrow is None else narrow.widened(hidden_RND.dtype)  # by the outputs alone
        log_total = self._log_total(seen, chunks) if loss == "softmax" else None
        if log_total is not None and join_log_total is not None:
            log_total = join_log_total(log_total)
        n_late, late = 0 if tell_gradient is None else min(LATE_CHUNKS, len(chunks)), []
        mean_hidden = hidden_RND / N  # so that no pass over the outputs is spent on the division
        grad_hidden = torch.zeros_like(hidden_RND, dtype=self.bias.dtype)
        total = torch.zeros_like(self.bias[:, 0])

        def learn(chunk: slice, z: Tensor) -> None:
            gradient = self._room("gradient", z.dtype, R, z.shape[2], D)
            update("head.weight", chunk, torch.bmm(z.transpose(1, 2), mean_hidden, out=gradient), self._low)
            update("head.bias", chunk, _sum_over_samples(z, self.bias.dtype).div_(N), None)

        for i, chunk in enumerate(chunks):
            weight = self._widened(chunk, hidden_RND.dtype)
            z = self._outputs(seen, weight, chunk, f"outputs {max(0, n_late - len(chunks) + i)}")
            value = self._gradient_in_place(z, positives, chunk, loss, want_loss, log_total)
            total += 0 if value is None else value
            lap("head forward")
            grad_hidden += torch.bmm(z, weight)
            if i < len(chunks) - n_late:
                learn(chunk, z)
            else:
                late.append((chunk, z))
        grad_hidden.div_(N)
        if tell_gradient is not None:
            tell_gradient(grad_hidden)
        for chunk, z in late:
            learn(chunk, z)
        return grad_hidden, total / N if want_loss else None

    def _renew_low(self, dtype: torch.dtype) -> None:
        """Make the copy of wide weights for products in another type, once: `step` has it brought up to date chunk by chunk."""
        if not keeps_copy(self.weight.numel(), products=dtype, storage=self.weight.dtype, device=self.weight.device):
            self._low = None
        elif self._low is None or self._low.dtype != dtype:
            self._low = self.weight.to(dtype)

    def _widened(self, chunk: slice, dtype: torch.dtype) -> Tensor:
        """Give a chunk of the weights (R, C, D) as numbers of a type; in a room that the next call uses again, if need be."""
        part = (self._low if self._low is not None and self._low.dtype == dtype else self.weight)[:, chunk]
        if part.dtype == dtype and (part.is_contiguous() or part.device.type != "cpu"):
            return part
        return widen(part, self._room("weight", dtype, *part.shape))  # products of what lies apart take twice as long on a CPU

    def _room(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Give memory of a shape, of no certain content: the same one each time, as long as it is large enough."""
        room, n = self._rooms.get(name), math.prod(shape)
        if room is None or room.dtype != dtype or room.numel() < n:
            self._rooms[name] = room = torch.empty(n, dtype=dtype, device=self.weight.device)
        return room[:n].view(shape)

    def _chunks(self, n_samples: int, products: torch.dtype) -> Iterator[slice]:
        R, B, D = self.weight.shape
        most = max(1, self.chunk_bytes // (R * bucket_bytes(n_samples, D, products=products)))
        step = ALIGNED if most >= ALIGNED else 1
        n_chunks = -(-B // (most // step * step))
        width = -(-B // (n_chunks * step)) * step
        return (slice(b, min(b + width, B)) for b in range(0, B, width))

    def _outputs(self, hidden_RND: Tensor, weight_RCD: Tensor, chunk: slice, room: str = "outputs 0") -> Tensor:
        bias = self.bias[:, chunk].unsqueeze(1).to(hidden_RND.dtype)
        (R, N, _), C = hidden_RND.shape, bias.shape[2]
        z = self._room(room, hidden_RND.dtype, R, N, C)
        return torch.baddbmm(bias, hidden_RND, weight_RCD.transpose(1, 2), out=z)

    def _log_total(self, hidden_RND: Tensor, chunks: list[slice]) -> Tensor:
        """Give the log-sum-exp over all outputs, (R, N), in a pass of its own that keeps no outputs."""
        dtype, parts = hidden_RND.dtype, []
        for chunk in chunks:
            z = self._outputs(hidden_RND, self._widened(chunk, dtype), chunk)
            parts.append(torch.logsumexp(z.to(self.bias.dtype), 2))
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


def _sum_over_samples(z_RNC: Tensor, dtype: torch.dtype) -> Tensor:
    """Give the sums over the samples, (R, C), taken in a type of float; torch takes five times as long over bfloat16 on a CPU."""
    if z_RNC.dtype != torch.bfloat16 or z_RNC.device.type != "cpu":
        return z_RNC.sum(1, dtype=dtype)
    R, _, C = z_RNC.shape
    total = torch.zeros(R, C, dtype=dtype)
    arrays = array_of(z_RNC), total.numpy()
    tasks = [(*(x[r, ..., c : c + SUMS] for x in arrays),) for r in range(R) for c in range(0, C, SUMS)]
    in_threads(_add_up, tasks, torch.get_num_threads())
    return total


@jit_ieee
def _add_up(z_NC: np.ndarray, total_C: np.ndarray) -> None:
    for n in range(len(z_NC)):
        z = z_NC[n]
        for c in range(len(total_C)):
            total_C[c] += read(z[c])
