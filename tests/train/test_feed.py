"""Batches made ahead: in order, no further ahead than said, errors in their turn, and no thread left behind."""

from __future__ import annotations

import threading

import pytest

from mach.train.feed import AHEAD, ahead


def feed_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mach-feed")]


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("n", [0, 1, AHEAD + 1, 20])
def test_everything_comes_in_order(n, n_threads):
    first = threading.Event()

    def make(x):
        if x:
            first.set()
        elif n_threads > 1 and n > 1:
            assert first.wait(10)  # another item is made meanwhile
        return 10 * x

    assert list(ahead(make, range(n), n_threads)) == [10 * x for x in range(n)]
    assert not feed_threads()


def test_it_works_beside_the_caller_and_only_a_little_ahead():
    made, third = [], threading.Event()

    def make(x):
        made.append((x, threading.current_thread().name))
        if x == AHEAD + 1:
            third.set()
        return x

    batches = ahead(make, range(100))
    assert next(batches) == 0
    assert third.wait(10)  # made without being asked for
    assert len(made) <= AHEAD + 2
    assert all(name.startswith("mach-feed") for _, name in made)
    batches.close()
    assert not feed_threads() and len(made) <= AHEAD + 2


def test_an_error_comes_in_its_turn():
    batches = ahead(lambda x: 1 // (3 - x), range(9))
    assert [next(batches) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    assert not feed_threads()
