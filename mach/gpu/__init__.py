"""What work on a GPU needs: Triton, which is an extra, and memory that reaches it without a halt."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    """Tell whether Triton is installed."""
    return find_spec("triton") is not None


def takes_kernels(device: torch.device) -> bool:
    """Tell whether kernels of Triton run on a device; elsewhere torch's operations do the same."""
    return device.type == "cuda" and has_triton()


def launching_on(tensor: Tensor) -> AbstractContextManager[None]:
    """Launch kernels on the GPU of a tensor, which need not be the current one; nothing for tensors elsewhere."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]  # torch has none


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Move an array to a device; to a GPU by way of pinned memory, so that neither it nor the caller waits for the other."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
