"""The training loop of one full head on several ranks: the encoder data-parallel, the head cut into runs of labels.

A step of P ranks, each with its part n of the batch's N samples and its run of the B = K outputs:

    own samples' features -> hidden vectors (n, D)                    all_gather -> (N, D)
    own outputs' loss, gradient and update, for all N samples         softmax: all_gather of the log-sum-exp (N,)
    gradient of the hidden vectors (N, D), own outputs' share         reduce_scatter -> (n, D), while the last weights update
    own samples' backward through the MLP                             all_reduce of its gradients, and of the loss
    gradient of z (n, D)                                              all_gather -> (N, D)
    every feature row of the batch                                    updated on every rank alike

The input layer is kept whole on every rank: its rows are updated from the gradient of z of the whole batch, N D numbers, and from
the batch's features, which every rank reads from the data set itself. Sending rows instead would take U D numbers, for the U
distinct features of the batch, which are many times N. The price: this one part of the work does not shrink with P.

Dropout, data order and initial weights are those of one process; what differs is the order in which sums are taken.

Axes: N samples of the batch, n of a rank, R = 1 repetition, B buckets, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mach.comm import Comm, Pending, lengths_of, part_of
from mach.config import Config
from mach.data import CSR, Dataset, take, take_rows
from mach.decoding.merge import merge_topk, padded
from mach.decoding.topk import TopK
from mach.encoders import Dropout
from mach.errors import ConfigError
from mach.hashing import LabelTable
from mach.heads import Positives
from mach.heads.shard import positives_within
from mach.metrics import precision_at_k
from mach.model import DEFAULT_ESTIMATOR, Batch, Sizes
from mach.train.loop import VALIDATION_KS, Group, Ready

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ReadyPart(Ready):
    """One batch on the device, with the positives among this rank's outputs, and this rank's samples apart."""

    own: Batch


class PartDropout(Dropout):
    """Draw the masks of a whole batch and give those of a part of its samples: a byte for each of N D, quicker than sending."""

    def __init__(self, whole: Dropout, n_samples: int, part: range):
        self.generators, self.kept, self.scale = whole.generators, whole.kept, whole.scale
        self._n_samples, self._part = n_samples, part

    def bytes(self, n_samples: int, width: int) -> Tensor:
        """Draw one byte an entry of the whole batch, and give the part's, uint8 (R, n, D)."""
        return super().bytes(self._n_samples, width)[:, self._part.start : self._part.stop].contiguous()


