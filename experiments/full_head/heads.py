"""Heads of random weights, their positives and the update of a step, as the scripts of this folder use them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mach.config import HeadOptimizer
from mach.heads import LinearHead, Positives, Rule, Update
from mach.heads.rounding import narrow
from mach.train.optim import Optimizer

STORAGES = ["float32", "bfloat16", "float8"]
DRAWN = 1 << 24  # weights drawn at a time
PRIOR = -12.0  # bias of an output that is seldom positive


def weights(n_labels: int, hidden: int, storage: str) -> dict[str, Tensor]:
    """Draw a head's parameters, so that what they are stored in is never held beside what they are drawn in."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
    weight, generator = torch.empty(1, n_labels, hidden, dtype=kinds[storage]), torch.Generator().manual_seed(0)
    flat = weight.view(-1)
    for start in range(0, len(flat), DRAWN):
        part = torch.randn(min(DRAWN, len(flat) - start), generator=generator).div_(hidden**0.5)
        flat[start : start + len(part)] = part if storage == "float32" else narrow(part, storage)
    return {"head.weight": weight, "head.bias": torch.full((1, n_labels), PRIOR)}


def positives(n_samples: int, n_labels: int, a_sample: int = 5) -> Positives:
    """Draw some different labels for each sample."""
    rng = np.random.default_rng(0)
    labels = np.sort(np.stack([rng.choice(n_labels, a_sample, replace=False) for _ in range(n_samples)]), 1)
    indptr = np.arange(0, a_sample * n_samples + 1, a_sample)
    return Positives.of([(indptr, labels.ravel().astype(np.int32))], torch.device("cpu"))


def updating(parameters: dict[str, Tensor], kind: HeadOptimizer, rate: float) -> Callable[[], Update]:
    """Give what begins a step of the head by a rule."""
    rule = Rule(kind=kind, rate=rate, weight_decay=0.0, step=0, seed=0, repetitions=(0,))
    optimizer = Optimizer(parameters, weight_decay=0.0, row_wise="input.weight", head=rule)
    n_steps = [0]

    def begin() -> Update:
        optimizer.begin_step(rate=rate, row_rate=0.0, head_rate=rate, head_steps=n_steps[0])
        n_steps[0] += 1
        return optimizer.begin_head(optimizer.update)

    return begin


def stepping(
    parameters: dict[str, Tensor], hidden_RND: Tensor, of: Positives, kind: HeadOptimizer, rate: float = 1e-3, *,
    in_float8: bool = False,
) -> Callable[[], Tensor]:  # fmt: skip
    """Give a call that takes one step of the head on a batch, telling no loss; gives the gradient of the hidden vectors."""
    head = LinearHead(parameters["head.weight"], parameters["head.bias"], in_float8=in_float8)
    begin = updating(parameters, kind, rate)
    return lambda: head.step(hidden_RND, of, loss="logistic", update=begin(), want_loss=False)[0]
