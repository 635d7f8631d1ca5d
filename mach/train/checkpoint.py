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
from mach.model import packed_axis
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


def split_checkpoint(run: Path, repetitions: Sequence[int], parts: Sequence[Sequence[int]]) -> None:
    """Replace a group's checkpoint by one for each part of the group, which go on where it stands.

    The parts are whole before the old one goes; killed between, `leftover_checkpoints` tells which count.
    """
    path = checkpoint_path(run, repetitions)
    progress = read_progress(path)
    with safetensors.safe_open(path, framework="pt") as file:
        for part in parts:
            places = [list(repetitions).index(r) for r in part]
            assert places == list(range(places[0], places[-1] + 1)), "parts are runs of the group"
            cut = slice(places[0], places[-1] + 1)
            tensors = {}
            for name in file.keys():
                whole = file.get_slice(name)
                tensors[name] = whole[:, cut] if packed_axis(name.removeprefix("optimizer.")) else whole[cut]
            own = {"repetitions": list(part), "standings": progress["standings"][cut]}
            write_checkpoint(checkpoint_path(run, part), tensors, {**progress, **own})
    path.unlink()


def leftover_checkpoints(groups: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Give the groups whose checkpoints no longer count, as others cover theirs: of a split that was killed before its end.

    A group goes if smaller ones hold all of it; smaller ones that do not go, as the group they came from is still there.
    """
    gone: list[Sequence[int]] = []
    for group in groups:
        parts = [part for part in groups if set(part) < set(group)]
        if parts:
            covered = set().union(*parts) == set(group)
            gone += [group] if covered else parts
    return gone


def read_progress(path: Path) -> dict[str, Any]:
    """Read how far a checkpoint has come, without its tensors; another process may write the next one meanwhile.

    Raises: ModelError if the file is broken.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:  # torch's would open it again, by its name, to map it
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
