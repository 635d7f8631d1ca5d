"""How a head changes in one of its steps: the update rule with its numbers, as a step's `update` carries it.

Whoever holds weight, gradient and rule can take the step: `mach.train` does, chunk by chunk; a kernel may fuse it with products.
With g the gradient of a batch's mean loss, summed over outputs:

    every rule       w <- (1 - rate * weight_decay) w - change, then rounded to its storage
    sgd              change = rate g
    rowwise-adagrad  s <- s + mean_d g^2                change = rate g / (sqrt(s) + EPSILON)
    rowwise-adam     s <- b2 s + (1 - b2) mean_d g^2    change = rate g / (sqrt(s / (1 - b2^step)) + EPSILON)
    adamw            two moments a weight               change = rate m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + EPSILON)

s is one number an output, of float32; an output's bias is a row of width 1 with its own.
Sources: Duchi et al. 2011, JMLR 12 (Adagrad); Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mach.config import HeadOptimizer
from mach.heads.rounding import key_of

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one step does to the head of packed repetitions."""

    kind: HeadOptimizer
    rate: float  # step size
    weight_decay: float  # decoupled
    step: int  # of the head, from 1
    seed: int  # of the rounding, in [0, 2**63)
    repetitions: tuple[int, ...]  # their numbers
    first: int = 0  # number, in the whole head, of the first output held here

    @property
    def keys(self) -> list[int]:
        """Give the key of this step's rounding for each repetition."""
        return [key_of(self.seed, self.step, r) for r in self.repetitions]


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a rule keeps of the steps before, on the weight's device, updated in place."""

    first: Tensor | None = None  # adamw: (R, B, D), float32
    second: Tensor | None = None  # adamw: (R, B, D); row-wise: (R, B), float32
    lost: Tensor | None = None  # bfloat16 (R, M, D), what rounding to the nearest left of M compensated rows
    slots: Tensor | None = None  # int32 (R, B), place of a row in `lost`, -1 for one that is rounded stochastically


@dataclass(frozen=True, slots=True)
class Ruled:
    """A function that updates, and the rule by which it updates the head, with the state of the head's weights."""

    change: Callable[[str, slice, Tensor, Tensor | None], None]
    rule: Rule
    state: State | None = None

    def __call__(self, name: str, part: slice, gradient: Tensor, copy: Tensor | None = None) -> None:
        """Update `parameter[:, part]` in place, and renew `copy[:, part]`, its copy for the products."""
        self.change(name, part, gradient, copy)


def rule_of(update: object) -> Rule | None:
    """Give the rule that an update carries, or None if only the update itself knows what it does."""
    return update.rule if isinstance(update, Ruled) else None
