"""A run's history: which lines count, what they add up to, as text and as a figure."""

from __future__ import annotations

import re
import warnings

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.config import Config
from mach.errors import ConfigError, ModelError, Stopped
from mach.inspect.history import histories, history_of
from mach.inspect.plot import parts_over_time, plot
from mach.inspect.show import show, size_text
from mach.parallel import train
from mach.train import stop as module
from mach.train.loop import Group

CONFIG = Config(buckets=13, repetitions=4, hidden=9, batch_size=20, epochs=3)  # 30 steps


def step(number, **fields):
    line = {"step": number, "n_steps": 9, "samples_per_s": 10.0 * number, "wall_s": float(number), "peak_bytes": 100 * number}
    return line | {"parts_s": {"data": 0.25, "step": 0.75}} | fields


def event(name, at_step, **fields):
    return {"event": name, "at_step": at_step, "wall_s": float(at_step), "time": 1e9} | fields


def test_sums_over_the_lines():
    lines = [
        event("begun", 0),
        step(1, loss=4.0),
        step(2, validation={"P@1": 0.5}),
        step(9, parts_s={"step": 2.0}),
        {"finished": [0]},
    ]
    history = history_of("group-0-0", lines)
    assert (history.step, history.n_steps, history.wall_s, history.is_finished) == (9, 9, 9.0, True)
    assert (history.samples_per_s, history.peak_bytes) == (20.0, 900)
    assert list(history.parts_s.items()) == [("step", 3.5), ("data", 0.5)]
    assert [value for _, value in history.series("P@1")] == [0.5]
    assert history.to_dict()["loss"] == [[1, 4.0]] and history.to_dict()["P@1"] == [[2, 0.5]]


def test_steps_done_again_count_once():
    """Killed after step 5, with a checkpoint of step 3; then stopped; then resumed where it stopped."""
    lines = [event("begun", 0), *map(step, range(1, 6)), event("resumed", 3), *(step(i, loss=i / 2) for i in (4, 5, 6))]
    history = history_of("g", [*lines, event("stopped", 6, by="SIGTERM"), event("resumed", 6), step(7)])
    assert [line["step"] for line in history.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [value for _, value in history.series("loss")] == [2.0, 2.5, 3.0]
    assert [(line["event"], line.get("again")) for line in history.events] == [("resumed", 2), ("stopped", None), ("resumed", 0)]
    assert not history.is_finished


def test_a_group_begun_anew_forgets_what_was_before():
    old = [event("begun", 0), step(1), event("warning", 1, text="x"), {"finished": [0]}]
    history = history_of("g", [*old, event("begun", 0), step(2)])
    assert ([line["step"] for line in history.steps], history.events, history.is_finished) == ([2], [], False)


def test_figures_that_are_not_finite_are_left_out():
    history = history_of("g", [step(1, loss=float("nan")), step(2, loss=float("inf")), step(3, loss=1.0)])
    assert [value for _, value in history.series("loss")] == [1.0]


def test_text_of_a_history():
    lines = [step(1, loss=4.0, validation={"P@1": 0.1}), step(3, loss=1.0, validation={"P@1": 0.5})]
    events = [event("warning", 3, text="no room"), event("stopped", 3, by="SIGTERM"), event("resumed", 2)]
    first, loss, quality, *parts, warning, stopped, resumed = show(history_of("group-0-7", [*lines, *events, step(4)]))
    assert first == "group-0-7: 4 of 9 steps, 4.0 s, 25 samples/s, 400 B of memory at most"
    assert loss == "  loss            4.000 ▁ 4.000" and quality == "  P@1, %          10.00 ▁ 10.00"
    assert parts == [f"  step           75.0 % {22 * '█'}▌{7 * ' '} 1.5 s", f"  data           25.0 % {7 * '█'}▌{22 * ' '} 0.5 s"]
    when = r"  2001-09-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(when + "warning at step 3: no room", warning)
    assert re.fullmatch(when + "stopped by SIGTERM at step 3", stopped)
    assert re.fullmatch(when + "resumed at step 2, 1 logged steps were done again", resumed)


def test_text_of_logs_with_little_in_them():
    assert list(show(history_of("group-1-1", []))) == ["group-1-1: no step yet"]
    old = {"step": 3, "n_steps": 3, "samples_per_s": 5.0, "loss": 2.0}  # before time and memory were logged
    lines = list(show(history_of("group-1-1", [old, {"finished": [1], "seconds": 1.0}])))
    assert lines == ["group-1-1: finished, 0.0 s, 5 samples/s, 0 B of memory at most", "  loss            2.000 ▁ 2.000"]


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (312_345_678, "312 MB"),
        (999_999_999, "1.0 GB"),
        (10**16, "10000 TB"),
    ],
)
def test_bytes_for_people(n, text):
    assert size_text(n) == text


