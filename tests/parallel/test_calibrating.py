"""Calibrating a run: what it is fitted on, what is measured, against the steps taken by hand; and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import planted_splits

from mach.calibration import Calibration, fit, naive, thresholds_for
from mach.config import Config
from mach.data import take, take_rows, write_dataset
from mach.errors import ConfigError, DataError, ModelError
from mach.metrics import hits
from mach.model import Model
from mach.parallel import calibrating, train
from mach.parallel.calibrating import Found, calibrate, fit_found
from mach.reliability import Reliability
from mach.store import load
from mach.store.calibration import fingerprint, load_calibration, read_calibration, scores_key
from mach.train.schedule import order_of

CONFIG = Config(buckets=13, repetitions=3, hidden=8, epochs=3, batch_size=20)
K, N_DEV = 40, 40


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(CONFIG, tiny, path)
    return path


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A data set without a dev split, and a run that held out a quarter of its train split."""
    folder = tmp_path_factory.mktemp("held")
    splits = planted_splits()
    del splits["dev"]
    dataset = write_dataset(folder / "data", splits)
    train(CONFIG.replace(validation=0.25), dataset, folder / "run")
    return dataset, folder / "run"


def asked(model, features, labels, k, estimator="logits"):
    top = model.predict_topk(features, k, estimator=estimator)
    return top.scores, hits(top.labels, labels)


@pytest.mark.parametrize(("k", "estimator", "repetitions"), [(None, "logits", None), (7, "mean", [0, 2])])
def test_it_is_what_one_gets_by_hand(run, tiny, k, estimator, repetitions):
    done = []
    found = calibrate(
        run, tiny, k=k, estimator=estimator, repetitions=repetitions, precisions=[0.3, 0.6], progress=lambda *n: done.append(n)
    )
    assert done == [(N_DEV, N_DEV)]
    model = load(run) if repetitions is None else load(run).select(repetitions)
    dev = tiny.split("dev")
    scores, right = asked(model, dev.features, dev.labels, k or K, estimator)
    x, p = fit(scores, right)
    assert np.array_equal(found.knot_scores, x) and np.array_equal(found.knot_probabilities, p)
    expected = {"split": "dev", "n_samples": N_DEV, "k": k or K, "data": tiny.fingerprint, "scores": scores_key(model, estimator)}
    assert {name: found.of[name] for name in expected} == expected
    for name, probabilities in (("before", naive(scores, estimator, len(model.repetitions))), ("after", halves(scores, right))):
        for depth in (1, 5, k or K):
            reliability = Reliability()
            reliability.update(probabilities[:, :depth], right[:, :depth])
            assert found.measured[name][f"ECE@{depth}"] == pytest.approx(reliability.ece(), abs=1e-12)
            assert found.measured[name][f"Brier@{depth}"] == pytest.approx(reliability.brier(), abs=1e-12)
        assert sum(n for n, _, _ in found.measured[name]["bins"]) == right.size
    for threshold, wanted in zip(found.thresholds, (0.3, 0.6), strict=True):
        (by_hand,) = thresholds_for(scores, right, dev.labels.nnz, [wanted])
        assert (threshold.score, threshold.recall, threshold.coverage) == (by_hand.score, by_hand.recall, by_hand.coverage)
        kept = n_right = 0
        for half in (0, 1):
            (own,) = thresholds_for(scores[half::2], right[half::2], 1, [wanted])
            is_kept = scores[1 - half :: 2] >= (math.inf if own.score is None else own.score)
            kept, n_right = kept + is_kept.sum(), n_right + right[1 - half :: 2][is_kept].sum()
        assert threshold.held_out == pytest.approx(n_right / kept)
    assert fingerprint(load_calibration(run, model, estimator=estimator)) == fingerprint(found)


def halves(scores, right):
    """Judge each half of the samples by the other half's map."""
    probabilities = np.empty(scores.shape)
    for half in (0, 1):
        x, p = fit(scores[half::2], right[half::2])
        probabilities[1 - half :: 2] = Calibration(knot_scores=x, knot_probabilities=p).probabilities(scores[1 - half :: 2])
    return probabilities


