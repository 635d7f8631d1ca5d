"""Batches made ready in background threads while the step before trains.

Reading, transposing, hashing labels and copying to the device free the interpreter's lock, so they run beside the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 1  # batches ready or being made beside one a thread, so that a slow one does not stop the device
THREADS = {"cpu": 1, "cuda": 4}  # by the device that trains: a GPU takes a batch in the time in which a thread makes it

_Item = TypeVar("_Item")
_Ready = TypeVar("_Ready")


def ahead(make: Callable[[_Item], _Ready], items: Iterable[_Item], n_threads: int = 1) -> Generator[_Ready, None, None]:
    """Give make(item) for each item in turn, threads working ahead of the caller by one item each and `AHEAD`.

    An error in `make` is raised here in its item's turn. The threads end with the iterator, closed or run out.
    """
    pending: deque[Future[_Ready]] = deque()
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="mach-feed")
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > n_threads + AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
