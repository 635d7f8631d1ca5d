"""Workers that are asked to stop: the parent passes it on and waits for their checkpoints."""

from __future__ import annotations

import os
import re
import signal

import pytest

from mach.config import Config
from mach.parallel import train
from mach.store import Run
from mach.train.checkpoint import checkpoint_path, read_progress
from mach.train.log import log_path, read_log

SETTINGS = ["--buckets", "13", "--hidden", "9", "--batch-size", "10", "--epochs", "100000"]


@pytest.mark.parametrize("whole_group", [False, True], ids=["SIGTERM", "Ctrl-C"])
def test_workers_are_told_and_waited_for(started, tiny, tmp_path, whole_group):
    """SIGTERM comes to the parent alone, a terminal's Ctrl-C to every process."""
    logs = [log_path(tmp_path / "run", group) for group in ([0, 1], [2, 3])]
    process = started("train", tiny.path, "--out", tmp_path / "run", *SETTINGS, "--repetitions", "4", "--workers", "2")
    process.await_steps(*logs)
    if whole_group:
        os.killpg(process.process.pid, signal.SIGINT)
    else:
        os.kill(process.process.pid, signal.SIGTERM)
    ended, line, err = process.end()
    where = r"at step ([\d,]+) of 2,000,000 \(repetitions 0-1\), at step ([\d,]+) of 2,000,000 \(repetitions 2-3\)"
    found = re.fullmatch(rf"mach train: .*run: stopped {where}; go on with --resume", line)
    assert ended == (130 if whole_group else 0) and found, err
    assert "Traceback" not in err
    for log, step, group in zip(logs, found.groups(), ([0, 1], [2, 3]), strict=True):
        assert read_progress(checkpoint_path(tmp_path / "run", group))["step"] == int(step.replace(",", ""))
        last = list(read_log(log))[-1]
        assert (last["event"], last["by"]) == ("stopped", "Ctrl-C" if whole_group else "SIGTERM")
    assert not list((tmp_path / "run").glob(".*"))


def test_a_worker_without_work_does_not_mind_ctrl_c(started, tiny, tmp_path):
    """If it died of it, joblib would kill the one that trains, and the work since its last checkpoint."""
    process = started("train", tiny.path, "--out", tmp_path / "run", *SETTINGS, "--repetitions", "1", "--workers", "2")
    process.await_steps(log_path(tmp_path / "run", [0]))
    os.killpg(process.process.pid, signal.SIGINT)
    ended, line, err = process.end()
    assert ended == 130 and re.search(r"stopped at step [\d,]+ of 2,000,000 \(repetitions 0-0\); go on", line), err
    assert "Traceback" not in err and checkpoint_path(tmp_path / "run", [0]).exists()


def test_a_wish_that_a_killed_process_of_the_same_number_left_is_not_ours(tiny, tmp_path):
    config = Config(buckets=13, repetitions=1, hidden=4, epochs=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".stop.{os.getpid()}.tmp").write_text("SIGTERM")
    train(config, tiny, tmp_path / "run")
    assert Run.open(tmp_path / "run").finished() == [0]
