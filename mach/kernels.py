"""How a kernel is compiled: the interpreter's lock is free while it runs, and its code is kept on disk between runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(function: _Function) -> _Function:
    """Compile a kernel; its types stay visible to checkers."""
    return cast(_Function, numba.njit(nogil=True, cache=True)(function))


def jit_ieee(function: _Function) -> _Function:
    """Compile a kernel in which a division by zero gives infinity or NaN instead of an error, so that its loops vectorise."""
    return cast(_Function, numba.njit(nogil=True, cache=True, error_model="numpy")(function))
