"""Batches made ready in a background thread while the step before trains.

Reading, transposing, hashing labels and copying to the device free the interpreter's lock, so they run beside the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 2  # batches ready or being made, so that a slow one does not stop the device

_Item = TypeVar("_Item")
_Ready = TypeVar("_Ready")


def ahead(make: Callable[[_Item], _Ready], items: Iterable[_Item]) -> Generator[_Ready, None, None]:
    """Give make(item) for each item in turn, one thread working `AHEAD` of the caller.

    An error in `make` is raised here in its item's turn. The thread ends with the iterator, closed or run out.
    """
    pending: deque[Future[_Ready]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="mach-feed")
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
