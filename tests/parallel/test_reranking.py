"""The second stage as a part of training: fitted when all repetitions are there, kept, used, gone on with, refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from mach import Config, load, train
from mach.decoding.rerank import DEFAULT_WEIGHT, add_prototypes, best_mix, fit_prototypes
from mach.errors import ConfigError, ModelError, Stopped
from mach.inspect.ask import ask
from mach.metrics import hits
from mach.parallel import offline, predict
from mach.parallel import rerank as rerank_module
from mach.parallel.rerank import rerank
from mach.store import Run
from mach.store.calibration import scores_key
from mach.store.predictions import read_facts, read_predictions
from mach.train.loop import held_out_rows

CONFIG = Config(buckets=13, repetitions=3, hidden=8, epochs=2, batch_size=50, rerank=6)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(CONFIG, tiny, path)
    return Run.open(path)


def record_of(path):
    return json.loads((path / "reranker.json").read_text())


def test_training_fits_it_once_all_repetitions_are_there(tiny, tmp_path, run):
    train(CONFIG, tiny, tmp_path / "run", repetitions=[0, 2])
    assert not (tmp_path / "run" / "reranker.json").exists()
    model = train(CONFIG, tiny, tmp_path / "run", repetitions=[1])
    assert model.reranker is not None and len(model.repetitions) == 1
    assert not (tmp_path / "run" / "shortlists.parquet").exists()
    record = record_of(run.path)
    assert (record["depth"], record["weight_from"], record["repetitions"]) == (6, "dev", [0, 1, 2])
    assert record["listed"] == 6 + int(np.ceil(run.sizes.labels_a_sample))
    before = (run.path / "reranker.safetensors").stat().st_mtime_ns
    train(CONFIG, tiny, run.path)
    assert (run.path / "reranker.safetensors").stat().st_mtime_ns == before


def test_it_orders_the_first_labels_anew_and_no_others(tiny, run):
    X, model, plain = tiny.split("test").features, load(run.path), load(run.path, rerank=False)
    found, decoded = model.predict_topk(X, 20), plain.predict_topk(X, 20)
    expected = model.reranker.rerank(X, decoded, 20, 3)
    assert np.array_equal(found.labels, expected.labels) and np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.labels[:, 6:], decoded.labels[:, 6:]) and not np.array_equal(found.labels, decoded.labels)
    assert np.array_equal(model.predict_topk(X, 2).labels, found.labels[:, :2])  # six are decoded for two
    assert np.array_equal(model.predict_topk(X, 5, estimator="min").scores, plain.predict_topk(X, 5, estimator="min").scores)
    only = model.predict_topk(X, 3, restrict=[1, 5, 7], exclude=[[]] * len(X))
    assert {1, 5, 7} == set(only.labels.ravel())


def test_prediction_files_say_which_second_stage_they_had(tiny, run, tmp_path):
    for name, how in (("with", {}), ("without", {"rerank": False}), ("two", {"workers": 2})):
        predict(run.path, tiny.path, tmp_path / name, k=5, **how)
    tables = {name: next(iter(read_predictions(tmp_path / name)))[1] for name in ("with", "without", "two")}
    X = tiny.split("test").features
    assert np.array_equal(tables["with"].labels, load(run.path).predict_topk(X, 5).labels)
    assert np.array_equal(tables["without"].labels, load(run.path, rerank=False).predict_topk(X, 5).labels)
    assert np.array_equal(tables["two"].labels, tables["with"].labels)
    assert read_facts(tmp_path / "with")["reranker"] == load(run.path).reranker.key
    assert "reranker" not in read_facts(tmp_path / "without")


def test_a_calibration_is_of_the_scores_of_both_stages(run):
    both, plain = load(run.path), load(run.path, rerank=False)
    assert scores_key(both, "logits") == scores_key(plain, "logits") | {"reranker": both.reranker.key}
    assert scores_key(both, "mean") == scores_key(plain, "mean")


def test_asking_gives_what_predicting_gives(tiny, tmp_path):
    model = train(CONFIG.replace(loss="softmax", epochs=1), tiny, tmp_path / "run")
    X = tiny.split("test").features
    answers = ask(tmp_path / "run", model, X, 5, estimator="logits")
    assert np.array_equal(answers.top.labels, model.predict_topk(X, 5).labels)
    assert not np.array_equal(answers.top.labels, model.predict_topk(X, 5, estimator="log-probs").labels)


def test_settings_in_place_of_the_runs(tiny, tmp_path):
    train(CONFIG.replace(rerank=0, epochs=1), tiny, tmp_path / "run")
    assert not (tmp_path / "run" / "reranker.json").exists()
    with pytest.raises(ConfigError, match="rerank=0: give the number of labels to order anew, such as --rerank 20"):
        rerank(tmp_path / "run", tiny)
    found = rerank(tmp_path / "run", tiny, settings={"rerank": 4, "rerank_weight": 0.25, "rerank_cost": 3.0})
    record = record_of(tmp_path / "run")
    assert (found.depth, found.weight, record["cost"], record["weight_from"]) == (4, 0.25, 3.0, "given")
    other = rerank(tmp_path / "run", tiny, settings={"rerank": 4, "rerank_weight": 0.25, "rerank_cost": 0.01})
    assert other.key != found.key  # and took the place of the first
    assert load(tmp_path / "run").reranker.key == other.key


def test_samples_held_out_are_not_fitted_on_and_tell_the_weight(tiny_without_dev, tmp_path, monkeypatch):
    seen, used = [], []
    real, prototypes = rerank_module.fit_reranker, rerank_module.fit_prototypes

    def fit(features, labels, shortlists, **how):
        seen.append(np.concatenate([rows for rows, _ in shortlists()]))
        return real(features, labels, shortlists, **how)

    monkeypatch.setattr(rerank_module, "fit_reranker", fit)
    monkeypatch.setattr(rerank_module, "fit_prototypes", lambda *given, **how: used.append(given[2]) or prototypes(*given, **how))
    config = CONFIG.replace(validation=0.2)
    train(config, tiny_without_dev, tmp_path / "held")
    held = held_out_rows(config, tiny_without_dev)
    assert len(held) == 40 and np.array_equal(np.sort(np.concatenate([seen[0], held])), np.arange(200))
    assert np.array_equal(np.flatnonzero(~used[0]), held)
    assert record_of(tmp_path / "held")["weight_from"] == "held out"
    train(CONFIG, tiny_without_dev, tmp_path / "none")
    record = record_of(tmp_path / "none")
    assert (record["weight"], record["weight_from"], len(seen[-1])) == (DEFAULT_WEIGHT, "default", 200)


def test_the_best_cost_weight_and_prototype_are_taken_where_samples_can_tell(tiny, tiny_without_dev, tmp_path, monkeypatch):
    fitted, real = {}, rerank_module.fit_reranker

    def fit(*given, cost, **how):
        fitted[cost] = real(*given, cost=cost, **how)
        return fitted[cost]

    monkeypatch.setattr(rerank_module, "fit_reranker", fit)
    found = train(CONFIG, tiny, tmp_path / "run").reranker
    assert list(fitted) == [0.2, 1.0]
    dev, model, split = tiny.split("dev"), load(tmp_path / "run", rerank=False), tiny.split("train")
    top = model.predict_topk(dev.features, 6)
    right, n_true = hits(top.labels, dev.labels).astype(bool), np.diff(dev.labels.indptr)
    prototypes = fit_prototypes(split.features, split.labels, np.ones(split.n_samples, bool), depth=6)
    *margins, likeness = (each.margins(dev.features, top.labels) for each in (*fitted.values(), prototypes))
    mix = best_mix(top.scores / 3, margins, likeness, right, n_true)
    record, cost = record_of(tmp_path / "run"), (0.2, 1.0)[mix.which]
    assert (record["cost"], record["weight"], record["prototype"]) == (cost, mix.weight, mix.prototype)
    assert mix.prototype  # of this data set
    assert found.key == dataclasses.replace(add_prototypes(fitted[cost], prototypes, mix.prototype), weight=mix.weight).key
    fitted.clear()
    train(CONFIG, tiny_without_dev, tmp_path / "none")
    assert list(fitted) == [0.2]


def test_what_was_stopped_goes_on(tiny, tmp_path, monkeypatch, run):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(rerank_module, "fit_reranker", killed)
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, tiny, tmp_path / "run")
    assert (tmp_path / "run" / "shortlists.parquet").exists()
    monkeypatch.undo()
    monkeypatch.setattr(offline, "write_parts", killed)  # the shortlists are there
    train(CONFIG, tiny, tmp_path / "run", resume=True)
    assert load(tmp_path / "run").reranker.key == load(run.path).reranker.key


def test_shortlists_of_other_repetitions_are_made_again(tiny, tmp_path, run):
    part = tmp_path / "run"
    train(CONFIG.replace(repetitions=2, rerank=6), tiny, part)
    predict(part, tiny.path, part / "shortlists.parquet", split="train", k=record_of(part)["listed"], rerank=False)
    for name in ("reranker.json", "reranker.safetensors"):
        (part / name).unlink()
    assert train(CONFIG, tiny, part).reranker.key == load(run.path).reranker.key


def test_a_request_to_stop_is_heard_between_blocks(tiny, tmp_path, monkeypatch):
    real, asked = rerank_module.fit_reranker, []

    def fit(*given, progress, **how):
        def told(done, total):
            asked.append(done)
            if done == 1:
                next((tmp_path / "run").glob(".stop*"), tmp_path / "run" / "x").write_text("SIGTERM")
                monkeypatch.setattr(rerank_module.Stop, "asked", True)
            progress(done, total)

        return real(*given, progress=told, pairs=1, **how)

    monkeypatch.setattr(rerank_module, "fit_reranker", fit)
    with pytest.raises(Stopped, match="stopped while the re-ranker was fitted"):
        train(CONFIG, tiny, tmp_path / "run")
    assert asked == [1]


def test_trouble_is_named(tiny, tiny_without_dev, tmp_path, run):
    copy = tmp_path / "run"
    train(CONFIG, tiny, copy)
    weights, record = copy / "reranker.safetensors", copy / "reranker.json"
    assert Run.open(copy).verify() == []
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert Run.open(copy).verify() == ["the re-ranker has changed: reranker.safetensors does not match its checksum"]
    weights.write_bytes(good[:-1])
    with pytest.raises(ModelError, match=r"is cut short or changed: .* fit it again with `mach rerank`, or delete it"):
        load(copy)
    assert load(copy, skip_broken=True).reranker is None
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy)
    text = record.read_text()
    record.write_text(text.replace('"depth": 6', '"depth": 7'))
    with pytest.raises(ModelError, match="does not match its own checksum"):
        load(copy)
    record.write_text("{")
    with pytest.raises(ModelError, match="is broken"):
        load(copy)
    train(CONFIG.replace(seed=1), tiny, tmp_path / "other")
    for name in ("reranker.json", "reranker.safetensors"):
        (copy / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ModelError, match="is of another run"):
        load(copy)
    with pytest.raises(ModelError, match="was trained on another data set"):
        rerank(run.path, tiny_without_dev)


def test_dense_features_and_the_full_head_have_none_by_default(tiny, tiny_dense, tmp_path):
    assert train(CONFIG.replace(rerank="auto"), tiny_dense).reranker is None
    assert train(Config(table="identity", hidden=8, epochs=1), tiny).reranker is None
    with pytest.raises(ConfigError, match="rerank=6 must be 0 or 'auto' over dense features"):
        train(CONFIG, tiny_dense, tmp_path / "dense")
    model = train(Config(table="identity", hidden=8, epochs=1, rerank=5), tiny)
    assert model.reranker.depth == 5
    X = tiny.split("test").features
    decoded = dataclasses.replace(model, reranker=None).predict_topk(X, 5)
    assert np.array_equal(model.predict_topk(X, 3).labels, model.reranker.rerank(X, decoded, 3, 1).labels)