class ShardedGroup(Group):
    """One rank's share in training a full head; the parameters are whole but for the head's, which are those of `outputs`.

    Raises: ConfigError if there are more ranks than labels, or some outputs are to be compensated.
    """

    def __init__(
        self, config: Config, dataset: Dataset, sizes: Sizes, table: LabelTable, device: torch.device, comm: Comm,
        dtype: torch.dtype = torch.float32, products: torch.dtype | None = None,
    ):  # fmt: skip
        if sizes.n_buckets < comm.size:
            raise ConfigError(f"{comm.size} processes: there must be at most {sizes.n_buckets}, the labels of this data set")
        if config.compensated and comm.size > 1:
            raise ConfigError(f"compensated={config.compensated:g} is for one process, not {comm.size}: choose compensated=0")
        self.comm = comm
        self.outputs = part_of(sizes.n_buckets, comm.rank, comm.size)
        super().__init__(config, dataset, sizes, table, device, dtype, products)

    def _prepare(self, rows: np.ndarray) -> Ready:
        features, labels = take(self.train.features, rows), take_rows(self.train.labels, rows)
        buckets = [self.table.positives(labels.indptr, labels.indices, r) for r in range(len(self.repetitions))]
        assert self.outputs is not None
        inside = positives_within(Positives.of(buckets, CPU), self.outputs)
        tensors = (inside.repetitions, inside.samples, inside.buckets, inside.counts_RN)
        own = np.asarray(self._own(len(rows)), np.int64)
        positives = Positives(*(x.to(self.device) for x in tensors))
        return ReadyPart(rows, self._batch(features), positives, self._batch(take(features, own)))

    def _own(self, n_samples: int) -> range:
        """Give the places in a batch of N samples that are this rank's."""
        return part_of(n_samples, self.comm.rank, self.comm.size)

    def _learn(self, ready: Ready, want_loss: bool) -> Tensor | None:
        assert isinstance(ready, ReadyPart)
        packed, lap, N = self.packed, self.clock.lap, len(ready.rows)
        lengths, drop = lengths_of(N, self.comm.size), self._dropout()
        drop = None if drop is None else PartDropout(drop, N, self._own(N))
        sent: list[Pending] = []

        def update(name: str, part: slice, gradient: Tensor, copy: Tensor | None) -> None:
            lap("head backward")
            self.optimizer.update(name, part, gradient, copy)
            lap("update")

        def send(grad_RND: Tensor) -> None:
            lap("head backward")
            sent.append(self.comm.reduce_scatter(grad_RND.transpose(0, 1), lengths))
            lap("communication")

        with torch.no_grad():
            own_hidden, kept = packed.mlp.learn(packed.input.forward(ready.own), drop, packed.products)
            narrow = own_hidden if packed.bottleneck is None else packed.bottleneck(own_hidden)
            lap("forward")
            hidden = self._gather(narrow.transpose(0, 1), lengths).transpose(0, 1)
            _, loss = packed.step_head(
                hidden.contiguous(), ready.positives, lambda: self.optimizer.begin_head(update), want_loss=want_loss,
                join_log_total=self._join_log_total, tell_gradient=send, lap=lap,
            )  # fmt: skip
            lap("head backward")
            grad = sent[0].wait().transpose(0, 1).contiguous()
            lap("communication")
            dense: list[tuple[str, slice, Tensor]] = []

            def note(name: str, part: slice, gradient: Tensor, _: Tensor | None) -> None:
                dense.append((name, part, gradient))

            grad = grad if packed.bottleneck is None else packed.bottleneck.backward(own_hidden, grad, note)
            grad_z = packed.mlp.backward(kept, grad, drop, note)
            lap("backward")
            total = self._all_reduce([gradient for _, _, gradient in dense] + ([] if loss is None else [loss]))
            grad_z = self._gather(grad_z, lengths)
            reduced = total()
            lap("communication")
            for (name, part, _), gradient in zip(dense, reduced, strict=False):
                self.optimizer.update(name, part, gradient)
            lap("update")
            self.optimizer.update_input(packed.input, ready.batch, grad_z)
            lap("rows")
        return None if loss is None else reduced[-1]

    def _gather(self, part: Tensor, lengths: list[int]) -> Tensor:
        whole = self.comm.all_gather(part, lengths).wait()
        self.clock.lap("communication")
        return whole

    def _join_log_total(self, log_total_RN: Tensor) -> Tensor:
        """Give the log-sum-exp over the outputs of all ranks, (R, N), from that of each.

        One gathering of N numbers a rank; a maximum and a sum over all would be two journeys.
        """
        self.clock.lap("head forward")
        each = self._gather(log_total_RN.unsqueeze(0), [1] * self.comm.size)
        return torch.logsumexp(each, 0)

    def _all_reduce(self, values: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to add up some tensors over the ranks, in one message, in the type of the parameters; give what waits for it."""
        pending = self.comm.all_reduce(torch.cat([value.reshape(-1).to(self.dtype) for value in values]))

        def wait() -> list[Tensor]:
            parts = torch.split(pending.wait(), [value.numel() for value in values])
            return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]

        return wait

    def _validate(self, on_better: Callable[[int], None]) -> dict[str, float]:
        """Measure P@k, from each rank's best labels among its own: no outputs are sent."""
        assert self.held_out is not None
        features, labels = self.held_out
        k = min(max(VALIDATION_KS), self.sizes.n_labels)
        found = []
        for start in range(0, len(labels), self.config.batch_size):
            rows = np.arange(start, min(start + self.config.batch_size, len(labels)))
            found.append(self._topk(take(features, rows), k).labels)
        labels_Nk = np.concatenate(found)
        measured = {f"P@{n}": precision_at_k(labels_Nk, labels, n) for n in VALIDATION_KS if n <= k}
        self._judge(np.array([measured["P@1"]]), on_better)
        return measured

    def _topk(self, features: CSR | np.ndarray, k: int) -> TopK:
        """Give the k best labels of some samples, the same on every rank: each sends its own k best."""
        assert self.outputs is not None
        best = self.packed.full_topk(self._batch(features), min(k, len(self.outputs)), estimator=DEFAULT_ESTIMATOR)
        own = padded(TopK(best.labels + self.outputs.start, best.scores), k)
        places = [1] * self.comm.size
        arrays = [torch.from_numpy(x).to(self.device).unsqueeze(0) for x in (own.labels, own.scores)]
        labels, scores = (self.comm.all_gather(x, places).wait().cpu().numpy() for x in arrays)
        return merge_topk([TopK(*part) for part in zip(labels, scores, strict=True)], k)
