"""Checkpoints of a group of repetitions under way: weights, optimiser and progress in one safetensors file, whole or absent.

Data order and dropout are functions of (seed, epoch) and (seed, repetition, step), so the step is all the random state there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from mach.errors import ModelError
from mach.files import atomic
from mach.store.folder import format_repetitions

FOLDER = "checkpoints"


def checkpoint_path(run: Path, repetitions: Sequence[int]) -> Path:
    """Give where the checkpoint of a group lies."""
    return run / FOLDER / f"group-{format_repetitions(repetitions)}.safetensors"


def best_path(run: Path, repetition: int) -> Path:
    """Give where a repetition's best weights so far lie, while it trains with early stopping."""
    return run / FOLDER / f"best-{repetition:03d}.safetensors"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: the one before it stays whole until this one is.

    Raises: ModelError if the disk refuses.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"progress": json.dumps(progress)})
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"{path}: the checkpoint cannot be written ({error}); free some space and go on with --resume"
        ) from error


def read_progress(path: Path) -> dict[str, Any]:
    """Read how far a checkpoint has come, without its tensors.

    Raises: ModelError if the file is broken.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            progress: dict[str, Any] = json.loads((file.metadata() or {})["progress"])
            return progress
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ModelError(f"{path}: the checkpoint is broken ({error}); delete it to start this group again") from error


def read_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into those of a group of the same shapes, one at a time.

    Raises: ModelError if names or shapes differ.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        if shapes != {name: list(target.shape) for name, target in into.items()}:
            raise ModelError(f"{path}: the checkpoint is of another model; delete it to start this group again")
        for name, target in into.items():
            target.copy_(file.get_tensor(name))
