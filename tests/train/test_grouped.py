"""Runs with learnt tables: who learns one, from which samples, stored with the weights, and decoded from anywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from mach import cli
from mach.config import Config
from mach.data import write_dataset
from mach.decoding import reference
from mach.errors import DataError, ModelError
from mach.hashing import LabelTable, grouping
from mach.hashing.grouping import LabelSums, group_labels
from mach.parallel import train
from mach.parallel.offline import predict
from mach.store import Run, load
from mach.store.decode import decode
from mach.store.folder import sizes_of
from mach.store.predictions import read_predictions
from mach.store.scores import write_scores
from mach.train import grouped
from mach.train.grouped import with_groups
from mach.train.loop import HELD_OUT
from mach.train.schedule import order_of

CONFIG = Config(rerank=0, buckets=13, repetitions=4, grouped=0.5, hidden=8, epochs=2, batch_size=100)


@pytest.fixture(scope="module", autouse=True)
def few_are_rare():
    """Of the tiny set's 40 labels, with about ten samples each, some are frequent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "RARE", 11)
        patch.setattr(grouped, "BLOCK", 37)
        yield


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(CONFIG, tiny, path)
    return path


def hashed(config=CONFIG):
    return LabelTable.hashed(40, 13, config.repetitions, seed=config.seed)


def given(table, config, dataset):
    return with_groups(table, config, sizes_of(config, dataset), dataset)


def learnt(features, labels, seed, repetition):
    """Learn a table from all samples at once."""
    x, y = (matrix.to_scipy().tocsr() for matrix in (features, labels))
    sums = LabelSums(np.bincount(y.indices, minlength=40), seed=seed, repetition=repetition)
    sums.add(x.indptr.astype(np.int64), x.indices, x.data, y.indptr.astype(np.int64), y.indices)
    return group_labels(sums, 13, seed=seed, repetition=repetition).tolist()


def test_a_share_of_the_repetitions_learns_from_the_train_split(tiny):
    split, table = tiny.split("train"), given(hashed(), CONFIG, tiny)
    counts = np.bincount(split.labels.indices)
    assert 5 < (counts < 11).sum() < 35
    assert list(table.given) == [1, 3]
    for r in range(4):
        wanted = learnt(split.features, split.labels, 0, r) if r in (1, 3) else hashed().array()[r].tolist()
        assert table.array()[r].tolist() == wanted
    alone = given(LabelTable.hashed(40, 13, repetitions=[3]), CONFIG, tiny)
    assert alone.array()[0].tolist() == table.array()[3].tolist()  # whatever its companions


def test_without_a_share_all_are_hashed(tiny):
    table = hashed()
    assert given(table, CONFIG.replace(grouped=0.0), tiny) is table
    assert given(LabelTable.identity(40), CONFIG.replace(grouped=1.0, table="identity"), tiny).is_identity


def test_all_learn_where_a_sample_has_about_one_label(tiny, tmp_path):
    """And a stored model knows it."""
    config, split = CONFIG.replace(grouped="auto", repetitions=2, epochs=1), tiny.split("train")
    sizes = sizes_of(config, tiny)
    assert 1 < sizes.labels_a_sample < 2
    train(config, tiny, tmp_path)
    found = load(tmp_path, device="cpu").table
    assert list(found.given) == [0, 1]
    assert found.array().tolist() == [learnt(split.features, split.labels, 0, r) for r in (0, 1)]
    assert not with_groups(hashed(), config, replace(sizes, labels_a_sample=2.0), tiny).given


def test_samples_held_out_teach_nothing(tiny, tmp_path):
    split = tiny.split("train")
    data = write_dataset(tmp_path / "d", {"train": (split.features.to_scipy(), split.labels.to_scipy())})
    config = CONFIG.replace(validation=0.25, seed=3)
    kept = np.sort(order_of(200, 3, HELD_OUT, np.arange(50, 200)))
    part = write_dataset(tmp_path / "p", {"train": (split.features.to_scipy()[kept], split.labels.to_scipy()[kept])})
    without = part.split("train")
    found = given(hashed(config), config, data)
    counts = np.bincount(without.labels.indices, minlength=40)
    assert (counts < 11).any()
    near = np.mean(found.array()[1] == learnt(without.features, without.labels, 3, 1))
    assert near > 0.9  # the samples come in another order, which may round otherwise


