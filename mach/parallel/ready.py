"""What is asked of a run folder before the first step: whose work lies there, and whether the disk has room."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch

from mach.data import Dataset
from mach.errors import ModelError
from mach.files import free_bytes
from mach.model import resolve_precision, resolve_rows
from mach.parallel.plan import disk_bytes
from mach.parallel.rerank import SHORTLISTS
from mach.parallel.second import Samples, second_stage
from mach.store.folder import Run, format_repetitions
from mach.store.reranker import reranker_record
from mach.train.checkpoint import FOLDER, best_path, checkpoint_path, leftover_checkpoints, read_progress


def underway(run: Run, wanted: Sequence[int], resume: bool) -> list[list[int]]:
    """Give the groups that left checkpoints; refuse to pass over their work silently. Clear away what finished ones left."""
    finished = set(run.finished())
    begun = []
    for file in sorted((run.path / FOLDER).glob("group-*.safetensors")):
        progress = read_progress(file)
        group = progress["repetitions"]
        if progress["run"] != run.manifest["key"]:
            raise ModelError(f"{file}: the checkpoint is of another run, copied here by mistake; delete it")
        if set(group) <= finished:
            file.unlink(missing_ok=True)
        else:
            begun.append(group)
    for group in leftover_checkpoints(begun):
        begun.remove(list(group))
        checkpoint_path(run.path, group).unlink(missing_ok=True)
    begun = [group for group in begun if set(group) & set(wanted)]
    for r in finished:
        best_path(run.path, r).unlink(missing_ok=True)
    if begun and not resume:
        names = ", ".join(map(format_repetitions, begun))
        raise ModelError(f"{run.path}: repetitions {names} are under way here; add --resume to go on, or choose another --out")
    partial = [group for group in begun if not set(group) <= set(wanted)]
    if partial:
        raise ModelError(
            f"{run.path}: repetitions {format_repetitions(partial[0])} were begun together; resume all of them, or delete "
            f"{run.path / FOLDER} to start them again"
        )
    return begun


def refuse_full_disk(
    run: Run, groups: Sequence[Sequence[int]], n_workers: int, device: torch.device, dataset: Dataset | None = None
) -> None:
    """Refuse to begin what the file system has no room for; what is there already is not counted twice.

    With the data set, the second stage is counted, too, if it can be fitted once these groups are trained.
    """
    held = sum(file.stat().st_size for file in (run.path / FOLDER).glob("*.safetensors"))
    rows = resolve_rows(run.config, run.sizes.features, resolve_precision(run.config.precision, device))
    after = 0 if dataset is None else _second_bytes(run, {r for group in groups for r in group}, dataset)
    needed = disk_bytes(run.config, run.sizes, groups, n_workers=n_workers, input_bytes=rows.itemsize, after=after) - held
    free = free_bytes(run.path)
    if needed > free:
        raise ModelError(
            f"{run.path}: training writes {needed:,} more bytes of checkpoints, finished repetitions and shortlists at its "
            f"fullest, and {free:,} are free there; free some space, choose another --out, or train fewer --repetitions at a time"
        )


def _second_bytes(run: Run, trained: Set[int], dataset: Dataset) -> int:
    """Give the bytes that the second stage is still to write once some more repetitions are trained."""
    second = second_stage(run.config, run.sizes, Samples.of(dataset))
    if second is None or reranker_record(run.path) is not None or run.problems().keys() - trained:
        return 0
    return second.disk_bytes - (second.lists_bytes if (run.path / SHORTLISTS).exists() else 0)
