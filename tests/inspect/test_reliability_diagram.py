"""A calibration for people: its lines and its diagram."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest

from mach.calibration import Calibration, Threshold
from mach.errors import ConfigError, ModelError
from mach.inspect.reliability import plot_calibration, show_calibration, summary

BINS = [[300, 0.05, 0.0625], [20, 0.5, 0.55], [10, 0.95, 0.9]]


@pytest.fixture
def calibration():
    thresholds = (
        Threshold(wanted=0.5, score=-1.25, precision=0.5, recall=0.75, coverage=0.875, n_kept=30, held_out=0.4375),
        Threshold(wanted=0.9, score=None),
    )
    errors = {"ECE@1": 0.25, "Brier@1": 0.125}
    return Calibration(
        knot_scores=np.zeros(1),
        knot_probabilities=np.zeros(1),
        thresholds=thresholds,
        of={"split": "dev", "n_samples": 1234, "k": 100},
        measured={"before": errors | {"bins": BINS}, "after": {name: e / 2 for name, e in errors.items()} | {"bins": BINS}},
    )


def test_the_lines(calibration):
    lines = list(show_calibration(calibration))
    assert lines[0] == "1,234 samples of dev, the 100 best labels of each; halves judged by each other's map"
    assert [line.split()[0] for line in lines[2:5]] == ["0.050", "0.500", "0.950"]
    assert "0.550 ███████████ " in lines[3] and lines[2].endswith("          300")
    assert lines[6:8] == [
        "  expected calibration error, ECE@1       0.2500  0.1250",
        "  Brier score, Brier@1                    0.1250  0.0625",
    ]
    assert lines[9:] == [
        "      0.5        -1.25   0.750     0.875              0.438",
        "      0.9  no score reaches it here",
    ]
    assert lines[8].split() == ["precision", "scores", "from", "recall", "coverage", "on", "the", "other", "half"]
    assert len(lines[1]) == len(lines[2]) and len(lines[8]) == len(lines[9])


def test_the_summary(calibration):
    scores = {"estimator": "logits", "repetitions": "0-7", "model": "ab"}
    one, both = (replace(calibration, of={**calibration.of, "scores": scores | more}) for more in ({}, {"reranker": "cd"}))
    assert summary(one) == "calibration: isotonic, fitted on 1,234 samples of dev, logits of repetitions 0-7; ECE@1 0.1250"
    assert "logits of repetitions 0-7 and the re-ranker; ECE@1" in summary(both)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_diagram_is_drawn(calibration, tmp_path, ending):
    plot_calibration(calibration, tmp_path / f"a.{ending}")
    assert (tmp_path / f"a.{ending}").stat().st_size > 5000
    if ending == "png":
        pixels = matplotlib.image.imread(tmp_path / "a.png")[:, :, :3]
        blue = (np.abs(pixels - [0x00 / 255, 0x72 / 255, 0xB2 / 255]).max(2) < 0.02).mean()
        assert 0.002 < blue < 0.5


def test_what_cannot_be_drawn_is_named(calibration, tmp_path):
    with pytest.raises(ConfigError, match=r"plot='.*a\.gif' must end with one of \.png, \.svg, \.pdf"):
        plot_calibration(calibration, tmp_path / "a.gif")
    with pytest.raises(ModelError, match=r"absent/a\.png: the figure cannot be written \(No such file"):
        plot_calibration(calibration, tmp_path / "absent" / "a.png")
