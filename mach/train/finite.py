"""Watch that training stays finite, at the price of a few numbers a step; on a GPU a step late, so that nothing waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mach.config import AUTO, Config, Rates
from mach.errors import ModelError
from mach.heads.rounding import FLOAT8

ROWS_NAMED = 8
Wait = Callable[[], None]
cuda: Any = torch.cuda  # whose events have no types


@dataclass(frozen=True, slots=True)
class Place:
    """A step and its batch."""

    step: int  # from 1
    n_steps: int
    epoch: int  # from 1
    rows: np.ndarray  # samples of the train split

    def text(self) -> str:
        """Say it, with the first of the samples."""
        some = ", ".join(map(str, self.rows[:ROWS_NAMED].tolist())) + (", ..." if len(self.rows) > ROWS_NAMED else "")
        at = f"after step {self.step:,} of {self.n_steps:,} (epoch {self.epoch})"
        return f"{at}, whose batch holds the training samples {some} (counted from 0)"


class FiniteWatch:
    """Take a number for each repetition of a group a step; raise ModelError, naming the batch, when one is not finite."""

    def __init__(self, config: Config, rates: Rates, repetitions: Sequence[int]):
        self._config, self._rates, self._repetitions = config, rates, repetitions
        self._place: Place | None = None  # the last one noted
        self._arriving: tuple[Tensor, Wait] | None = None  # its numbers

    def note(self, values_R: Tensor, place: Place) -> None:
        """Judge a step's numbers: at once on the CPU; on a GPU when the next step is noted, or at `settle`."""
        self.settle()
        self._place = place
        self._arriving = _send(values_R)
        if values_R.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Judge what was noted last, if it is not judged yet."""
        if self._arriving is not None:
            (here, wait), self._arriving = self._arriving, None
            wait()
            self._judge(here)

    def refuse(self, repetitions: Sequence[int], what: str) -> NoReturn:
        """Raise the error that says what is no longer finite in which repetitions, since which batch, and what to try."""
        config = self._config.to_dict()
        who = f"repetition{'' if len(repetitions) == 1 else 's'} {', '.join(map(str, repetitions))}"
        where = "before the first step" if self._place is None else self._place.text()
        tries = [f"smaller steps than learning_rate={self._rates.dense:g}, input_learning_rate={self._rates.rows:g}"]
        if config["head_learning_rate"] != AUTO:
            tries[0] += f", head_learning_rate={self._rates.head:g}"
        tries += [] if config["normalize"] else ["normalize=true"]
        tries += [] if config.get("precision", "float32") == "float32" else ["precision=float32"]
        raise ModelError(
            f"{who}: {what} is not finite {where}; what was saved before is kept; look at these samples, or try "
            f"{' or '.join(tries)}, in another --out"
        )

    def _judge(self, values_R: Tensor) -> None:
        if not bool(torch.isfinite(values_R).all()):
            bad = [r for r, value in zip(self._repetitions, values_R.isfinite().tolist(), strict=True) if not value]
            self.refuse(bad, "the loss or a gradient")


def _send(values: Tensor) -> tuple[Tensor, Wait]:
    """Send numbers to the host; give where they will be, and what waits until they are."""
    if values.device.type == "cpu":
        return values, lambda: None
    here = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    event = cuda.Event()
    event.record(cuda.current_stream(values.device))
    return here, event.synchronize


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all of a tensor is finite, in one pass without a tensor of its size."""
    if not tensor.numel():
        return True
    if tensor.dtype == FLOAT8:  # which has no infinity, and one NaN of each sign: the largest of signed and of unsigned bytes
        return int(tensor.view(torch.int8).max()) < 0x7F and int(tensor.view(torch.uint8).max()) < 0xFF
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))
