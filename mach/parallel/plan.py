"""Which repetitions are trained together: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from mach.config import Config
from mach.hashing.bounds import WEIGHT_BYTES, ensemble_cost
from mach.model import Sizes


def plan_groups(
    wanted: Iterable[int], *, finished: Collection[int], underway: Sequence[Sequence[int]], n_workers: int, group_size: int
) -> list[tuple[int, ...]]:
    """Cut the repetitions still to train into groups: those under way as they were begun, the rest in equal runs.

    Args:    underway, the groups that left a checkpoint; group_size, the most that fit on a device together.
    Returns: groups that hold each wanted, unfinished repetition once; the new ones differ by one in size at most. A group
             under way is kept whole: some of it may be finished, if it was stopped between two of its repetitions.
    """
    left = [r for r in dict.fromkeys(wanted) if r not in finished]
    begun = [tuple(group) for group in underway if set(group) & set(left)]
    taken = {r for group in begun for r in group}
    new = [r for r in left if r not in taken]
    n_groups = max(min(n_workers, len(new)), -(-len(new) // max(1, group_size)))
    cuts = [i * len(new) // max(1, n_groups) for i in range(n_groups + 1)]
    return begun + [tuple(new[a:b]) for a, b in pairwise(cuts)]


def disk_bytes(
    config: Config, sizes: Sizes, groups: Sequence[Sequence[int]], *, n_workers: int, input_bytes: int = WEIGHT_BYTES,
    after: int = 0,
) -> int:  # fmt: skip
    """Give the bytes that training some groups writes at its fullest, without what text and logs add.

    Every repetition is finished or at its end. The largest groups that can be under way together hold a checkpoint of weights and
    moments twice, as the old one stays until the new one is whole, and with early stopping the best weights of their repetitions.
    Checkpoints are gone when the second stage writes `after` bytes. A weight of the input layer takes `input_bytes`.
    """
    cost = ensemble_cost(
        n_labels=sizes.n_labels,
        n_buckets=sizes.n_buckets,
        n_repetitions=1,
        hidden=sizes.hidden,
        n_features=config.feature_buckets or sizes.n_features,
        layers=config.layers,
        settings=config,
        labels_a_sample=sizes.labels_a_sample,
        input_bytes=input_bytes,
    )
    checkpoint = cost.training_bytes - cost.table_bytes
    underway = sum(sorted(map(len, groups), reverse=True)[:n_workers])
    best = cost.weight_bytes if config.patience else 0
    return sum(map(len, groups)) * cost.weight_bytes + max(underway * (2 * checkpoint + best), after)
