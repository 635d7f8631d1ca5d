"""A group's log: what a line holds, and files that stay bounded."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from mach.config import Config
from mach.errors import ModelError
from mach.parallel import train
from mach.train import log as logs
from mach.train.clock import Clock
from mach.train.log import Log, log_path, read_log
from mach.train.loop import StepRecord

CONFIG = Config(buckets=13, repetitions=2, hidden=9, batch_size=100, epochs=2)


PARTS = {
    "data",
    "forward",
    "head forward",
    "head backward",
    "update",
    "backward",
    "rows",
    "watch",
    "validation",
    "checkpoint",
    "log",
}


def group_at(step=0):
    return SimpleNamespace(step=step, clock=Clock(), device=torch.device("cpu"))


def writer(path, **options):
    return Log(path, group_at(**options), spent_s=100.0, tensorboard=None)


def record(step, **fields):
    return StepRecord(step=step, n_steps=999, epoch=1, samples_per_s=10.0 * step, rate=0.1, **fields)


def test_a_line_holds_time_by_part_and_memory(tiny, tmp_path):
    train(CONFIG, tiny, tmp_path / "run", checkpoint_s=0)
    lines = list(read_log(log_path(tmp_path / "run", [0, 1])))
    assert lines[0]["event"] == "begun" and lines[0]["at_step"] == 0
    steps = [line for line in lines if "step" in line]
    assert {part for line in steps for part in line["parts_s"]} == PARTS
    assert all(seconds >= 0 for line in steps for seconds in line["parts_s"].values())
    assert "validation" in steps[-1]["parts_s"] and "validation" not in steps[0]["parts_s"]
    counted, wall = sum(sum(line["parts_s"].values()) for line in steps), steps[-1]["wall_s"]
    assert 0.5 * wall < counted <= wall + 0.002  # all but the set-up before the first step
    assert all(1 << 20 < line["bytes"] <= line["peak_bytes"] for line in steps)
    assert lines[-1]["finished"] == [0, 1]


def test_what_is_not_logged_at_once_is_in_the_next_line(tmp_path):
    with writer(tmp_path / "log") as log:
        log.write(record(1, loss=3.0))
        for _ in range(3):
            log._group.clock.lap("data")
        log.write(record(2))  # within half a second
        log.write(record(4, validation={"P@1": 0.5}))
    one, two = read_log(tmp_path / "log")
    assert (one["step"], one["loss"], one["parts_s"]) == (1, 3.0, {})
    assert (two["step"], list(two["parts_s"])) == (4, ["data"]) and one["wall_s"] >= 100
    assert two["samples_per_s"] == pytest.approx(2 / (1 / 20 + 1 / 40), abs=0.1)


def test_full_files_are_rotated_and_the_oldest_fall_away(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LOG_BYTES", 1000)
    path = tmp_path / "log.jsonl"
    for part in range(2):  # the second goes on where the first stopped
        with writer(path) as log:
            for i in range(50):
                log.write_fields({"step": 50 * part + i, "text": 80 * "x"})
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["log.jsonl", "log.jsonl.1", "log.jsonl.2", "log.jsonl.3"]
    assert all(900 < (tmp_path / name).stat().st_size <= 1000 for name in files[1:])
    steps = [line["step"] for line in read_log(path)]
    assert steps == list(range(steps[0], 100)) and 27 < len(steps) <= 36


def test_a_line_longer_than_a_file_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LOG_BYTES", 10)
    with writer(tmp_path / "log") as log:
        for i in range(3):
            log.write_fields({"step": i, "text": 80 * "x"})
    assert [line["step"] for line in read_log(tmp_path / "log")] == [0, 1, 2]


def test_a_line_that_was_cut_spoils_no_other(tmp_path):
    (tmp_path / "log").write_bytes(b'{"step": 1}\n[3]\n{"st')
    with writer(tmp_path / "log", step=7) as log:
        log.write_event("resumed", other=3)
    whole, event = read_log(tmp_path / "log")
    assert whole == {"step": 1}
    assert (event["event"], event["at_step"], event["other"]) == ("resumed", 7, 3) and event["time"] > 1e9
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1]) == event


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LOG_BYTES", 10)

    def full(*_):
        raise OSError(28, "No space left on device")

    with writer(tmp_path / "log") as log:
        log.write_fields({"step": 1})
        monkeypatch.setattr(logs.os, "replace", full)
        with pytest.raises(ModelError, match=r"log: the log cannot be written \(No space left on device\); go on with --resume"):
            log.write_fields({"step": 2})
