"""A prediction file measured chunk by chunk gives what the metrics give in one piece, and files of other data are refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from mach import metrics
from mach.calibration import Calibration, Threshold
from mach.compare.evaluate import evaluate, evaluator_for
from mach.config import Config
from mach.data import write_dataset
from mach.errors import ConfigError, DataError
from mach.parallel import train
from mach.reliability import Reliability
from mach.store import load, predictions
from mach.store.calibration import Trust, scores_key
from mach.store.predictions import read_predictions, write_predictions


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    """Predictions of 12 labels for the test split, in row groups of 25."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = train(Config(buckets=13, repetitions=2, hidden=8, epochs=2, batch_size=50), tiny, folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "GROUP_ROWS", 25)
        write_predictions(model, tiny, "test", folder / "p.parquet", k=12, estimator="mean", run_key="cafe")
    return folder / "p.parquet"


@pytest.mark.parametrize("propensity", ["amazon", "wikipedia", "other"])
def test_it_equals_the_metrics_of_the_whole(file, tiny, propensity):
    _, tops = zip(*read_predictions(file), strict=True)
    assert len(tops) == 3
    labels, scores = np.concatenate([t.labels for t in tops]), np.concatenate([t.scores for t in tops])
    truth, train_labels = tiny.split("test").labels, tiny.split("train").labels
    counts = np.bincount(train_labels.indices, minlength=40)
    weights = metrics.propensities(counts, len(train_labels), *metrics.PROPENSITY_AB[propensity])
    expected = {"R@10": metrics.recall_at_k(labels, truth, 10), "MAP": metrics.mean_average_precision(labels, truth)}
    for k in (1, 3, 5):
        expected[f"P@{k}"] = metrics.precision_at_k(labels, truth, k)
        expected[f"nDCG@{k}"] = metrics.ndcg_at_k(labels, truth, k)
        expected[f"PSP@{k}"] = metrics.psp_at_k(labels, truth, weights, k)
        expected[f"PSnDCG@{k}"] = metrics.psndcg_at_k(labels, truth, weights, k)
    found = evaluate(file, tiny, "test", propensity=propensity)
    assert found == pytest.approx(expected, abs=1e-12)
    micro, macro = metrics.micro_macro_f1(labels, scores, truth, threshold=0.1, n_labels=40)
    assert 0 < micro < 1
    with_f1 = evaluate(file, tiny, "test", propensity=propensity, threshold=0.1)
    assert with_f1 == pytest.approx(expected | {"micro-F1": micro, "macro-F1": macro}, abs=1e-12)


@pytest.mark.parametrize("wanted", [{}, {"precision": 0.9}])
def test_probabilities_are_measured(file, tiny, tmp_path, wanted):
    model = load(file.parent / "run")
    calibration = Calibration(
        knot_scores=np.array([-3.6, -2.6]),
        knot_probabilities=np.array([0.1, 0.9]),
        thresholds=(Threshold(wanted=0.9, score=-3.2),),
        of={"scores": scores_key(model, "logits")},
    )
    job = {"k": 12, "estimator": "logits", "run_key": "cafe", "choice": predictions.Choice()}
    parts = predictions.plan(model, tiny, "test", tmp_path / "p", **job, trust=Trust(calibration, **wanted))
    with parts.open():
        list(predictions.write_parts(model, tiny.split("test"), parts, parts.left(), job["choice"]))
    found, truth = evaluate(tmp_path / "p", tiny, "test"), tiny.split("test").labels
    top = model.predict_topk(tiny.split("test").features, 12)
    is_kept, right = top.scores >= (np.float32(-3.2) if wanted else -np.inf), metrics.hits(top.labels, truth)
    expected = {}
    for k in (1, 5):
        reliability = Reliability()
        head = is_kept[:, :k]
        reliability.update(calibration.probabilities(top.scores[:, :k])[head], right[:, :k][head])
        expected |= {f"ECE@{k}": reliability.ece(), f"Brier@{k}": reliability.brier()}
    if wanted:
        assert 0 < is_kept.sum() < is_kept.size
        n_right = (is_kept & right).sum()
        expected |= {"precision": n_right / is_kept.sum(), "recall": n_right / truth.nnz, "coverage": is_kept.any(1).mean()}
    labels = np.where(is_kept, top.labels, -1)
    expected |= {"P@5": metrics.precision_at_k(labels, truth, 5), "R@10": metrics.recall_at_k(labels, truth, 10)}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert ("precision" in found) == bool(wanted)


def test_a_file_that_keeps_nothing_is_measured(file, tiny, tmp_path):
    model = load(file.parent / "run")
    calibration = Calibration(
        knot_scores=np.zeros(1), knot_probabilities=np.full(1, 0.5), of={"scores": scores_key(model, "logits")}
    )
    job = {"k": 12, "estimator": "logits", "run_key": "cafe", "choice": predictions.Choice()}
    parts = predictions.plan(model, tiny, "test", tmp_path / "p", **job, trust=Trust(calibration, min_probability=0.6))
    with parts.open():
        list(predictions.write_parts(model, tiny.split("test"), parts, parts.left(), job["choice"]))
    found = evaluate(tmp_path / "p", tiny, "test")
    assert (found["P@1"], found["precision"], found["recall"], found["coverage"]) == (0, 0, 0, 0) and "ECE@1" not in found


def test_files_of_other_data_or_another_split_are_refused(file, tiny, tmp_path):
    data = {"train": (sp.csr_array(np.eye(5, 50)), sp.csr_array(np.eye(5, 40)))}
    other = write_dataset(tmp_path / "other", data | {"test": data["train"]})
    with pytest.raises(DataError, match=rf"is of data {tiny.fingerprint}, not of {other.fingerprint}; predict this split first"):
        evaluate(file, other, "test")
    with pytest.raises(DataError, match=r"p\.parquet: is of split test, not of dev"):
        evaluate(file, tiny, "dev")


def test_an_unknown_propensity_names_the_nearest(file, tiny):
    words = r"propensity='wikipdia' must be one of amazon, wikipedia, other; did you mean 'wikipedia'\?"
    with pytest.raises(ConfigError, match=words):
        evaluate(file, tiny, "test", propensity="wikipdia")


@pytest.mark.parametrize(("n_samples", "has_them"), [(2, False), (3, True)])
def test_propensities_are_left_out_where_they_are_not_defined(tmp_path, n_samples, has_them):
    whole = sp.csr_array(np.eye(n_samples, 4))
    evaluator = evaluator_for(write_dataset(tmp_path / "data", {"train": (whole, whole)}))
    evaluator.update(np.array([[0]]), None, sp.csr_array(np.eye(1, 4)))
    assert ("PSP@1" in evaluator.result()) == has_them