seconds = st.dictionaries(st.sampled_from(["data", "step", "head"]), st.floats(0.001, 10), min_size=1)


@given(st.lists(st.tuples(st.floats(0.001, 100), seconds), min_size=1, max_size=60))
def test_the_parts_of_each_bin_add_up_to_all_of_it(lines):
    history = history_of("g", [step(i, wall_s=wall, parts_s=parts) for i, (wall, parts) in enumerate(lines)])
    edges, shares = parts_over_time([history])
    total = sum(shares.values())
    counts = np.histogram([wall for wall, _ in lines], edges)[0]
    assert counts.sum() == len(lines) and total[counts > 0] == pytest.approx(100) and not total[counts == 0].any()


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run that was stopped and went on."""
    path = tmp_path_factory.mktemp("runs") / "run"
    take, stop = Group._step, path.parent / "stop"

    def stopped(self, rows, want_loss):
        if self.step == 12:
            stop.touch()
        return take(self, rows, want_loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "_step", stopped)
        patch.setattr(module, "LOOK_S", 0)
        with pytest.raises(Stopped):
            train(CONFIG, tiny, path, stop=stop)
    train(CONFIG, tiny, path, resume=True)
    return path


def test_the_history_of_a_real_run(run):
    (history,) = histories(run)
    assert (history.name, history.step, history.n_steps, history.is_finished) == ("group-0-3", 30, 30, True)
    assert [(line["event"], line["at_step"]) for line in history.events] == [("stopped", 13), ("resumed", 13)]
    assert len(history.series("P@1")) == 3 and history.peak_bytes > 1 << 20
    assert 0 < sum(history.parts_s.values()) <= history.wall_s + 0.01
    text = "\n".join(show(history))
    assert "stopped by request at step 13" in text and "resumed at step 13" in text


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_figure_is_drawn(run, tmp_path, ending):
    (history,) = histories(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot([history, history_of("group-4-7", [step(1)]), history_of("group-8-8", [])], tmp_path / f"a.{ending}")
    assert (tmp_path / f"a.{ending}").stat().st_size > 5000
    if ending == "png":
        pixels = matplotlib.image.imread(tmp_path / "a.png")[:, :, :3]
        blue = (np.abs(pixels - [0x00 / 255, 0x72 / 255, 0xB2 / 255]).max(2) < 0.02).mean()
        assert 0.002 < blue < 0.5  # the stacked time, and lines


def test_what_cannot_be_drawn_is_named(run, tmp_path):
    with pytest.raises(ConfigError, match=r"plot='.*a\.gif' must end with one of \.png, \.svg, \.pdf"):
        plot(histories(run), tmp_path / "a.gif")
    with pytest.raises(ModelError, match="there is no step in the run's logs yet: nothing to draw"):
        plot([history_of("g", [])], tmp_path / "a.png")
    with pytest.raises(ModelError, match=r"absent/a\.png: the figure cannot be written \(No such file"):
        plot(histories(run), tmp_path / "absent" / "a.png")
