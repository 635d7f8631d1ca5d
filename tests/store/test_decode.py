"""Scores of several machines decoded together: the bits of `mach predict`, certificates that hold, mixes that are refused."""

from __future__ import annotations

import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import Config
from mach.data import write_dataset
from mach.decoding import decode_scores, decode_topk
from mach.decoding.estimators import bucket_scores
from mach.errors import ConfigError, DataError, ModelError
from mach.hashing import LabelTable
from mach.model import Model
from mach.parallel import train
from mach.parallel.offline import predict
from mach.store import Run, predictions, scores
from mach.store import decode as room
from mach.store.decode import are_known, decode, n_uncertified, upper_scores
from mach.store.predictions import read_facts, read_predictions
from mach.store.scores import kept_arrays, write_scores

N, K, B = 60, 40, 13
TRUNCATED = [(loss, e) for loss in ("logistic", "squared-hinge") for e in ("logits", "log-probs", "mean", "min", "median")]
TRUNCATED += [("softmax", "logits"), ("softmax", "log-probs")]


@pytest.fixture(scope="module", params=["logistic", "softmax"])
def run(request, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(
        Config(buckets=B, repetitions=3, hidden=8, epochs=2, batch_size=100, rerank=0, grouped=0, loss=request.param), tiny, path
    )
    return Run.open(path)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of 10 rows: six for the test split."""
    monkeypatch.setattr(predictions, "GROUP_ROWS", 10)


def score(run, data, *folders, n_shards=3, **options):
    """Score all repetitions and shards, each repetition into the next of the folders."""
    for r in range(run.manifest["repetitions"]):
        for i in range(n_shards):
            options = {"split": "test"} | options
            write_scores(run, data, folders[r % len(folders)], repetition=r, shard=(i, n_shards), **options)


def trained_again(run, path):
    """Give the run with other weights in repetition 1."""
    again = Run.open(shutil.copytree(run.path, path))
    parameters = again.load([1]).repetitions[0].repetition(0)
    parameters["head.bias"] += 1
    again.add(1, parameters, {"train_s": 1.0})
    return again


# Full scores


@pytest.mark.parametrize("estimator", ["logits", "log-probs", "mean", "min", "median"])
def test_it_writes_what_predict_writes(run, tiny, tmp_path, estimator):
    score(run, tiny, tmp_path / "a", tmp_path / "b")
    told = []
    job = {"k": 7, "estimator": estimator}
    assert decode([tmp_path / "a", tmp_path / "b"], tmp_path / "d", **job, progress=lambda *c: told.append(c)) == (N, 0)
    predict(run.path, tiny.path, tmp_path / "p", **job)
    assert (tmp_path / "d").read_bytes() == (tmp_path / "p").read_bytes()
    assert told == [(10 * i, N) for i in range(1, 7)]


def test_some_of_the_repetitions_and_a_choice_of_labels(run, tiny, tmp_path):
    score(run, tiny, tmp_path / "s")
    (tmp_path / "r").write_text("\n".join(map(str, range(0, K, 2))))
    (tmp_path / "e").write_text("".join(f"{i % K}, {i % 7}\n" for i in range(N)))
    job = {"k": 4, "repetitions": [0, 2], "restrict": tmp_path / "r", "exclude": tmp_path / "e"}
    decode([tmp_path / "s"], tmp_path / "d", **job)
    predict(run.path, tiny.path, tmp_path / "p", **job)
    assert (tmp_path / "d").read_bytes() == (tmp_path / "p").read_bytes()


def test_dense_features_and_the_full_head(tiny_dense, tmp_path):
    train(Config(table="identity", hidden=8, epochs=1, loss="softmax"), tiny_dense, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    score(run, tiny_dense, tmp_path / "s")
    decode([tmp_path / "s"], tmp_path / "d", k=5, estimator="mean")
    predict(run.path, tiny_dense.path, tmp_path / "p", k=5, estimator="mean")
    assert (tmp_path / "d").read_bytes() == (tmp_path / "p").read_bytes()
    score(run, tiny_dense, tmp_path / "t", top_buckets=5)
    assert decode([tmp_path / "t"], tmp_path / "dt", k=5) == (N, 0)  # of as many buckets, each its own label
    predict(run.path, tiny_dense.path, tmp_path / "p5", k=5)
    ours, theirs = pq.read_table(tmp_path / "dt"), pq.read_table(tmp_path / "p5")
    assert ours["labels"].equals(theirs["labels"]) and ours["scores"].equals(theirs["scores"])


def test_names_decide_buckets_and_can_be_asked_for(tiny, tmp_path):
    splits = {s: (tiny.split(s).features.to_scipy(), tiny.split(s).labels.to_scipy()) for s in ("train", "test")}
    data = write_dataset(tmp_path / "data", splits, label_names=[f"name {i}" for i in range(K)])
    train(Config(buckets=B, repetitions=2, hidden=8, epochs=1, family="xxhash", rerank=0), data, tmp_path / "run")
    score(Run.open(tmp_path / "run"), data, tmp_path / "s")
    (tmp_path / "r").write_text("name 3\nname 17\n9\n")
    decode([tmp_path / "s"], tmp_path / "d", k=2, restrict=tmp_path / "r")
    predict(tmp_path / "run", data.path, tmp_path / "p", k=2, restrict=tmp_path / "r")
    assert (tmp_path / "d").read_bytes() == (tmp_path / "p").read_bytes()
    (tmp_path / "s" / "label_names_blob.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"label_names_blob.npy: has changed; copy it from the run folder"):
        decode([tmp_path / "s"], tmp_path / "d")
    (tmp_path / "s" / "label_names_blob.npy").unlink()
    with pytest.raises(DataError, match=r"label_names_blob.npy: cannot be read .* copy it from the run folder"):
        decode([tmp_path / "s"], tmp_path / "d")


def test_a_killed_job_goes_on_where_it_was(run, tiny, tmp_path, monkeypatch):
    score(run, tiny, tmp_path / "s")
    decode([tmp_path / "s"], tmp_path / "whole", k=7)
    calls = []

    def dies(*args, real=decode_scores, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(room, "decode_scores", dies)
    with pytest.raises(KeyboardInterrupt):
        decode([tmp_path / "s"], tmp_path / "d", k=7)
    with pytest.raises(DataError, match=r"d.parts: holds finished parts of another job \(estimator=logits there, min now\)"):
        decode([tmp_path / "s"], tmp_path / "d", k=7, estimator="min")
    decode([tmp_path / "s"], tmp_path / "d", k=7)
    assert len(calls) == 4 + 3 and (tmp_path / "d").read_bytes() == (tmp_path / "whole").read_bytes()


# The best buckets only


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32), case=st.sampled_from(TRUNCATED), R=st.integers(1, 4), B=st.integers(3, 12), K=st.integers(12, 40),
    scale=st.sampled_from([0.5, 3.0, 40.0]), ties=st.booleans(), k=st.integers(1, 6), choose=st.booleans(),
)  # fmt: skip
def test_what_is_certified_is_the_full_answer(seed, case, R, B, K, scale, ties, k, choose):
    """To the bits, whatever estimator; from some repetitions in full and others cut, with ties, saturated and not."""
    (loss, estimator), rng, n = case, np.random.default_rng(seed), 8
    table = LabelTable.hashed(K, B, R, seed=seed % 97)
    outputs_NRB = rng.normal(scale=scale, size=(n, R, B)).astype(np.float32)
    outputs_NRB = np.round(outputs_NRB) if ties else outputs_NRB
    cut = [None if rng.random() < 0.2 else int(rng.integers(1, B)) for _ in range(R)]
    block = [kept_arrays(outputs_NRB[:, r].copy(), m, loss) for r, m in enumerate(cut)]
    only = {}
    if choose:
        only = {"restrict": rng.choice(K, 11, replace=False), "exclude": [rng.choice(K, rng.integers(0, 5)) for _ in range(n)]}
    upper_NRB, known_NRB = upper_scores(block, table, loss, estimator)
    exact_NRB = bucket_scores(outputs_NRB.copy(), loss=loss, estimator=estimator)
    assert (upper_NRB >= exact_NRB).all()
    if known_NRB is not None:
        assert np.array_equal(upper_NRB[known_NRB], exact_NRB[known_NRB])
        assert known_NRB.sum(axis=2).tolist() == [[B if m is None else m for m in cut]] * n
    found = decode_scores(upper_NRB, table, k, estimator=estimator, **only)
    truth = decode_topk(outputs_NRB, table, k, loss=loss, estimator=estimator, **only)
    for sample in np.flatnonzero(are_known(found, known_NRB, table)):
        assert found.labels[sample].tolist() == truth.labels[sample].tolist()
        assert found.scores[sample].tobytes() == truth.scores[sample].tobytes()
    assert (found.scores[:, -1] >= truth.scores[:, -1]).all()  # what is not certified is an upper bound


@pytest.mark.parametrize(("loss", "estimator"), TRUNCATED)
def test_some_rows_are_certified_and_some_cannot_be(loss, estimator):
    rng, table = np.random.default_rng(0), LabelTable.hashed(200, 40, 3)
    outputs_NRB = rng.normal(size=(200, 3, 40)).astype(np.float32)
    likely = rng.integers(200, size=100)  # the first hundred samples hold a label that stands out
    for r in range(3):
        outputs_NRB[np.arange(100), r, table.buckets(likely, r)] += 8
    block = [kept_arrays(outputs_NRB[:, r].copy(), 6, loss) for r in range(3)]
    upper_NRB, known_NRB = upper_scores(block, table, loss, estimator)
    found = decode_scores(upper_NRB, table, 1, estimator=estimator)
    certified = are_known(found, known_NRB, table)
    truth = decode_topk(outputs_NRB, table, 1, loss=loss, estimator=estimator)
    assert certified[:100].all() and (found.labels[:100, 0] == likely).all() and not certified[100:].all()
    if estimator != "median":  # whose unknown bucket may be the one that does not count: it is not certified all the same
        assert (found.scores[~certified] != truth.scores[~certified]).any()


@pytest.mark.parametrize(("around", "estimator"), [(-1, "min"), (-1, "mean"), (-0.1, "log-probs"), (1, "log-probs")])
def test_transforms_that_fall_where_outputs_rise_are_allowed_for(around, estimator):
    """In float32 they do here and there, so that a bound transformed bounds nothing: by up to 3 units in the last place."""
    x = np.sort((np.float32(around).view(np.int32) + np.arange(1 << 14, dtype=np.int32)).view(np.float32))
    falling_NB = np.stack([x[1:], x[:-1], np.full(len(x) - 1, -50, np.float32)], axis=1)
    exact_NB = bucket_scores(falling_NB[:, None].copy(), loss="logistic", estimator=estimator)[:, 0]
    assert (exact_NB[:, 0] < exact_NB[:, 1]).any()
    block = kept_arrays(falling_NB, 1, "logistic") | {"bounds": falling_NB[:, 0]}  # as high as a bound may be
    upper_NRB, _ = upper_scores([block], LabelTable.hashed(3, 3, 1), "logistic", estimator)
    assert (upper_NRB[:, 0, 1] >= exact_NB[:, 1]).all()


@pytest.mark.parametrize("with_choice", [False, True])
def test_rows_say_whether_they_are_certified_and_redo_makes_all(run, tiny, tmp_path, with_choice):
    score(run, tiny, tmp_path / "s", top_buckets=7)
    job = {"k": 2, "estimator": "log-probs"}
    if with_choice:
        (tmp_path / "r").write_text("\n".join(map(str, range(0, K, 2))))
        (tmp_path / "e").write_text("".join(f"{i % K}, {i % 7}\n" for i in range(N)))
        job |= {"restrict": tmp_path / "r", "exclude": tmp_path / "e"}
    predict(run.path, tiny.path, tmp_path / "p", **job)
    truth = pq.read_table(tmp_path / "p")
    n_rows, n_unsure = decode([tmp_path / "s"], tmp_path / "d", **job)
    found = pq.read_table(tmp_path / "d")
    assert found.schema.names == ["row", "labels", "scores", "certified"] and found.schema.types[3] == pa.bool_()
    certified = np.array(found["certified"])
    assert (n_rows, n_unsure) == (N, N - certified.sum()) and 0 < n_unsure < N and n_uncertified(tmp_path / "d") == n_unsure
    for name in ("labels", "scores"):
        assert found[name].filter(certified).to_pylist() == truth[name].filter(certified).to_pylist()
    facts = read_facts(tmp_path / "d")
    assert (facts["top_buckets"], facts["redo"]) == ({"0": 7, "1": 7, "2": 7}, False)
    assert sum(len(rows) for rows, _ in read_predictions(tmp_path / "d")) == N  # as `mach evaluate` reads it
    assert decode([tmp_path / "s"], tmp_path / "e2", **job, redo=(run, tiny)) == (N, 0)
    redone = pq.read_table(tmp_path / "e2")
    assert read_facts(tmp_path / "e2")["redo"]
    assert redone["certified"].to_pylist() == [True] * N and redone["labels"].equals(truth["labels"])
    np.testing.assert_allclose(redone["scores"].to_pylist(), truth["scores"].to_pylist(), rtol=1e-5, atol=1e-6)


def test_redo_computes_the_rows_that_need_it_alone(run, tiny, tmp_path, monkeypatch):
    asked, real = [], Model.predict_topk

    def predict_topk(self, X, k, **options):
        asked.append(len(X))
        return real(self, X, k, **options)

    monkeypatch.setattr(Model, "predict_topk", predict_topk)
    score(run, tiny, tmp_path / "s", top_buckets=7)
    _, n_unsure = decode([tmp_path / "s"], tmp_path / "d", k=2)
    assert asked == []
    decode([tmp_path / "s"], tmp_path / "e", k=2, redo=(run, tiny))
    assert 0 < sum(asked) == n_unsure < N


def test_redo_asks_for_the_model_that_scored(run, tiny, tiny_dense, tmp_path):
    score(run, tiny, tmp_path / "s", top_buckets=7)
    other = Config(buckets=B, repetitions=3, hidden=9, epochs=1)
    train(other, tiny, tmp_path / "other")

    def refused(words, error, model=run, data=tiny):
        with pytest.raises(error, match=words):
            decode([tmp_path / "s"], tmp_path / "d", k=2, redo=(model, data))

    refused("other: is run [0-9a-f]{16}, the scores are of [0-9a-f]{16}; give the run that scored", ModelError,
            model=Run.open(tmp_path / "other"))  # fmt: skip
    refused("dense: is data [0-9a-f]{16}, the scores are of", DataError, data=tiny_dense)
    again = trained_again(run, tmp_path / "again")
    refused("again: repetition 1 was trained again since repetition 1, shard 0/3 was scored", ModelError, model=again)


def test_estimators_that_need_full_scores(run, tiny, tmp_path):
    score(run, tiny, tmp_path / "s", top_buckets=7)
    for estimator in ("mean", "min", "median"):
        if run.config.loss == "softmax":
            with pytest.raises(ConfigError, match=rf"estimator='{estimator}' needs full scores for the softmax loss, .* of "
                                                  r"repetitions 0-2 only the best buckets were kept"):  # fmt: skip
                decode([tmp_path / "s"], tmp_path / "d", k=2, estimator=estimator)
        else:
            assert decode([tmp_path / "s"], tmp_path / estimator, k=2, estimator=estimator)[0] == N


# What does not belong together


def test_missing_and_double_pieces_are_named(run, tiny, tmp_path):
    score(run, tiny, tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match=r"b: lacks repetition 0, shards 0, 1, 2 of 3; repetition 2, shards 0, 1, 2 of 3; make"):
        decode([tmp_path / "b"], tmp_path / "d")
    (tmp_path / "a" / "scores-002.1-of-3.json").unlink()
    with pytest.raises(DataError, match=r"a, .*b: lacks repetition 2, shard 1 of 3; make them with `mach score`, or decode with"):
        decode([tmp_path / "a", tmp_path / "b"], tmp_path / "d")
    assert decode([tmp_path / "a", tmp_path / "b"], tmp_path / "d", repetitions=[0, 1]) == (N, 0)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    with pytest.raises(DataError, match=r"scores-001.0-of-3.json: repetition 1, shard 0/3 is in .*b, too; give each once"):
        decode([tmp_path / "a", tmp_path / "b", tmp_path / "c"], tmp_path / "d")
    for empty in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="holds no scores to decode; make them with `mach score`"):
            decode([empty], tmp_path / "d")


def test_other_runs_splits_and_cuts_are_refused(run, tiny, tmp_path):
    score(run, tiny, tmp_path / "s")
    train(Config(buckets=B, repetitions=5, hidden=9, epochs=1), tiny, tmp_path / "other")
    write_scores(Run.open(tmp_path / "other"), tiny, tmp_path / "run", split="test", repetition=4, shard=(0, 3))
    shutil.copytree(run.path, tmp_path / "more")
    more = Config(buckets=B, repetitions=5, hidden=8, epochs=2, batch_size=100, rerank=0, grouped=0, loss=run.config.loss)
    train(more, tiny, tmp_path / "more", repetitions=[4])
    write_scores(Run.open(tmp_path / "more"), tiny, tmp_path / "split", split="dev", repetition=4, shard=(0, 3))
    write_scores(Run.open(tmp_path / "more"), tiny, tmp_path / "n_shards", split="test", repetition=4, shard=(0, 2))
    for name in ("run", "split", "n_shards"):
        with pytest.raises(DataError, match=rf"scores-004.*: {name} is .*, but .* in .*s; decode scores of one run, split and"):
            decode([tmp_path / "s", tmp_path / name], tmp_path / "d")
    with pytest.raises(DataError, match="lacks repetition 3, shards 0, 1, 2 of 3; repetition 4"):
        write_scores(Run.open(tmp_path / "more"), tiny, tmp_path / "more3", split="test", repetition=4, shard=(0, 3))
        decode([tmp_path / "s", tmp_path / "more3"], tmp_path / "d")


def test_shards_that_were_cut_otherwise_are_refused(run, tiny, tmp_path, monkeypatch):
    for r in range(3):
        monkeypatch.setattr(predictions, "GROUP_ROWS", 10 if r else 50)
        for i in range(2):
            write_scores(run, tiny, tmp_path / "s", split="test", repetition=r, shard=(i, 2))
    with pytest.raises(DataError, match=r"s: repetition 1, shard 0/2 was cut otherwise than the rest, at 0; score it again"):
        decode([tmp_path / "s"], tmp_path / "d")
    for i, group in enumerate((10, 50)):
        monkeypatch.setattr(predictions, "GROUP_ROWS", group)
        write_scores(run, tiny, tmp_path / "t", split="test", repetition=0, shard=(i, 2))
    with pytest.raises(DataError, match=r"t: repetition 0, shard 1/2 was cut otherwise than the rest, at 50; score it again"):
        decode([tmp_path / "t"], tmp_path / "d", repetitions=[0])


def test_shards_of_other_weights_are_refused(run, tiny, tmp_path):
    again = trained_again(run, tmp_path / "again")
    for i, each in enumerate((run, again)):
        write_scores(each, tiny, tmp_path / "s", split="test", repetition=1, shard=(i, 2))
    with pytest.raises(DataError, match="s: repetition 1 was trained again between its shards; score all again"):
        decode([tmp_path / "s"], tmp_path / "d", repetitions=[1])


def test_bytes_that_have_changed_are_seen(run, tiny, tmp_path):
    score(run, tiny, tmp_path / "s")
    file = tmp_path / "s" / "scores-001.1-of-3.outputs.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"s: scores-001.1-of-3.outputs.npy has changed; score repetition 1, shard 1/3 again"):
        decode([tmp_path / "s"], tmp_path / "d")
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"outputs.npy has 1167 bytes instead of 1168; score repetition 1, shard 1/3 again"):
        decode([tmp_path / "s"], tmp_path / "e")
    assert not (tmp_path / "e.parts").exists()


# Memory


@pytest.mark.parametrize("top_buckets", [None, pytest.param(7, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_samples(tmp_path, monkeypatch, top_buckets):
    """Scores are mapped, and a row group of results is held: ten times the samples take what one tenth takes."""
    monkeypatch.setattr(predictions, "GROUP_ROWS", 1000)
    monkeypatch.setattr("mach.model.SCORE_BYTES", 4 * 2 * B * 500)
    for module in (scores, room):
        monkeypatch.setattr(module, "checksum", lambda path: "")  # reads blocks of 4 MiB, more than all the rest
    rng, peaks = np.random.default_rng(0), []
    train_split = (sp.csr_array(rng.random((50, 6))), sp.csr_array(np.eye(50, K)))
    for n in (4_000, 40_000):
        test_split = (sp.csr_array(rng.random((n, 6))), sp.csr_array((n, K)))
        data = write_dataset(tmp_path / f"data{n}", {"train": train_split, "test": test_split})
        train(Config(buckets=B, repetitions=2, hidden=4, epochs=1), data, tmp_path / f"run{n}")
        run = Run.open(tmp_path / f"run{n}")
        twice = []  # the interpreter's table of interned strings may grow by 8 MB meanwhile, but once
        for i in range(2):
            tracemalloc.start()
            score(run, data, tmp_path / f"s{n}{i}", n_shards=1, top_buckets=top_buckets)
            scoring = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            assert decode([tmp_path / f"s{n}{i}"], tmp_path / f"d{n}{i}", k=3)[0] == n
            twice.append((scoring, tracemalloc.get_traced_memory()[1]))
            tracemalloc.stop()
        peaks.append(tuple(map(min, *twice)))
    (scoring, decoding), (scoring_10, decoding_10) = peaks
    assert scoring_10 < 1.2 * scoring + 200_000 and decoding_10 < 1.2 * decoding + 200_000, peaks
    assert max(scoring_10, decoding_10) < 40_000 * 2 * B * 4, peaks  # less than the scores