def test_dense_features_teach_as_well(tiny_dense):
    table = given(LabelTable.hashed(tiny_dense.n_labels, 13, 4), CONFIG, tiny_dense)
    assert list(table.given) == [1, 3]


def test_the_layout_is_frozen(trained, tiny):
    """A change here orphans stored models with learnt tables."""
    run = Run.open(trained)
    for r in range(4):
        with safe_open(run.weights_path(r), framework="pt") as file:
            has = "label_table" in file.keys()
            if has:
                part = file.get_slice("label_table")
                assert (part.get_shape(), part.get_dtype()) == ([40], "U8")
        record = run.records()[r]
        assert has == record["is_grouped"] == (r in (1, 3))
        assert record["parameters"] == run.records()[0]["parameters"]  # a table is none


def test_a_stored_model_decodes_with_the_tables_it_learnt(trained, tiny):
    model, features = load(trained, device="cpu"), tiny.split("test").features
    table = given(hashed(), CONFIG, tiny)
    assert model.table.array().tolist() == table.array().tolist()
    found, outputs = model.predict_topk(features, 7), model.bucket_logits(features)
    for n in range(0, 60, 6):
        scores = reference.label_scores(outputs[n].tolist(), table.array().tolist(), loss="logistic", estimator="logits")
        assert np.allclose(found.scores[n], sorted(scores, reverse=True)[:7], atol=1e-4)
        assert np.allclose(found.scores[n], [scores[k] for k in found.labels[n]], atol=1e-4)
    part = model.select([3, 0])
    assert part.table.array().tolist() == table.array()[[3, 0]].tolist()


def test_repetitions_trained_apart_are_those_of_one_run(trained, tiny, tmp_path):
    train(CONFIG, tiny, tmp_path / "part", repetitions=[3])
    ours = load_file(Run.open(tmp_path / "part").weights_path(3))["label_table"]
    assert ours.tolist() == load_file(Run.open(trained).weights_path(3))["label_table"].tolist()


def test_a_table_that_changed_or_is_lost_is_noticed(trained, tiny, tmp_path):
    run = Run.open(shutil.copytree(trained, tmp_path / "run"))
    blob = bytearray(run.weights_path(1).read_bytes())
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    at = 8 + int.from_bytes(blob[:8], "little") + header["label_table"]["data_offsets"][0]
    blob[at] ^= 1
    run.weights_path(1).write_bytes(blob)
    assert run.verify() == ["repetition 1 has changed: repetition-001.safetensors does not match its checksum"]
    parameters = run.load([0]).repetitions[0].repetition(0)
    run.add(1, parameters, {})
    with pytest.raises(ModelError, match="repetition 1 is broken"):
        run.load()
    assert run.load(skip_broken=True).table.repetitions == (0, 2, 3)


def test_scores_bring_their_tables_along(trained, tiny, tmp_path):
    run = Run.open(trained)
    for r in range(4):
        for i in range(2):
            write_scores(run, tiny, tmp_path / "scores", split="test", repetition=r, shard=(i, 2))
    assert len(list((tmp_path / "scores").glob("*.table.npy"))) == 4
    decode([tmp_path / "scores"], tmp_path / "decoded.parquet", k=5)
    predict(trained, tiny.path, tmp_path / "predicted.parquet", split="test", k=5)
    ours, theirs = (list(read_predictions(tmp_path / f"{name}.parquet")) for name in ("decoded", "predicted"))
    for part in ("labels", "scores"):
        assert np.array_equal(*(np.concatenate([getattr(top, part) for _, top in each]) for each in (ours, theirs)))
    file = tmp_path / "scores" / "scores-003.0-of-2.table.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(DataError, match=r"scores-003.0-of-2.table.npy: has changed; score repetition 3, shard 0/2 again"):
        decode([tmp_path / "scores"], tmp_path / "again.parquet", k=5)


def test_inspect_says_which_repetitions_learnt_their_tables(trained, capsys):
    cli.main(["inspect", str(trained)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("repetition")]
    assert ["similar labels together" in line for line in lines] == [False, True, False, True]
