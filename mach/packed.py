"""R repetitions side by side on one device: their weights, how these are first drawn, and a step that trains them.

A packed parameter has an axis R, so that one product does for all of them; see `Model` for what is made of the outputs.

Axes: N samples, F features, R repetitions, B buckets, D hidden width, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mach.config import Config, Estimator, Loss
from mach.decoding import TopK
from mach.decoding.full import CHUNK_BYTES, full_topk
from mach.encoders import MLP, Bottleneck, DenseBatch, Dropout, SparseBatch, input_for
from mach.errors import ConfigError
from mach.hashing import LabelTable
from mach.heads import LinearHead, Positives, Update
from mach.heads.rounding import narrow
from mach.heads.shard import normal_rows

INPUT = "input.weight"
INPUT_SCALE = 0.1  # standard deviation of the initial input weights
FEATURE_SEED = 1 << 40  # so that features are not hashed as labels are

Batch = SparseBatch | DenseBatch
Features = Literal["sparse", "dense"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the data decides about a model."""

    n_features: int  # F
    n_labels: int  # K
    n_buckets: int  # B
    hidden: int  # D
    features: Features
    labels_a_sample: float  # mean over the training samples


def feature_buckets(config: Config, sizes: Sizes, repetitions: Sequence[int]) -> np.ndarray | None:
    """Give the row of the input weight that each feature hashes to in each repetition, (R, F); None where each has its own.

    Source: Weinberger et al. 2009, arXiv:0902.2206 (hashed features); Medini et al. 2019 hash them anew in each repetition.

    Raises: ConfigError if there are more rows than features, or the features are dense.
    """
    if not config.feature_buckets:
        return None
    if sizes.features == "dense" or not 2 <= config.feature_buckets <= sizes.n_features:
        allowed = "0 for dense features" if sizes.features == "dense" else f"0, or lie in [2, {sizes.n_features}], the features"
        raise ConfigError(f"feature_buckets={config.feature_buckets} must be {allowed}")
    seed = config.seed ^ FEATURE_SEED
    table = LabelTable.hashed(sizes.n_features, config.feature_buckets, repetitions=tuple(repetitions), seed=seed)
    return table.array()


def initial_parameters(
    config: Config,
    sizes: Sizes,
    generator: torch.Generator,
    dtype: torch.dtype,
    rows: torch.dtype | None = None,
    outputs: range | None = None,
) -> dict[str, Tensor]:
    """Draw one repetition's weights, in a fixed order, from its own generator: normal, scaled by the fan-in.

    With `outputs`, a run of the B buckets, only those of the head are given: the same as without, in memory of their own size.

    The input weight is rounded to the type `rows`, if given, the head's to what it is stored in. Biases are zero but the
    head's, which start where an output that is positive as seldom as buckets are on average belongs: otherwise most of the
    training goes into learning that almost every bucket is negative.
    """
    F, B, D = config.feature_buckets or sizes.n_features, sizes.n_buckets, sizes.hidden

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(scale).to(dtype)

    def row(drawn: Tensor) -> Tensor:
        return drawn.mul_(INPUT_SCALE).to(rows or dtype)

    parameters = {INPUT: normal_rows((F, D), range(F), generator, row), "input.bias": torch.zeros(D, dtype=dtype)}
    for i in range(config.layers):
        parameters[f"layers.{i}.weight"] = normal(D, D, scale=0.5 / math.sqrt(D))
        parameters[f"layers.{i}.bias"] = torch.zeros(D, dtype=dtype)
    if narrow_to := config.n_bottleneck(sizes.n_labels, B, sizes.labels_a_sample, D):
        parameters["bottleneck.weight"] = normal(D, narrow_to, scale=1 / math.sqrt(D))
        D = narrow_to

    def stored(drawn: Tensor) -> Tensor:
        return narrow(drawn.mul_(1 / math.sqrt(D)).to(dtype), storage)

    is_wide = config.head_precision == "auto" and dtype == torch.float64
    storage = "float32" if is_wide else config.head_storage()  # which is the type of the model
    outputs = range(B) if outputs is None else outputs
    weight = normal_rows((B, D), outputs, generator, stored)
    bias = torch.full((len(outputs),), prior_output(config.loss, sizes.labels_a_sample / B), dtype=dtype)
    return {**parameters, "head.weight": weight, "head.bias": bias}


