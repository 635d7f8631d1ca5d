"""The training loop of one group of packed repetitions: arithmetic only. It yields a record a step; the caller logs and saves.

Axes: N samples, R repetitions of the group, B buckets, D hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mach.config import Config
from mach.data import CSR, Dataset, take, take_rows
from mach.decoding import decode_topk
from mach.encoders import Dropout, make_batch
from mach.errors import DataError
from mach.hashing import LabelTable
from mach.heads import Positives, Rule
from mach.metrics import precision_at_k
from mach.model import (
    DEFAULT_ESTIMATOR,
    INPUT,
    Batch,
    Packed,
    Sizes,
    feature_buckets,
    initial_parameters,
    resolve_precision,
    resolve_rows,
)
from mach.train.clock import clock_for
from mach.train.feed import THREADS, ahead
from mach.train.finite import FiniteWatch, Place, is_finite
from mach.train.frequent import slots_of
from mach.train.memory import peak_bytes
from mach.train.optim import Optimizer, RowRounding
from mach.train.schedule import order_of, rate_at, seed_of

LOSS_EVERY = 20  # steps
VALIDATION_SAMPLES = 2000
HELD_OUT = -1  # the epoch whose order says which samples are held out: the first ones
VALIDATION_KS = (1, 3, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What one step did."""

    step: int  # from 1
    n_steps: int
    epoch: int  # from 1
    samples_per_s: float  # since the step before; each sample trains every repetition of the group
    rate: float  # step size of the dense parameters
    loss: float | None = None  # nats a sample, mean over the group's repetitions; every LOSS_EVERY steps
    peak_bytes: int | None = None  # of the process (CPU) or the device's allocator; with the loss
    validation: dict[str, float] | None = None  # P@k of the group decoded together; at the end of an epoch


@dataclass(frozen=True, slots=True)
class Ready:
    """One batch on the device."""

    rows: np.ndarray  # of the train split
    batch: Batch
    positives: Positives


@dataclass(slots=True)
class Standing:
    """How a repetition does on validation data, for early stopping."""

    best: float = -1.0  # share of validation samples whose best bucket is a true one
    epochs_since: int = 0
    stopped: bool = False


