"""Seconds by part: on the host's time, and on a device's own, which here is played by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mach.train import clock
from mach.train.clock import Clock, DeviceClock, clock_for
from mach.train.memory import peak_bytes, used_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def now(monkeypatch):
    """A time that passes only when told to."""
    time = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: time[0])
    return time


def test_a_part_has_what_passed_since_the_lap_before(now):
    watch = Clock()
    for part, seconds in (("data", 1.0), ("head", 2.0), ("data", 4.0)):
        now[0] += seconds
        watch.lap(part)
    assert watch.read() == {"data": 5.0, "head": 2.0}
    assert watch.read() == {}
    now[0] += 8
    watch.start()
    now[0] += 16
    watch.lap("head")
    assert watch.read() == {"head": 16.0}


def test_what_was_spent_does_not_depend_on_readings(now):
    watch = Clock()
    watch.go_on_from({"head": 1.0, "data": 2.0})
    for part, seconds, is_read in (("data", 4.0, True), ("rows", 8.0, False), ("data", 16.0, True), ("data", 32.0, False)):
        now[0] += seconds
        watch.lap(part)
        if is_read:
            watch.read()
    assert watch.spent() == watch.spent() == {"head": 1.0, "data": 54.0, "rows": 8.0}
    assert watch.read() == {"data": 32.0}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1000)), max_size=50), st.integers(1, 9))
def test_readings_add_up_to_all_that_passed(laps, every):
    with pytest.MonkeyPatch.context() as patch:
        time, total = [0.0], 0.0
        patch.setattr(clock.time, "perf_counter", lambda: time[0])
        watch = Clock()
        for i, (part, seconds) in enumerate(laps):
            time[0] += seconds
            watch.lap(part)
            if i % every == 0:
                total += sum(watch.read().values())
    assert total + sum(watch.read().values()) == time[0]


class Stream:
    """A device that has work put into it now and does it later: `works(s)` queues, `catch_up(n)` lets it pass n events."""

    def __init__(self):
        self.queued_s, self.passed, self.n_events, self.n_made = 0.0, 0, 0, 0
        stream = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                stream.n_made += 1

            def record(self, _):
                self.at_s, self.number = stream.queued_s, stream.n_events
                stream.n_events += 1

            def query(self):
                return self.number < stream.passed

            def elapsed_time(self, other):
                assert self.query() and other.query(), "not passed yet: torch would raise"
                return 1000 * (other.at_s - self.at_s)

        self.Event = Event

    def catch_up(self):
        self.passed = self.n_events


@pytest.fixture
def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return stream


def test_a_device_is_read_as_far_as_it_has_come(stream):
    watch = clock_for(GPU)
    assert isinstance(watch, DeviceClock)
    for part, seconds in (("data", 1.0), ("head", 2.0), ("data", 4.0)):
        stream.queued_s += seconds
        watch.lap(part)
    assert watch.read() == {}  # it has passed nothing
    stream.passed = 3  # the start and two laps
    assert watch.read() == {"data": 1.0, "head": 2.0}
    stream.catch_up()
    assert watch.spent() == {"data": 5.0, "head": 2.0}
    assert watch.read() == {"data": 4.0} and watch.read() == {}
    stream.queued_s += 8
    watch.start()
    stream.queued_s += 16
    watch.lap("head")
    stream.catch_up()
    assert watch.read() == {"head": 16.0}


def test_a_restart_forgets_what_the_device_has_not_passed(stream):
    watch = DeviceClock(GPU)
    stream.queued_s += 1
    watch.lap("data")
    watch.start()
    stream.queued_s += 2
    watch.lap("head")
    stream.catch_up()
    assert watch.read() == {"head": 2.0}


def test_events_serve_again(stream):
    watch = DeviceClock(GPU)
    for part in itertools.islice(itertools.cycle("ab"), 5000):
        stream.queued_s += 1
        watch.lap(part)
        stream.catch_up()
    assert watch.read() == {"a": 2500.0, "b": 2500.0}
    assert stream.n_made <= 1026


def test_memory_in_use_and_at_its_peak():
    assert isinstance(clock_for(CPU), Clock) and not isinstance(clock_for(CPU), DeviceClock)
    before, block = used_bytes(CPU), torch.ones(16 << 20)
    assert 1 << 20 < before < used_bytes(CPU) - (48 << 20)
    assert used_bytes(CPU) <= peak_bytes(CPU)
    assert block.nbytes == 64 << 20
