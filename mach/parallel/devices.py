"""Which devices a name stands for."""

from __future__ import annotations

import torch

from mach.model import resolve_device


def devices_of(name: str) -> list[str]:
    """Give the devices that a name stands for: every GPU for `auto`, where there are any."""
    n_gpus = torch.cuda.device_count()
    return [f"cuda:{i}" for i in range(n_gpus)] if name == "auto" and n_gpus else [str(resolve_device(name))]
