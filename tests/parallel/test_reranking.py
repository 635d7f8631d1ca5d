"""The second stage as a part of training: fitted when all repetitions are there, kept, used, gone on with, refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import scipy.sparse as sp

from mach import Config, load, train
from mach.data import CSR
from mach.decoding import TopK
from mach.decoding.rerank import (
    DEFAULT_WEIGHT,
    N_OPINIONS,
    Evidence,
    Neighbours,
    Opinions,
    Reranker,
    SparseWeights,
    best_of,
    fit_prototypes,
    look_around,
)
from mach.errors import ConfigError, ModelError, Stopped
from mach.inspect.ask import ask
from mach.kernels import bits_of
from mach.parallel import judge as judge_module
from mach.parallel import offline, predict
from mach.parallel import rerank as rerank_module
from mach.parallel.judge import Heard, Judge
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
    assert (record["depth"], record["chosen_on"], record["repetitions"]) == (6, "dev", [0, 1, 2])
    assert record["listed"] == 6 + int(np.ceil(run.sizes.labels_a_sample))
    before = (run.path / "reranker.safetensors").stat().st_mtime_ns
    train(CONFIG, tiny, run.path)
    assert (run.path / "reranker.safetensors").stat().st_mtime_ns == before


def test_it_orders_the_first_labels_anew(tiny, run):
    X, model, plain = tiny.split("test").features, load(run.path), load(run.path, rerank=False)
    found, decoded = model.predict_topk(X, 20), plain.predict_topk(X, 20)
    expected = model.reranker.rerank(X, decoded, 20, 3)
    assert np.array_equal(found.labels, expected.labels) and np.array_equal(found.scores, expected.scores)
    assert not np.array_equal(found.labels, decoded.labels)
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
    assert (found.depth, found.weight, record["cost"], found.opinions) == (4, 0.25, 3.0, None)
    assert (record["order"], record["near"]) == ("logit + 0.25 margin", 0)
    other = rerank(tmp_path / "run", tiny, settings={"rerank": 4, "rerank_weight": 0.25, "rerank_cost": 0.01})
    assert other.key != found.key  # and took the place of the first
    assert load(tmp_path / "run").reranker.key == other.key


def test_samples_held_out_are_not_fitted_on_and_choose(tiny_without_dev, tmp_path, monkeypatch):
    seen, used = [], []
    real, prototypes = rerank_module.fit_margins, rerank_module.fit_prototypes

    def fit(features, labels, shortlists, **how):
        seen.append(np.concatenate([rows for rows, _ in shortlists()]))
        return real(features, labels, shortlists, **how)

    monkeypatch.setattr(rerank_module, "fit_margins", fit)
    monkeypatch.setattr(rerank_module, "fit_prototypes", lambda *given: used.append(given[2]) or prototypes(*given))
    config = CONFIG.replace(validation=0.2)
    train(config, tiny_without_dev, tmp_path / "held")
    held = held_out_rows(config, tiny_without_dev)
    assert len(held) == 40 and np.array_equal(np.sort(np.concatenate([seen[0], held])), np.arange(200))
    assert np.array_equal(np.flatnonzero(~used[0]), held)
    assert record_of(tmp_path / "held")["chosen_on"] == "held out"
    none = train(CONFIG, tiny_without_dev, tmp_path / "none").reranker
    record = record_of(tmp_path / "none")
    assert (none.weight, none.opinions, record["chosen_on"], len(seen[-1])) == (DEFAULT_WEIGHT, None, "nothing", 200)
    assert (record["cost"], len(seen), len(used)) == (0.2, 2, 1)


def test_the_best_of_sums_and_networks_is_taken_where_samples_can_tell(tiny, tmp_path, monkeypatch):
    fits, real = [], rerank_module.fit_margins
    monkeypatch.setattr(rerank_module, "fit_margins", lambda *given, **how: fits.extend(real(*given, **how)) or fits)
    found = train(CONFIG, tiny, tmp_path / "run").reranker
    assert len(fits) == 2  # a cost each
    dev, model, split = tiny.split("dev"), load(tmp_path / "run", rerank=False), tiny.split("train")
    every = split.features, split.labels, np.ones(split.n_samples, bool)
    top = model.predict_topk(dev.features, 12)
    judge = Judge("dev", dev.features, dev.labels, TopK(top.labels, top.scores / np.float32(3)), 6)
    heard = judge.hear(Evidence(*fit_prototypes(*every), Neighbours.of(*every)))
    choice = judge.best(fits, DEFAULT_WEIGHT, heard)
    opinions = None if choice.network is None else Opinions(heard.evidence, choice.network, heard.near.shape[1])
    assert found.key == Reranker(fits[choice.which], 6, choice.weight, opinions).key
    assert record_of(tmp_path / "run")["cost"] == (0.2, 1.0)[choice.which]


def planted_judge(right_of, n: int = 400) -> tuple[Judge, list[SparseWeights], Heard]:
    """Make samples of one feature each, whose ten labels have random logits, and are right where `right_of` says so."""
    rng = np.random.default_rng(0)
    F, K, depth = 40, 60, 10
    W, P = rng.normal(size=(2, K, F)).astype(np.float32)
    own = rng.integers(0, F, n)
    features = CSR.from_scipy(sp.csr_array((np.ones(n, np.float32), (np.arange(n), own)), shape=(n, F)))
    labels = np.stack([rng.permutation(K)[: 2 * depth] for _ in range(n)])
    logits = -np.sort(-rng.normal(size=labels.shape), axis=1).astype(np.float32)
    told = [np.take_along_axis(each[:, own].T, labels, 1) for each in (W, P)]
    right = right_of(logits, *told) & (np.arange(2 * depth) < depth)
    truth = sp.csr_array((np.ones(right.sum(), np.float32), (np.nonzero(right)[0], labels[right])), shape=(n, K))
    judge = Judge("dev", features, CSR.from_scipy(truth, with_values=False), TopK(labels, logits), depth)
    margins, prototypes = (plain(each) for each in (W, P))
    evidence = Evidence(prototypes, np.ones(K, np.int32), None)
    return judge, [plain(rng.normal(size=(K, F))), margins], judge.hear(evidence)


def plain(W: np.ndarray) -> SparseWeights:
    rows = sp.csr_array(W.astype(np.float32))
    bits = np.array([bits_of(x) for x in rows.data], np.uint16)
    return SparseWeights(
        rows.indptr.astype(np.int64), rows.indices.astype(np.int32), bits, np.zeros(len(W), np.float32), W.shape[1]
    )


def test_what_is_chosen_is_what_tells_right_labels():
    few = judge_module.NETWORKS_FROM - 1
    judge, fits, heard = planted_judge(lambda logits, m, p: logits + 3 * m > 4, few)
    assert heard.near.shape == (few, 0)
    choice = judge.best(fits, 1.5, heard)
    assert choice.which == 1 and choice.network is None and choice.order in ("logit + 1.5 margin", "logit + 3 margin")
    assert judge.best(fits, 0.75, None) == (1, 0.75, None)  # no others than the given weight
    judge, fits, heard = planted_judge(lambda logits, m, p: logits + 3 * (m + 2 * p) > 12, few)
    choice = judge.best(fits, 1.5, heard)
    assert choice.which == 1 and choice.network.skip.tolist() == [[1, 3, 6, *[0] * (N_OPINIONS - 3)]]
    assert choice.order == "logit + 3 margin + 6 likeness"
    judge, fits, heard = planted_judge(lambda logits, m, p: (m > 0.5) & (p < 1))  # too alike is wrong, which no sum can say
    choice = judge.best(fits, 1.5, heard)
    assert choice.which == 1 and choice.network.first.shape == (8, N_OPINIONS, 32) and choice.order == "networks"


def test_what_neighbours_say_is_heard():
    rng, judge = np.random.default_rng(5), planted_judge(lambda logits, m, p: m > 9)[0]
    labels = judge.top.labels
    own = [*judge.features.indices, *rng.integers(0, 40, 400)]  # a training sample with the feature of each, and as many more
    features = CSR.from_scipy(sp.csr_array((np.ones(800, np.float32), (np.arange(800), own)), shape=(800, 40)))
    train_labels = rng.integers(0, 60, 800)
    of_feature = {f: {int(k) for k, g in zip(train_labels, own, strict=True) if f == g} for f in range(40)}
    right = np.array([[int(k) in of_feature[f] for k in row] for f, row in zip(judge.features.indices, labels, strict=True)])
    right[:, judge.depth :] = False
    truth = sp.csr_array((np.ones(right.sum(), np.float32), (np.nonzero(right)[0], labels[right])), shape=(400, 60))
    judge = dataclasses.replace(judge, truth=CSR.from_scipy(truth, with_values=False))
    of_train = CSR.from_scipy(sp.csr_array((np.ones(800), (np.arange(800), train_labels)), shape=(800, 60)), with_values=False)
    nothing = plain(np.zeros((60, 40)))
    neighbours = Neighbours.of(features, of_train, np.ones(800, bool))
    heard, deaf = (judge.hear(Evidence(nothing, np.ones(60, np.int32), each)) for each in (neighbours, None))
    assert judge.best([nothing], 1.5, heard).order == "networks"
    gained, deaf_gained = (max(each.mean() for _, each in judge.tried([nothing], 1.5, how)) for how in (heard, deaf))
    assert gained > 1.5 * deaf_gained  # nothing else tells right labels


def test_near_labels_are_candidates_if_they_hold_more_right_ones_than_the_next_of_decoding():
    judge = planted_judge(lambda logits, m, p: m > 0)[0]
    rng = np.random.default_rng(6)
    every = CSR.from_scipy(sp.csr_array(rng.random((300, 40)) < 0.3).astype(np.float32))
    labels = CSR.from_scipy(sp.csr_array(rng.random((300, 60)) < 0.1), with_values=False)
    evidence = Evidence(plain(np.zeros((60, 40))), np.ones(60, np.int32), Neighbours.of(every, labels, np.ones(300, bool)))
    assert judge.hear(evidence).near.shape == (400, 0)  # all that is right is decoded
    around = evidence.neighbours.find(judge.features)
    found = evidence.neighbours.near(around, 10, judge.top.labels[:, :10])
    truth = sp.csr_array((np.ones(400, np.float32), (np.arange(400), found[:, 3])), shape=(400, 60))
    lucky = dataclasses.replace(judge, truth=CSR.from_scipy(truth, with_values=False))
    assert np.array_equal(lucky.hear(evidence).near, found)


def test_near_labels_are_fitted_against_and_found(tiny, tmp_path, monkeypatch):
    def hear(self, evidence: Evidence) -> Heard:  # whatever they hold
        return Heard(evidence, *look_around(self.features, self.top.labels[:, : self.depth], evidence, self.depth))

    monkeypatch.setattr(Judge, "hear", hear)
    listed, real = [], rerank_module.fit_margins

    def fit(features, labels, shortlists, **how):
        listed.append(np.concatenate([found for _, found in shortlists()]))
        return real(features, labels, shortlists, **how)

    monkeypatch.setattr(rerank_module, "fit_margins", fit)
    read, find = [], Neighbours.find
    monkeypatch.setattr(Neighbours, "find", lambda *given, **how: read.append(how.get("entries")) or find(*given, **how))
    train(CONFIG, tiny, tmp_path / "run")
    assert set(read) == {rerank_module.NEAR_ENTRIES, None}  # of training samples, and of those that judge
    record, n = record_of(tmp_path / "run"), record_of(tmp_path / "run")["listed"]
    assert listed[0].shape == (200, 2 * n) and not (tmp_path / "run" / "near.tmp").exists()
    assert all(len(set(row) - {-1}) == (row >= 0).sum() for row in listed[0].tolist() for row in [np.array(row)])
    model, X = load(tmp_path / "run"), tiny.split("test").features
    assert record["near"] == 6 and model.reranker.opinions.n_near == 6
    found, decoded = model.predict_topk(X, 20), load(tmp_path / "run", rerank=False).predict_topk(X, 20)
    assert any(set(a[:6]) - set(b[:6]) for a, b in zip(found.labels.tolist(), decoded.labels.tolist(), strict=True))
    assert all(len(set(row)) == 20 for row in found.labels.tolist())
    without = [row[:3] for row in found.labels]  # what was found is not found when it is not allowed
    again = model.predict_topk(X, 5, exclude=without, restrict=np.arange(5, 40))
    assert not any(set(a) & set(b) or min(a) < 5 for a, b in zip(again.labels.tolist(), map(list, without), strict=True))


def test_what_was_stopped_goes_on(tiny, tmp_path, monkeypatch, run):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(rerank_module, "fit_margins", killed)
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
    real, asked = rerank_module.fit_margins, []

    def fit(*given, progress, **how):
        def told(done, total):
            asked.append(done)
            if done == 1:
                next((tmp_path / "run").glob(".stop*"), tmp_path / "run" / "x").write_text("SIGTERM")
                monkeypatch.setattr(rerank_module.Stop, "asked", True)
            progress(done, total)

        return real(*given, progress=told, pairs=1, **how)

    monkeypatch.setattr(rerank_module, "fit_margins", fit)
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


def test_a_full_head_has_a_second_stage_and_dense_features_have_none(tiny, tiny_dense, tmp_path):
    assert train(CONFIG.replace(rerank="auto"), tiny_dense).reranker is None
    assert train(Config(table="identity", hidden=8, epochs=1), tiny).reranker.depth == 20
    with pytest.raises(ConfigError, match="rerank=6 must be 0 or 'auto' over dense features"):
        train(CONFIG, tiny_dense, tmp_path / "dense")
    model = train(Config(table="identity", hidden=8, epochs=1, rerank=5), tiny)
    assert model.reranker.depth == 5
    X = tiny.split("test").features
    decoded = dataclasses.replace(model, reranker=None).predict_topk(X, 5)
    assert np.array_equal(model.predict_topk(X, 3).labels, model.reranker.rerank(X, decoded, 3, 1).labels)


def test_networks_come_first_where_samples_are_enough_to_train_them():
    least = judge_module.NETWORKS_FROM
    judge, fits, heard = planted_judge(lambda logits, m, p: logits + 3 * m > 4, least)
    tried = judge.tried(fits, 1.5, heard)
    assert len(tried) == 2 + 2 + 2 * 7 * 5
    assert [(choice.order, choice.which) for choice, _ in tried[:3]] == [
        ("networks", 1),
        ("networks", 0),
        ("logit + 1.5 margin", 0),
    ]
    assert tried[0][1].mean() > tried[1][1].mean()
    networks, best_sum = tried[0], max(tried[2:], key=lambda each: each[1].mean())
    choice = judge.best(fits, 1.5, heard)  # a sum tells all that is right; networks are hardly behind
    assert choice.order == (networks[0].order if best_of([networks[1], best_sum[1]]) == 0 else best_sum[0].order)
    judge, fits, heard = planted_judge(lambda logits, m, p: logits + 3 * m > 4, least - 1)
    assert len(judge.tried(fits, 1.5, heard)) == 2 + 2 * 7 * 5