def prior_output(loss: Loss, share: float) -> float:
    """Give the output that minimises a loss where a bucket is positive for a share of the samples, whatever they hold.

    Source: Lin et al. 2017, arXiv:1708.02002, section 3.3 (for the logistic loss).
    """
    share = min(max(share, 1e-9), 0.5)
    if loss == "logistic":
        return math.log(share / (1 - share))
    return 2 * share - 1 if loss == "squared-hinge" else 0.0  # the softmax is not moved by a common bias


def packed_axis(name: str) -> int:
    """Give the axis of the repetitions in a packed parameter or its moments: rows of the input hold them side by side."""
    return 1 if name.startswith(INPUT) else 0


class Packed:
    """R repetitions on one device: their parameters with an axis R, as one set of layers."""

    def __init__(
        self, parameters: dict[str, Tensor], *, config: Config, features: Features, products: torch.dtype = torch.float32
    ):
        self.parameters, self.config, self.features, self.products = parameters, config, features, products
        self.input: Any = input_for(
            features, parameters[INPUT], is_hashed=config.feature_buckets > 0
        )  # takes the batches of its own kind, which checkers cannot know
        self.mlp = MLP(parameters)
        self.bottleneck = Bottleneck(parameters["bottleneck.weight"]) if "bottleneck.weight" in parameters else None
        chunk_bytes = config.head_memory << 20 or None
        self.head = LinearHead(
            parameters["head.weight"], parameters["head.bias"], chunk_bytes=chunk_bytes, in_float8=config.precision == "float8"
        )

    @classmethod
    def join(
        cls, each: Iterator[Mapping[str, Tensor]], n: int, *, config: Config, features: Features, device: torch.device,
        products: torch.dtype = torch.float32,
    ) -> Packed:  # fmt: skip
        """Pack n repetitions, one at a time, so that at most one is held twice; a lone one is taken as it is, without a copy."""
        packed: dict[str, Tensor] = {}
        for r, parameters in enumerate(each):
            for name, value in parameters.items():
                if n == 1:
                    packed[name] = value.unsqueeze(packed_axis(name)).to(device)
                    continue
                if name not in packed:
                    shape = list(value.shape)
                    shape.insert(packed_axis(name), n)
                    packed[name] = torch.empty(shape, dtype=value.dtype, device=device)
                packed[name].select(packed_axis(name), r).copy_(value)
        return cls(packed, config=config, features=features, products=products)

    @classmethod
    def single(cls, parameters: Mapping[str, Tensor], *, config: Config, features: Features) -> Packed:
        """Take one repetition as it is, without a copy: its weights may be views of a file."""
        return cls(
            {name: value.unsqueeze(packed_axis(name)) for name, value in parameters.items()}, config=config, features=features
        )

    def repetition(self, r: int) -> dict[str, Tensor]:
        """Give a copy of the parameters of the r-th packed repetition, on the CPU."""
        return {name: value.select(packed_axis(name), r).contiguous().cpu() for name, value in self.parameters.items()}

    def logits(self, batch: Batch, products: torch.dtype | None = None) -> Tensor:
        """Give the outputs of every head, shape (N, R, B), made and given in a type of their own if one is named."""
        with torch.no_grad():
            return self.head.logits(self._hidden(batch, products))

    def full_topk(
        self,
        batch: Batch,
        k: int,
        *,
        estimator: Estimator,
        restrict: npt.ArrayLike | None = None,
        exclude: Sequence[npt.ArrayLike] | None = None,
        first_sample: int = 0,
        products: torch.dtype | None = None,
        lap: Callable[[str], None] = lambda part: None,
    ) -> TopK:
        """Give the k best outputs of a single repetition, the full head, for each sample; the outputs are never held together.

        `products` as for `logits`; the rest: `Model.predict_topk`. `lap` is called after each chunk of outputs is made
        ("outputs") and before the next ("decode").
        """
        with torch.no_grad():
            hidden = self._hidden(batch, products)
            lap("outputs")
            (_, N, D), K, device = hidden.shape, self.head.weight.shape[1], hidden.device
            width = max(1, CHUNK_BYTES[device.type] // (4 * max(1, N, D)))
            room = hidden.new_empty(N * min(width, K))

            def outputs(labels: slice | np.ndarray) -> Tensor:
                lap("decode")
                part = labels if isinstance(labels, slice) else torch.from_numpy(labels).to(device)
                found = self.head.some_logits(hidden, part, room)[0].float()
                lap("outputs")
                return found

            top = full_topk(
                outputs, N, K, k, loss=self.config.loss, estimator=estimator, width=width, restrict=restrict, exclude=exclude,
                device=device, first_sample=first_sample,
            )  # fmt: skip
            lap("decode")
        return top

    def _hidden(self, batch: Batch, products: torch.dtype | None) -> Tensor:
        """Give the vectors that the head takes, (R, N, D)."""
        hidden = self.mlp.forward(self.input.forward(batch))
        hidden = hidden if self.bottleneck is None else self.bottleneck(hidden)
        return hidden if products is None else hidden.to(products)

    def step(
        self,
        batch: Batch,
        positives: Positives,
        *,
        update: Update,
        update_input: Callable[[Any, Batch, Tensor], None],
        drop: Dropout | None,
        want_loss: bool,
        begin_head: Callable[[Update], Update] = lambda update: update,
        lap: Callable[[str], None] = lambda part: None,
    ) -> Tensor | None:
        """Take one optimisation step; give the loss of each repetition (R,), in nats a sample, if wanted.

        The head updates itself chunk by chunk and hands back the gradient of the hidden vectors, from one part of the batch after
        another where its batches are smaller; the MLP carries it on and updates its own; what arrives at the input layer updates
        the rows that the batch touched.

        `begin_head(update)` is called before each step of the head; it gives the update for it, perhaps with its rule.

        `lap(part)` is called after each part of the work: forward, head forward (outputs and their gradients), head backward
        (what follows from these), update (of dense weights), backward, rows (of inputs).
        """

        def timed(name: str, part: slice, gradient: Tensor, copy: Tensor | None) -> None:
            lap("head backward" if name.startswith("head.") else "backward")
            update(name, part, gradient, copy)
            lap("update")

        with torch.no_grad():
            hidden, kept = self.mlp.learn(self.input.forward(batch), drop, self.products)
            lap("forward")
            narrow = hidden if self.bottleneck is None else self.bottleneck(hidden)
            grad, loss = self.step_head(narrow, positives, lambda: begin_head(timed), want_loss=want_loss, lap=lap)
            lap("head backward")
            grad = grad if self.bottleneck is None else self.bottleneck.backward(hidden, grad, timed)
            grad_z = self.mlp.backward(kept, grad, drop, timed)
            lap("backward")
            update_input(self.input, batch, grad_z)
            lap("rows")
        return loss

    def step_head(
        self, hidden_RND: Tensor, positives: Positives, begin: Callable[[], Update], *, want_loss: bool,
        tell_gradient: Callable[[Tensor], None] | None = None, **how: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Let the head step over the batch, or over parts of it in turn, each with the mean over its own samples.

        Give the gradient of the mean of all samples' losses, (R, N, D), and that mean if wanted. The rest: `LinearHead.step`.
        """
        N = hidden_RND.shape[1]
        how |= {"loss": self.config.loss, "want_loss": want_loss}
        size = self.config.head_batch_size or N
        if size >= N:
            return self.head.step(hidden_RND, positives, update=begin(), tell_gradient=tell_gradient, **how)
        grads, losses = [], []
        for start in range(0, N, size):
            rows = slice(start, min(start + size, N))
            share, part = (rows.stop - start) / N, hidden_RND[:, rows].contiguous()
            grad, loss = self.head.step(part, positives.of_samples(rows), update=begin(), **how)
            grads.append(grad.mul_(share))
            losses += [] if loss is None else [loss * share]
        grad = torch.cat(grads, 1)
        if tell_gradient is not None:
            tell_gradient(grad)
        return grad, torch.stack(losses).sum(0) if want_loss else None