def test_a_planted_map_is_found():
    """Labels right with the probability of the square of the sigmoid of their score: a map that no slope and shift is."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.normal(0, 3, (4000, 10)).astype(np.float32), axis=1)[:, ::-1]
    truth = naive(scores, "logits", 1) ** 2
    found = Found(scores, rng.random(scores.shape) < truth, np.full(4000, 3))
    calibration = fit_found(found, [0.8], naive(scores, "logits", 1))
    assert np.abs(calibration.probabilities(scores) - truth).mean() < 0.02
    assert calibration.measured["after"]["ECE@10"] < 0.01 < 0.1 < calibration.measured["before"]["ECE@10"]
    assert calibration.thresholds[0].held_out == pytest.approx(0.8, abs=0.02)
    kept = truth[scores >= calibration.thresholds[0].score]
    assert kept.mean() == pytest.approx(0.8, abs=0.02)


def test_held_out_samples_are_those_that_no_step_saw(held):
    dataset, run = held
    found = calibrate(run, dataset, split="validation", k=5)
    assert (found.of["split"], found.of["n_samples"]) == ("validation", 50)
    rows, split = np.sort(order_of(200, 0, -1)[:50]), dataset.split("train")
    scores, right = asked(load(run), take(split.features, rows), take_rows(split.labels, rows), 5)
    assert np.array_equal(found.knot_scores, fit(scores, right)[0])


def test_many_samples_are_thinned_out_evenly_and_taken_in_blocks(run, tiny, monkeypatch):
    whole = calibrate(run, tiny, k=5)
    monkeypatch.setattr(calibrating, "BLOCK_ROWS", 7)
    assert np.allclose(calibrate(run, tiny, k=5).knot_probabilities, whole.knot_probabilities)
    monkeypatch.setattr(calibrating, "MAX_PAIRS", 100)
    asked_rows, real = [], Model.predict_topk
    monkeypatch.setattr(Model, "predict_topk", lambda self, X, k, **how: (asked_rows.append(len(X)), real(self, X, k, **how))[1])
    found = calibrate(run, tiny, k=5)
    assert (found.of["n_samples"], asked_rows) == (20, [7, 7, 6])
    dev = tiny.split("dev")
    every_other = np.arange(0, 40, 2)
    scores, right = asked(load(run), take(dev.features, every_other), take_rows(dev.labels, every_other), 5)
    assert found.knot_scores == pytest.approx(fit(scores, right)[0], abs=1e-5)


def test_unreachable_precisions_are_kept_as_such(run, tiny):
    shuffled = tiny.split("dev").labels
    rng = np.random.default_rng(0)
    wrong = Found(np.zeros((10, 3), np.float32), rng.random((10, 3)) < 0.3, np.diff(shuffled.indptr[:11]))
    (found,) = fit_found(wrong, [0.9], np.full((10, 3), 0.5)).thresholds
    assert (found.score, found.held_out) == (None, None)


def test_what_it_was_trained_on_is_refused(run, tiny, held, tmp_path):
    with pytest.raises(
        DataError, match=r"was trained on its split 'train', .* too sure; calibrate on another split, or on samples"
    ):
        calibrate(run, tiny, split="train")
    dataset, held_run = held
    with pytest.raises(
        DataError, match=r"has no split 'dev' to calibrate on; there are: train, test; prepare it with --dev FILE, or"
    ):
        calibrate(held_run, dataset)
    with pytest.raises(DataError, match=r"held no samples out of its train split; calibrate on that, --split dev"):
        calibrate(run, tiny, split="validation")
    train(CONFIG, dataset, tmp_path / "all")
    with pytest.raises(DataError, match=r"held no samples out of its train split; train with --validation 0\.1"):
        calibrate(tmp_path / "all", dataset, split="validation")
    with pytest.raises(DataError, match=r"is not the data set that .* held samples out of; give that, or another split"):
        calibrate(held_run, tiny, split="validation")
    assert calibrate(held_run, tiny, split="train", k=3).of["n_samples"] == 200  # of another data set: who knows


def test_bad_input_is_named_and_leaves_no_file(tiny, tmp_path):
    run = tmp_path / "run"
    train(CONFIG.replace(epochs=1), tiny, run)
    for precision in (0.0, 1.01, math.nan):
        with pytest.raises(ConfigError, match=r"precision=.* must lie in \(0, 1\]"):
            calibrate(run, tiny, precisions=[0.5, precision])
    with pytest.raises(ConfigError, match=r"k=41 must lie in \[1, 40\]"):
        calibrate(run, tiny, k=41)
    one = sp.csr_array(np.eye(1, 50)), sp.csr_array(np.eye(1, 40))
    short = write_dataset(tmp_path / "short", {"train": one, "dev": one})
    with pytest.raises(DataError, match="split 'dev' has 1 samples to calibrate on; some hundreds are needed"):
        calibrate(run, short)
    other = sp.csr_array(np.eye(3, 9)), sp.csr_array(np.eye(3, 4))
    with pytest.raises(DataError, match="has 9 features and 4 labels, the model was trained on 50 and 40"):
        calibrate(run, write_dataset(tmp_path / "other", {"train": other, "dev": other}))
    with pytest.raises(ModelError, match="is not calibrated"):
        read_calibration(run)
