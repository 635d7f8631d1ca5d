"""Processes of their own that are asked to stop: they end their step, keep it, and go on from it to the same bits."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from mach.config import Config, dump_toml
from mach.errors import Stopped
from mach.parallel import runners, train
from mach.store import Run
from mach.train.checkpoint import checkpoint_path, read_progress
from mach.train.log import log_path, read_log
from mach.train.loop import Group
from mach.train.stop import Stop

CONFIG = Config(buckets=13, repetitions=4, hidden=9, layers=1, dropout=0.3, batch_size=10, epochs=100)  # 2,000 steps
LONG = CONFIG.replace(epochs=100_000)


def weights_of(run):
    return {r: load_file(Run.open(run).weights_path(r)) for r in Run.open(run).finished()}


def assert_same_bits(run, truth):
    ours, theirs = weights_of(run), weights_of(truth)
    assert ours.keys() == theirs.keys()
    for r in ours:
        for name in ours[r]:
            assert torch.equal(ours[r][name], theirs[r][name]), (r, name)


@pytest.fixture(scope="module")
def truth(tiny, tmp_path_factory):
    """A run that nothing stopped."""
    path = tmp_path_factory.mktemp("truth") / "run"
    train(CONFIG, tiny, path)
    return path


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_process_that_is_asked_to_stop_and_goes_on(started, tiny, truth, tmp_path, number, status):
    run, log = tmp_path / "run", log_path(tmp_path / "run", [0, 1, 2, 3])
    (tmp_path / "config.toml").write_text(dump_toml(CONFIG))
    process = started("train", tiny.path, "--out", run, "--config", tmp_path / "config.toml")
    process.await_steps(log)
    os.kill(process.process.pid, number)
    ended, line, err = process.end()
    found = re.fullmatch(r"mach train: .*run: stopped at step ([\d,]+) of 2,000 \(repetitions 0-3\); go on with --resume", line)
    assert (ended, bool(found)) == (status, True), err
    step = int(found[1].replace(",", ""))
    assert read_progress(checkpoint_path(run, [0, 1, 2, 3]))["step"] == step > 0
    last = list(read_log(log))[-1]
    assert (last["event"], last["at_step"], last["by"]) == ("stopped", step, "SIGTERM" if status == 0 else "Ctrl-C")
    assert not list(run.glob(".*"))
    train(CONFIG, tiny, run, resume=True)
    assert_same_bits(run, truth)
    events = [(line["event"], line["at_step"]) for line in read_log(log) if "event" in line]
    assert events == [("begun", 0), ("stopped", step), ("resumed", step)]


def stop_at(monkeypatch, step, n_signals=1):
    """Send this process SIGTERM within that step."""
    take = Group._step

    def signalled(self, rows, want_loss):
        loss = take(self, rows, want_loss)
        for _ in range(n_signals if self.step == step else 0):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3 if n_signals > 1 else 0)
        return loss

    monkeypatch.setattr(Group, "_step", signalled)


@pytest.mark.parametrize("settings", [{}, {"patience": 3}, {"table": "identity"}], ids=["plain", "patience", "full"])
def test_what_was_stopped_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch, settings):
    config = CONFIG.replace(epochs=9, **settings)
    train(config, tiny, tmp_path / "truth")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=r"run: stopped at step 47 of 180 \(repetitions 0-"):
        stop_at(patch, 47)
        train(config, tiny, tmp_path / "run")
    assert Run.open(tmp_path / "run").finished() == []
    train(config, tiny, tmp_path / "run", resume=True)
    assert_same_bits(tmp_path / "run", tmp_path / "truth")


def test_groups_that_wait_are_not_begun(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "group_size", lambda *args, **kwargs: 2)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        stop_at(patch, 40)  # the last step of the first group
        train(CONFIG.replace(epochs=2), tiny, tmp_path / "run")
    assert str(caught.value) == f"{tmp_path}/run: stopped before repetitions 2-3"
    assert Run.open(tmp_path / "run").finished() == [0, 1]
    assert not log_path(tmp_path / "run", [2, 3]).exists()


def test_a_second_signal_stops_at_once(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped at once") as caught:
        stop_at(patch, 7, n_signals=2)
        train(CONFIG, tiny, tmp_path / "run")
    assert caught.value.status == 128 + 15 and not checkpoint_path(tmp_path / "run", [0, 1, 2, 3]).exists()


def test_a_file_can_ask_too_and_no_thread_needs_signals(tiny, tmp_path):
    raised = []

    def work():
        try:
            train(LONG, tiny, tmp_path / "run", stop=tmp_path / "stop")
        except Stopped as stopped:
            raised.append(stopped)

    thread = threading.Thread(target=work)
    thread.start()
    log = log_path(tmp_path / "run", [0, 1, 2, 3])
    while not any("step" in line for line in read_log(log)):
        assert thread.is_alive()
        time.sleep(0.01)
    (tmp_path / "stop").touch()
    thread.join(60)
    assert raised[0].status == 0 and (tmp_path / "stop").exists()
    assert read_progress(checkpoint_path(tmp_path / "run", [0, 1, 2, 3]))["step"] > 0


def test_a_wish_at_any_moment_within_a_step_loses_nothing(tiny, tmp_path, monkeypatch):
    """It may come between looking whether a checkpoint is due and looking whether to stop."""
    for n in range(1, 9):
        looks = []

        def asked(_, looks=looks, n=n):
            looks.append(1)
            return len(looks) >= n

        with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
            patch.setattr(Stop, "asked", property(asked))
            train(CONFIG, tiny, tmp_path / str(n))
        assert "without room" not in str(caught.value)
        file = checkpoint_path(tmp_path / str(n), [0, 1, 2, 3])
        assert not file.exists() if n == 1 else f"at step {read_progress(file)['step']} of" in str(caught.value)
