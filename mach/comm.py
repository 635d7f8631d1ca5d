"""What processes that train one model together say to each other: the protocol, who has which part, and being alone.

`parallel/comm.py` holds those that reach other processes. Every process calls the same operations in the same order; nothing is
pickled on the way. P ranks are numbered 0..P-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

Operation = Literal["sum", "max"]


class Pending(Protocol):
    """An exchange under way: work that does not need its result may go on beside it."""

    def wait(self) -> Tensor:
        """Give the result, once it is there."""


class Comm(Protocol):
    """One rank's way to the others.

    Raises: RankLost, naming the rank, from any operation that another rank did not come to.
    """

    @property
    def rank(self) -> int:
        """Give this process's number."""

    @property
    def size(self) -> int:
        """Give how many there are, P."""

    def all_gather(self, part: Tensor, lengths: Sequence[int]) -> Pending:
        """Join every rank's part (n_p, ...) along the first axis, in the order of the ranks; lengths, each rank's n_p."""

    def reduce_scatter(self, whole: Tensor, lengths: Sequence[int]) -> Pending:
        """Add up every rank's tensor (sum of n_p, ...), in the order of the ranks, and give this rank its rows of the sum."""

    def all_reduce(self, value: Tensor, operation: Operation = "sum") -> Pending:
        """Add up every rank's tensor, or take the largest entries: the same bits on every rank."""

    def broadcast(self, value: Any) -> Any:
        """Give rank 0's value, small and such as JSON holds, to all; what others pass does not count."""

    def barrier(self) -> None:
        """Wait until every rank is here, however long one takes, as long as it lives."""

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""

    def close(self) -> None:
        """Leave the others; no operation follows."""


@dataclass(frozen=True, slots=True)
class Ready:
    """An exchange that is over."""

    value: Tensor

    def wait(self) -> Tensor:
        """Give the result."""
        return self.value


@dataclass(frozen=True, slots=True)
class Alone:
    """A process that trains by itself: every exchange gives back what it was given."""

    rank: int = 0
    size: int = 1

    def all_gather(self, part: Tensor, lengths: Sequence[int]) -> Pending:
        """Give the part, which is all."""
        return Ready(part)

    def reduce_scatter(self, whole: Tensor, lengths: Sequence[int]) -> Pending:
        """Give the tensor, which is the sum."""
        return Ready(whole)

    def all_reduce(self, value: Tensor, operation: Operation = "sum") -> Pending:
        """Give the tensor."""
        return Ready(value)

    def broadcast(self, value: Any) -> Any:
        """Give the value."""
        return value

    def barrier(self) -> None:
        """Wait for nobody."""

    def fail(self, error: BaseException) -> None:
        """Tell nobody."""

    def close(self) -> None:
        """Leave nobody."""


def part_of(n: int, rank: int, size: int) -> range:
    """Give the run of n things that is a rank's: runs follow each other, and their lengths differ by one at most."""
    return range(rank * n // size, (rank + 1) * n // size)


def lengths_of(n: int, size: int) -> list[int]:
    """Give how many of n things each rank has."""
    return [len(part_of(n, rank, size)) for rank in range(size)]
