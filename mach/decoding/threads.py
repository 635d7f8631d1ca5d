"""Kernels without the interpreter's lock, run by plain threads.

Not numba's own `prange`: its default layer ends the process when two threads call it at once, which a server does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numba.core import config

N_THREADS = int(config.NUMBA_NUM_THREADS)  # the cores this process may use; the environment variable of that name lowers it


def in_threads(kernel: Callable[..., None], tasks: Sequence[tuple[Any, ...]], n_threads: int) -> None:
    """Call the kernel with each task's arguments, at most `n_threads` at a time; the first error is raised here."""
    if n_threads == 1 or len(tasks) == 1:
        for task in tasks:
            kernel(*task)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for future in [pool.submit(kernel, *task) for task in tasks]:
            future.result()