class Group:
    """Repetitions trained together: one batch read, one gather and one batched product for all of them.

    What a repetition becomes does not depend on its companions beyond rounding: weights, hash and dropout come from
    (seed, repetition), the order of the data from the seed alone.
    """

    outputs: range | None = None  # of the head that are held here; None: all

    def __init__(
        self, config: Config, dataset: Dataset, sizes: Sizes, table: LabelTable, device: torch.device,
        dtype: torch.dtype = torch.float32, products: torch.dtype | None = None,
    ):  # fmt: skip
        self.products = products or (resolve_precision(config.precision, device) if dtype == torch.float32 else dtype)
        self.config, self.sizes, self.table, self.device, self.dtype = config, sizes, table, device, dtype
        self.repetitions = table.repetitions
        self.feature_buckets = feature_buckets(config, sizes, self.repetitions)
        self.train = dataset.split("train")
        self.n_samples, self.n_held, self.held_out = _held_out(config, dataset)
        self.n_epochs = config.n_epochs(self.n_samples, sizes.n_buckets, sizes.labels_a_sample)
        self.n_steps = self.n_epochs * self.steps_per_epoch
        self.rates = config.rates(self.n_samples, sizes.n_labels, sizes.n_buckets, sizes.labels_a_sample)
        self.step = 0
        self.standings = [Standing() for _ in self.repetitions]
        self.packed = self._initial()
        self.optimizer = self._optimizer()
        self._began = time.perf_counter()
        self.clock = clock_for(device)
        self.finite = FiniteWatch(config, self.rates, self.repetitions)

    @property
    def steps_per_epoch(self) -> int:
        """Give the number of batches that visit every sample once."""
        return -(-self.n_samples // self.config.batch_size)

    @property
    def head_steps(self) -> int:
        """Give the number of steps that the head has taken: several a batch where its own batches are smaller."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        size = self.config.head_batch_size or self.config.batch_size
        whole = -(-self.config.batch_size // size)
        last = self.n_samples - (self.steps_per_epoch - 1) * self.config.batch_size
        return epoch * ((self.steps_per_epoch - 1) * whole + -(-last // size)) + place * whole

    @property
    def done(self) -> bool:
        """Tell whether nothing is left to train."""
        return self.step >= self.n_steps or all(s.stopped for s in self.standings)

    def tensors(self) -> dict[str, Tensor]:
        """Give every tensor that a checkpoint must hold, as the tensors themselves."""
        return {**self.packed.parameters, **{f"optimizer.{k}": v for k, v in self.optimizer.state.items()}}

    def steps(self, on_better: Callable[[int], None]) -> Generator[StepRecord, None, None]:
        """Train until done, yielding a record a step. `on_better(r)` marks a best epoch of the r-th packed repetition."""
        batches = ahead(self._prepare, self._rows_to_come(), THREADS[self.device.type])
        self.clock.start()
        try:
            while not self.done:
                ready = next(batches)
                self.clock.lap("data")
                yield self._record(ready, on_better)
                self.clock.lap("log")
        finally:
            batches.close()

    def _signs(self, loss: Tensor | None) -> Tensor:
        """Give a number for each repetition (R,) that is finite as long as the step's loss and gradients are.

        The gradient of the hidden vectors of every sample flows into the input layer's bias, D numbers, and stays there if it is
        not finite.
        """
        total = self.packed.parameters["input.bias"].detach().sum(1, dtype=torch.float64)
        return total if loss is None else total + loss

    def refuse_what_is_not_finite(self) -> None:
        """Raise ModelError unless everything that a checkpoint must hold is finite. One pass over its memory."""
        self.finite.settle()
        bad = [name for name, value in self.tensors().items() if not is_finite(value)]
        if bad:
            self.finite.refuse(self.repetitions, ", ".join(bad))

    def _rows_to_come(self) -> Iterator[np.ndarray]:
        """Give the rows of each batch still to come: a function of the seed and the step."""
        size, (epoch, place) = self.config.batch_size, divmod(self.step, self.steps_per_epoch)
        for e in range(epoch, self.n_epochs):
            for i in range(place if e == epoch else 0, self.steps_per_epoch):
                yield self.rows_at(e, np.arange(i * size, min((i + 1) * size, self.n_samples)))

    def rows_at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Give the rows of the train split that an epoch visits at some places; those held out for validation never come."""
        rows = order_of(self.n_samples, self.config.seed, epoch, places)
        if self.n_held:
            rows = order_of(self.n_samples + self.n_held, self.config.seed, HELD_OUT, self.n_held + rows)
        return rows

    def _prepare(self, rows: np.ndarray) -> Ready:
        """Read the samples `rows` and bring them to the device."""
        features, labels = take(self.train.features, rows), take_rows(self.train.labels, rows)
        buckets = [self.table.positives(labels.indptr, labels.indices, r) for r in range(len(self.repetitions))]
        return Ready(rows, self._batch(features), Positives.of(buckets, self.device))

    def _record(self, ready: Ready, on_better: Callable[[int], None]) -> StepRecord:
        """Take one step, validate at the end of an epoch, and say what happened."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        want_loss = self.step % LOSS_EVERY == 0 or self.step + 1 == self.n_steps
        loss = self._step(ready, want_loss)
        self.finite.note(self._signs(loss), Place(self.step, self.n_steps, epoch + 1, ready.rows))
        ends_epoch = place + 1 == self.steps_per_epoch
        if ends_epoch:
            self.refuse_what_is_not_finite()
        self.clock.lap("watch")
        validation = self._validate(on_better) if ends_epoch and self.held_out is not None else None
        if validation is not None:
            self.clock.lap("validation")
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        return StepRecord(
            step=self.step,
            n_steps=self.n_steps,
            epoch=epoch + 1,
            samples_per_s=len(ready.rows) / max(seconds, 1e-9),
            rate=self.optimizer.rate,
            loss=None if loss is None else float(loss.mean()),
            peak_bytes=peak_bytes(self.device) if want_loss else None,
            validation=validation,
        )

    def _step(self, ready: Ready, want_loss: bool) -> Tensor | None:
        """Train on one batch."""
        share = rate_at(self.step, self.n_steps, self.config.warmup)
        self.optimizer.begin_step(
            rate=share * self.rates.dense,
            row_rate=share * self.rates.rows,
            head_rate=share * self.rates.head,
            head_steps=self.head_steps,
        )
        loss = self._learn(ready, want_loss)
        self.step += 1
        return loss

    def _learn(self, ready: Ready, want_loss: bool) -> Tensor | None:
        """Take the step that the optimiser has begun."""
        return self.packed.step(
            ready.batch,
            ready.positives,
            update=self.optimizer.update,
            begin_head=self.optimizer.begin_head,
            update_input=self.optimizer.update_input,
            drop=self._dropout(),
            want_loss=want_loss,
            lap=self.clock.lap,
        )

    def _batch(self, features: CSR | np.ndarray) -> Batch:
        return make_batch(
            features, normalize=self.config.normalize, device=self.device, dtype=self.dtype, buckets_RF=self.feature_buckets
        )

    def _dropout(self) -> Dropout | None:
        """Give the dropout of this step, each repetition with its own generator of (seed, repetition, step)."""
        share = self.config.share_dropped(self.n_samples)
        if not share:
            return None
        generators = []
        for r in self.repetitions:
            generator = torch.Generator(self.device)
            generators.append(generator.manual_seed(seed_of(self.config.seed, "dropout", r, self.step)))
        return Dropout(share, generators)

    def _optimizer(self) -> Optimizer:
        """Make the optimiser, with the head's rule and the buckets whose rounding is compensated."""
        config, sizes, slots = self.config, self.sizes, None
        if n := round(config.compensated * sizes.n_buckets):
            slots = slots_of(self.train.labels, self.table, sizes.n_buckets, n).to(self.device)
        rule = Rule(
            kind=config.head_rule(sizes.n_labels, sizes.n_buckets, sizes.labels_a_sample), rate=0.0, step=0,
            weight_decay=config.head_decay(), seed=seed_of(config.seed, "rounding"),
            repetitions=tuple(self.repetitions), first=self.outputs.start if self.outputs else 0,
        )  # fmt: skip
        return Optimizer(
            self.packed.parameters, weight_decay=config.weight_decay, row_wise=INPUT, head=rule, slots_RB=slots,
            rounding=RowRounding(seed_of(config.seed, "rows"), tuple(self.repetitions)),
        )  # fmt: skip

    def _initial(self) -> Packed:
        """Draw the initial weights, each repetition with its own generator."""
        rows = resolve_rows(self.config, self.sizes.features, self.products)

        def each() -> Iterator[dict[str, Tensor]]:
            for r in self.repetitions:
                generator = torch.Generator().manual_seed(seed_of(self.config.seed, "weights", r))
                yield initial_parameters(self.config, self.sizes, generator, self.dtype, rows, self.outputs)

        n = len(self.repetitions)
        return Packed.join(
            each(), n, config=self.config, features=self.sizes.features, device=self.device, products=self.products
        )

    def _validate(self, on_better: Callable[[int], None]) -> dict[str, float]:
        """Measure P@k of the group decoded together, and note each repetition's own standing."""
        assert self.held_out is not None
        features, labels = self.held_out
        found, right = [], np.zeros(len(self.repetitions))
        k = min(max(VALIDATION_KS), self.sizes.n_labels)
        for start in range(0, len(labels), self.config.batch_size):
            rows = np.arange(start, min(start + self.config.batch_size, len(labels)))
            batch, truth = self._batch(take(features, rows)), take_rows(labels, rows)
            if self.table.is_identity:
                found.append(self.packed.full_topk(batch, k, estimator=DEFAULT_ESTIMATOR).labels)
                right[0] += precision_at_k(found[-1][:, :1], truth, 1) * len(rows)
                continue
            outputs = self.packed.logits(batch).float().cpu().numpy()
            for r in range(len(self.repetitions)):
                indptr, buckets = self.table.positives(truth.indptr, truth.indices, r)
                true = CSR(indptr, buckets.astype(np.int32), None, self.sizes.n_buckets)
                right[r] += precision_at_k(outputs[:, r].argmax(1)[:, None].astype(np.int64), true, 1) * len(rows)
            found.append(decode_topk(outputs, self.table, k, loss=self.config.loss, estimator=DEFAULT_ESTIMATOR).labels)
        self._judge(right / len(labels), on_better)
        best_Nk = np.concatenate(found)
        return {f"P@{k}": precision_at_k(best_Nk, labels, k) for k in VALIDATION_KS if k <= best_Nk.shape[1]}

    def _judge(self, right_R: np.ndarray, on_better: Callable[[int], None]) -> None:
        """Update every repetition's standing from its share of right best buckets."""
        for r, (standing, right) in enumerate(zip(self.standings, right_R.tolist(), strict=True)):
            if standing.stopped:
                continue
            if right > standing.best:
                standing.best, standing.epochs_since = right, 0
                on_better(r)
            else:
                standing.epochs_since += 1
                standing.stopped = 0 < self.config.patience <= standing.epochs_since


def held_out_rows(config: Config, dataset: Dataset) -> np.ndarray:
    """Give all rows of the train split that a run of this config never trains on, rising; none if there is a dev split."""
    n_samples = dataset.split("train").n_samples
    return np.sort(order_of(n_samples, config.seed, HELD_OUT, np.arange(n_held_out(config, dataset))))


def n_held_out(config: Config, dataset: Dataset) -> int:
    """Give how many samples of the train split are held out: the first of the order of epoch HELD_OUT."""
    split = dataset.split("train")
    return (
        0 if _has_dev(dataset) else config.n_held_out(split.n_samples, "sparse" if isinstance(split.features, CSR) else "dense")
    )


def _has_dev(dataset: Dataset) -> bool:
    return "dev" in dataset.split_names and dataset.split("dev").n_samples > 0


def _held_out(config: Config, dataset: Dataset) -> tuple[int, int, tuple[Any, CSR] | None]:
    """Give how many training samples there are to visit, how many of the train split are held out, and validation samples.

    These are features and labels of the dev split, or of what is held out, or None; at most VALIDATION_SAMPLES.

    Raises: DataError if there is nothing to train on, or early stopping has nothing to go by.
    """
    split, n_held = dataset.split("train"), n_held_out(config, dataset)
    n_samples, n_validation = split.n_samples - n_held, n_held
    if _has_dev(dataset):
        split = dataset.split("dev")
        n_validation = split.n_samples
    held = np.sort(order_of(split.n_samples, config.seed, HELD_OUT, np.arange(min(n_validation, VALIDATION_SAMPLES))))
    if not n_samples:
        raise DataError(f"{dataset.path}: the train split has no samples to train on")
    if config.patience and not len(held):
        raise DataError(f"{dataset.path}: patience={config.patience} needs a dev split, or validation above 0")
    return n_samples, n_held, (take(split.features, held), take_rows(split.labels, held)) if len(held) else None
