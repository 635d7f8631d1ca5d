"""Who trains what: properties of the plan."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mach.model import Sizes
from mach.parallel.plan import plan_groups

numbers = st.lists(st.integers(0, 40), max_size=20)
SIZES = Sizes(n_features=1000, n_labels=500, n_buckets=64, hidden=32, features="sparse", labels_a_sample=1.0)


@given(numbers, st.sets(st.integers(0, 40)), st.integers(1, 9), st.integers(1, 9))
def test_every_wanted_unfinished_repetition_is_trained_once(wanted, finished, n_workers, size):
    groups = plan_groups(wanted, finished=finished, underway=[], n_workers=n_workers, group_size=size)
    left = [r for r in dict.fromkeys(wanted) if r not in finished]
    assert [r for group in groups for r in group] == left
    lengths = [len(group) for group in groups]
    assert all(1 <= n <= size for n in lengths)
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert len(groups) >= min(n_workers, len(left))  # nobody idles while there is work
    assert len(groups) == max(min(n_workers, len(left)), -(-len(left) // size))  # and no group is cut without need


@st.composite
def interrupted(draw):
    """Give wanted repetitions, groups of them that are under way, and the finished ones, some of which may be in such a group."""
    wanted = sorted(draw(st.sets(st.integers(0, 40), min_size=1)))
    cuts = sorted(draw(st.sets(st.integers(0, len(wanted)), max_size=5)))
    groups = [tuple(wanted[a:b]) for a, b in pairwise(cuts)]
    underway = [group for group in groups if draw(st.booleans())]
    return wanted, underway, set(draw(st.lists(st.sampled_from(wanted), max_size=9)))


@given(interrupted(), st.integers(1, 9), st.integers(1, 9))
def test_groups_under_way_are_kept_whole(case, n_workers, size):
    wanted, underway, finished = case
    groups = plan_groups(wanted, finished=finished, underway=underway, n_workers=n_workers, group_size=size)
    kept = [group for group in underway if not set(group) <= finished]
    assert groups[: len(kept)] == kept
    trained = [r for group in groups for r in group]
    assert len(trained) == len(set(trained))
    assert set(wanted) - finished <= set(trained)
    assert set(trained) - (set(wanted) - finished) <= {r for group in kept for r in group}


def test_a_plan_by_hand():
    plan = plan_groups(range(8), finished={0}, underway=[(3, 4)], n_workers=2, group_size=2)
    assert plan == [(3, 4), (1,), (2, 5), (6, 7)]
    assert plan_groups(range(8), finished=(), underway=[], n_workers=1, group_size=100) == [tuple(range(8))]
    assert plan_groups([], finished=(), underway=[], n_workers=3, group_size=1) == []
