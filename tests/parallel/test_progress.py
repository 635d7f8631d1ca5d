"""The bars of training, read from the groups' logs."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from mach.parallel import progress
from mach.parallel.progress import Watch

STEP = {"step": 3, "n_steps": 10, "samples_per_s": 12345.6}


@pytest.fixture
def shown(monkeypatch):
    """Draw into memory; give what tasks there were, by their description."""
    tasks, real = {}, progress._bars

    def bars():
        made = real()
        made.live.console = Console(file=io.StringIO(), width=150)
        add, update = made.add_task, made.update

        def add_task(description, **fields):
            number = add(description, **fields)
            tasks[description] = made.tasks[number]
            return number

        made.add_task, made.update = add_task, update
        return made

    monkeypatch.setattr(progress, "_bars", bars)
    return tasks


def put(path, *lines):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_bar_follows_each_log_from_where_it_was(tmp_path, shown):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    put(one, {"step": 1, "n_steps": 4, "samples_per_s": 1.0})  # of an earlier, killed run
    with Watch({"0-3": one, "4-7": two}, shown=True):
        put(one, STEP, {"step": 5, "n_steps": 10, "samples_per_s": 20.0, "loss": 1.23456})
        put(two, {"step": 10, "n_steps": 10, "samples_per_s": 9.0, "validation": {"P@1": 0.5}}, {"finished": [4], "seconds": 1})
    first, second = shown["r 0-3"], shown["r 4-7"]
    assert (first.completed, first.total, second.completed, second.total) == (5, 10, 10, 10)
    assert first.fields == {"speed": "20 samples/s", "loss": "loss 1.235", "quality": ""}
    assert second.fields == {"speed": "9 samples/s", "loss": "", "quality": "P@1 50.00"}


def test_a_line_half_written_waits_for_its_other_half(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 1e6)  # looks only when this test does, and at the end
    log, line = tmp_path / "log.jsonl", json.dumps(STEP | {"step": 8})
    with Watch({"0-0": log}, shown=True) as watch:
        put(log, STEP)
        log.write_text(log.read_text() + line[:9])
        watch._show_new()
        assert shown["r 0-0"].completed == 3
        log.write_text(log.read_text() + line[9:] + "\n")
        watch._show_new()
        assert shown["r 0-0"].completed == 8


def test_it_looks_again_while_the_block_runs(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.001)
    with Watch({"0-0": tmp_path / "log.jsonl"}, shown=True):
        put(tmp_path / "log.jsonl", STEP)
        until = time.monotonic() + 60
        while not shown:
            assert time.monotonic() < until, "the bar never came"
            time.sleep(0.001)


@pytest.mark.parametrize(("logs", "wanted"), [({}, True), ({"0-0": "log.jsonl"}, False)])
def test_nothing_is_drawn_without_logs_or_unasked(tmp_path, shown, logs, wanted):
    with Watch({name: tmp_path / file for name, file in logs.items()}, shown=wanted) as watch:
        put(tmp_path / "log.jsonl", STEP)
    assert shown == {} and not hasattr(watch, "_thread")


def test_the_bars_are_taken_away_when_training_fails(tmp_path, shown):
    with pytest.raises(KeyboardInterrupt), Watch({"0-0": tmp_path / "log.jsonl"}, shown=True) as watch:
        raise KeyboardInterrupt
    assert not watch._thread.is_alive() and watch._bars.finished


def test_a_log_that_never_comes_is_no_trouble(tmp_path, shown):
    with Watch({"0-0": tmp_path / "absent" / "log.jsonl"}, shown=True):
        pass
    assert shown == {}


def test_it_draws_on_standard_error(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    with Watch({"0-1": log}, shown=True):
        put(log, STEP | {"loss": 2.0})
    out, err = capsys.readouterr()
    assert out == "" and "r 0-1" in err and "3/10" in err


def test_a_log_that_is_rotated_is_followed_to_its_end_and_on(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 1e6)
    log, seen, update = tmp_path / "log.jsonl", [], Watch._update
    monkeypatch.setattr(Watch, "_update", lambda self, name, fields: (seen.append(fields["step"]), update(self, name, fields)))
    put(log, STEP)
    with Watch({"0-0": log}, shown=True) as watch:
        put(log, STEP | {"step": 4})
        log.rename(tmp_path / "log.jsonl.1")
        watch._show_new()  # the next file is not there yet
        put(tmp_path / "log.jsonl.1", STEP | {"step": 5})
        put(log, STEP | {"step": 6})
        watch._show_new()
        put(log, STEP | {"step": 7})
        log.rename(tmp_path / "log.jsonl.1")
        put(log, STEP | {"step": 8})
    assert seen == [4, 5, 6, 7, 8]


def test_what_a_group_warns_of_is_shown(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    with Watch({"0-1": log}, shown=True):
        put(log, {"event": "warning", "text": "no room [for] it, " + 99 * "x", "at_step": 3}, STEP)
    assert f"r 0-1: warning: no room [for] it, {99 * 'x'}\n" in capsys.readouterr().err
