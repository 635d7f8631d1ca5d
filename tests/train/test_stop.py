"""A request to stop: what is noted, what is passed on, and that nothing of it stays behind."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from pathlib import Path

import pytest

from mach.errors import Stopped
from mach.train import stop as module
from mach.train.stop import Stop, leave_interrupts_to_the_parent

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def unharmed():
    """Whatever a test does to the handlers is undone, and none may leave them changed itself."""
    before = [signal.getsignal(number) for number in BOTH]
    yield
    after = [signal.getsignal(number) for number in BOTH]
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.fixture
def now(monkeypatch):
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


@pytest.mark.parametrize(("number", "name", "status"), [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGINT, "Ctrl-C", 130)])
def test_a_signal_is_noted_and_passed_on_by_the_file(tmp_path, number, name, status, now):
    with Stop(tmp_path / "stop") as stop:
        elsewhere = Stop(tmp_path / "stop")
        assert not stop.asked and not elsewhere.asked
        os.kill(os.getpid(), number)
        now[0] += 0.11
        assert stop.asked and elsewhere.asked
        for each in (stop, elsewhere):
            assert (each.name, each.status, each.is_urgent) == (name, status, False)


def test_the_file_asks_whoever_looks(tmp_path, now):
    file = tmp_path / "stop"
    with Stop(file) as stop:
        assert not stop.asked
        file.touch()
        assert not stop.asked  # it looks ten times a second
        now[0] += 0.11
        assert stop.asked
        file.unlink()
        assert stop.asked and (stop.name, stop.status) == ("request", 0)
    assert not file.exists()


def test_a_file_that_somebody_else_made_stays(tmp_path):
    file = tmp_path / "stop"
    file.touch()
    with Stop(file) as stop:
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
    assert file.exists()


def test_a_file_that_it_made_goes(tmp_path):
    with Stop(tmp_path / "stop"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert (tmp_path / "stop").exists()
    assert not (tmp_path / "stop").exists()


def test_the_file_is_never_there_without_the_name_of_what_asked(tmp_path, monkeypatch):
    seen, write = [], Path.write_text

    def written(self, text, **how):
        seen.append((tmp_path / "stop").exists())
        return write(self, text, **how)

    monkeypatch.setattr(Path, "write_text", written)
    with Stop(tmp_path / "stop"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [False] and [file.name for file in tmp_path.iterdir()] == ["stop"]
        assert (tmp_path / "stop").read_text() == "SIGTERM"


def test_the_second_signal_stops_at_once_but_an_echo_of_the_first_does_not(tmp_path, now):
    with pytest.raises(Stopped, match="stopped at once; checkpoints and finished files are kept") as caught:
        with Stop(tmp_path / "stop") as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += 0.2
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop.is_urgent
            now[0] += 0.2
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.status == 128 + 15 and stop.is_urgent and isinstance(caught.value, KeyboardInterrupt)
    assert not (tmp_path / "stop").exists()


def test_a_folder_that_cannot_be_written_keeps_nobody_from_stopping(tmp_path):
    with Stop(tmp_path / "absent" / "stop") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked


def test_no_handler_is_set_outside_the_main_thread(tmp_path):
    def work():
        with Stop(tmp_path / "stop") as stop:
            found.append([signal.getsignal(number) for number in BOTH])
            (tmp_path / "stop").touch()
            found.append(stop.asked)

    before, found = [signal.getsignal(number) for number in BOTH], []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, True]


def test_signals_that_are_ignored_stay_so(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    leave_interrupts_to_the_parent()
    with Stop(tmp_path / "stop") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.asked
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


def test_where_it_stopped_travels_between_processes():
    there = pickle.loads(pickle.dumps(Stopped("run: stopped at step 3", 130)))
    assert (str(there), there.status, type(there)) == ("run: stopped at step 3", 130, Stopped)
