"""How a kernel is compiled and run: kept on disk between runs, and without the interpreter's lock, so that plain threads run it.

Not numba's own `prange`: its default layer ends the process when two threads call it at once, which a server does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numba.extending
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

N_THREADS = int(numba.config.NUMBA_NUM_THREADS)  # the cores this process may use; the environment variable of that name lowers it

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(function: _Function) -> _Function:
    """Compile a kernel; its types stay visible to checkers."""
    return cast(_Function, numba.njit(nogil=True, cache=True)(function))


def jit_ieee(function: _Function) -> _Function:
    """Compile a kernel in which a division by zero gives infinity or NaN instead of an error, so that its loops vectorise."""
    return cast(_Function, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def jit_sums(function: _Function) -> _Function:
    """Compile a kernel whose sums may be taken in another order and fused, so that they vectorise: the same order every time."""
    return cast(_Function, numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})(function))


def array_of(tensor: Any) -> Any:
    """Give a tensor of the CPU as a numpy array on the same memory; bfloat16 and float8, which numpy lacks, as their bits."""
    import torch  # here, since most kernels need none of it

    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _typed_lowest(typing_context: Any, bits: Any) -> Any:
    """Give the place of the lowest bit that is set; there must be one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


lowest_bit = intrinsic(_typed_lowest)


@jit
def mix(x: np.uint64) -> np.uint64:
    """Let every bit depend on every bit (Steele et al. 2014, OOPSLA: the finaliser of splitmix)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@jit
def float_of(bits: np.uint16) -> np.float32:
    """Give the number that the bits of a bfloat16 stand for: the upper half of a float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@jit
def bits_of(x: np.float32) -> np.uint16:
    """Round to the nearest bfloat16, ties to even; a NaN stays one."""
    if x != x:
        return np.uint16(0x7FC0)
    bits = np.float32(x).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def read(x: Any) -> Any:
    """Within a kernel: give a number of an array of floats as it is, and one of an array of bfloat16 bits as float32."""
    return x if np.issubdtype(type(x), np.floating) else float_of(x)


def write(array: Any, i: int, x: Any) -> None:
    """Within a kernel: set array[i], of floats or of bfloat16 bits, to a number."""
    array[i] = x if np.issubdtype(array.dtype, np.floating) else bits_of(x)


@numba.extending.overload(read)  # type: ignore[untyped-decorator]  # numba has no types
def _read(x: Any) -> Any:
    def bits(x: Any) -> Any:  # annotated as its overload is: numba compares them
        return float_of(x)

    def plain(x: Any) -> Any:
        return x

    return bits if isinstance(x, types.Integer) else plain


@numba.extending.overload(write)  # type: ignore[untyped-decorator]  # numba has no types
def _write(array: Any, i: Any, x: Any) -> Any:
    def bits(array: Any, i: Any, x: Any) -> Any:
        array[i] = bits_of(np.float32(x))

    def plain(array: Any, i: Any, x: Any) -> Any:
        array[i] = x

    return bits if isinstance(array.dtype, types.Integer) else plain


def in_threads(kernel: Callable[..., None], tasks: Sequence[tuple[Any, ...]], n_threads: int) -> None:
    """Call the kernel with each task's arguments, at most `n_threads` at a time; the first error is raised here."""
    if n_threads == 1 or len(tasks) <= 1:
        for task in tasks:
            kernel(*task)
        return
    for future in [_pool(n_threads).submit(kernel, *task) for task in tasks]:
        future.result()


def over_rows(kernel: Callable[..., None], arguments: Sequence[Any], n_rows: int, *, a_task: int) -> None:
    """Call the kernel with the arguments and the bounds of a run of rows, for all runs of so many, in threads."""
    in_threads(kernel, [(*arguments, low, min(low + a_task, n_rows)) for low in range(0, n_rows, a_task)], N_THREADS)


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Keep threads for the next call: starting them takes as long as a small kernel."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="mach")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of the threads
