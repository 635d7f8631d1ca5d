"""How much memory training takes: of this process on the CPU, of torch's allocator on a GPU."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def used_bytes(device: torch.device) -> int:
    """Give the memory in use now; on a CPU whose system does not tell, the peak."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Give the most memory used so far: by this process on the CPU, by torch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    high_water = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    if high_water:  # getrusage would give the parent's peak where that was higher
        return int(high_water[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
