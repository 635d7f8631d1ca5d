"""Predictions on disk: their frozen form, going on after a kill, and nothing lost when the disk refuses."""

from __future__ import annotations

import errno
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from mach.calibration import Calibration, Threshold
from mach.config import Config
from mach.data import take_rows, write_dataset
from mach.decoding import TopK
from mach.errors import ConfigError, DataError
from mach.model import Model
from mach.parallel import train
from mach.store import predictions
from mach.store.calibration import Trust, scores_key
from mach.store.predictions import read_facts, read_groups, read_predictions, write_predictions

JOB = {"k": 7, "estimator": "logits", "run_key": "cafe"}
N = 60  # samples of the test split


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    config = Config(buckets=13, repetitions=3, hidden=8, epochs=1, batch_size=100, rerank=0)
    return train(config, tiny, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of 25 rows: three for the test split, the last one short."""
    monkeypatch.setattr(predictions, "GROUP_ROWS", 25)


@pytest.fixture
def asked(monkeypatch):
    """Note the rows of every call of the model; raise on the call of the number in `asked.dies_at`."""

    class Asked(list):
        dies_at = -1

    asked, real = Asked(), Model.predict_topk

    def predict_topk(self, X, k, **options):
        asked.append(len(X))
        if len(asked) - 1 == asked.dies_at:
            raise KeyboardInterrupt
        return real(self, X, k, **options)

    monkeypatch.setattr(Model, "predict_topk", predict_topk)
    return asked


def said(model, split, k=7, estimator="logits"):
    """Ask the model for the same groups of 25: matrix products of other shapes may round otherwise."""
    rows = [np.arange(start, min(start + 25, N)) for start in range(0, N, 25)]
    features = split.features
    chunks = [features[r] if isinstance(features, np.ndarray) else take_rows(features, r) for r in rows]
    tops = [model.predict_topk(chunk, k, estimator=estimator) for chunk in chunks]
    return TopK(np.concatenate([top.labels for top in tops]), np.concatenate([top.scores for top in tops]))


def killed_after_one_group(model, tiny, out, asked, **changes):
    asked.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        write_predictions(model, tiny, "test", out, **(JOB | changes))
    asked.dies_at = -1
    asked.clear()


def test_the_form_is_frozen(model, tiny, tmp_path):
    """Other programs read these files."""
    out = tmp_path / "new" / "p.parquet"
    write_predictions(model, tiny, "test", out, **JOB)
    schema = pq.read_schema(out)
    assert schema.names == ["row", "labels", "scores"]
    assert schema.types == [pa.int64(), pa.list_(pa.int64()), pa.list_(pa.float32())]
    assert json.loads(schema.metadata[b"mach"]) == {
        "run": "cafe", "repetitions": [0, 1, 2], "data": tiny.fingerprint, "split": "test", "n_samples": N, "k": 7,
        "estimator": "logits",
    }  # fmt: skip
    assert dict(read_facts(out)) == json.loads(schema.metadata[b"mach"])
    assert [file.name for file in out.parent.iterdir()] == ["p.parquet"]


def trusting(model, **wanted):
    """A calibration of the model's logits: straight from 0.1 at -5.3 to 0.9 at -4.3."""
    scores = scores_key(model, "logits")
    threshold = Threshold(wanted=0.9, score=-5.0)
    calibration = Calibration(
        knot_scores=np.array([-5.3, -4.3]),
        knot_probabilities=np.array([0.1, 0.9]),
        thresholds=(threshold,),
        of={"scores": scores},
    )
    return Trust(calibration, **wanted)


@pytest.mark.parametrize(
    ("wanted", "least"),
    [
        ({}, -np.inf),
        ({"precision": 0.9}, -5.0),
        ({"min_probability": 0.3}, -5.05),
        ({"precision": 0.9, "min_probability": 0.4}, -4.925),
    ],
)
def test_probabilities_and_labels_that_are_kept(model, tiny, tmp_path, small_groups, wanted, least):
    trust = trusting(model, **wanted)
    parts = predictions.plan(model, tiny, "test", tmp_path / "p", **JOB, choice=predictions.Choice(), trust=trust)
    with parts.open():
        list(predictions.write_parts(model, tiny.split("test"), parts, parts.left(), predictions.Choice()))
    schema = pq.read_schema(tmp_path / "p")
    assert (schema.names[3:], schema.types[3:]) == (["probabilities"], [pa.list_(pa.float32())])
    assert read_facts(tmp_path / "p").items() >= trust.facts.items() >= wanted.items()
    top, groups = said(model, tiny.split("test")), list(read_groups(tmp_path / "p"))
    n_kept = (top.scores >= least).sum(1)
    assert wanted == {} or 0 < n_kept.sum() < n_kept.size * 7
    table = pq.read_table(tmp_path / "p").to_pydict()
    for i, n in enumerate(n_kept):
        assert table["labels"][i] == top.labels[i, :n].tolist() and table["scores"][i] == top.scores[i, :n].tolist()
        expected = np.clip(0.1 + (top.scores[i, :n] + 5.3) * 0.8, 0.1, 0.9)
        assert table["probabilities"][i] == pytest.approx(expected, abs=1e-6)
    read = np.concatenate([group.top.labels for group in groups]), np.concatenate([group.top.scores for group in groups])
    probabilities = np.concatenate([group.probabilities for group in groups])
    is_kept = np.arange(7) < n_kept[:, None]
    assert np.array_equal(read[0], np.where(is_kept, top.labels, -1))
    assert np.array_equal(read[1], np.where(is_kept, top.scores, -np.inf))
    assert (probabilities[~is_kept] == 0).all() and np.array_equal(probabilities > 0, is_kept)
    assert np.concatenate([group.rows for group in groups]).tolist() == list(range(N))


def test_lists_that_are_all_empty_are_read(model, tiny, tmp_path):
    trust = trusting(model, min_probability=1.0)
    parts = predictions.plan(model, tiny, "test", tmp_path / "p", **JOB, choice=predictions.Choice(), trust=trust)
    with parts.open():
        list(predictions.write_parts(model, tiny.split("test"), parts, parts.left(), predictions.Choice()))
    (group,) = read_groups(tmp_path / "p")
    assert group.top.labels.shape == (N, 7) and (group.top.labels == -1).all() and not group.probabilities.any()


def test_parts_of_another_calibration_are_refused(model, tiny, tmp_path, small_groups):
    def plan(trust):
        return predictions.plan(model, tiny, "test", tmp_path / "p", **JOB, choice=predictions.Choice(), trust=trust)

    parts = plan(trusting(model))
    parts.folder.mkdir()
    next(iter(predictions.write_parts(model, tiny.split("test"), parts, parts.left(), predictions.Choice())))
    assert len(plan(trusting(model)).left()) == 2
    for other in (None, trusting(model, precision=0.9), trusting(model, min_probability=0.5)):
        with pytest.raises(DataError, match="holds finished parts of another job"):
            plan(other).left()


@pytest.mark.parametrize("estimator", ["logits", "mean"])
def test_it_holds_what_the_model_says(model, tiny, tmp_path, small_groups, estimator):
    done = []
    write_predictions(
        model, tiny, "test", tmp_path / "p", **(JOB | {"estimator": estimator}), progress=lambda *counts: done.append(counts)
    )
    top = said(model, tiny.split("test"), estimator=estimator)
    table = pq.read_table(tmp_path / "p").to_pydict()
    assert table["row"] == list(range(N))
    assert table["labels"] == top.labels.tolist() and table["scores"] == top.scores.tolist()
    assert pq.ParquetFile(tmp_path / "p").num_row_groups == 3
    groups = list(read_predictions(tmp_path / "p"))
    assert [rows.tolist() for rows, _ in groups] == [[*range(25)], [*range(25, 50)], [*range(50, 60)]]
    assert np.array_equal(np.concatenate([part.labels for _, part in groups]), top.labels)
    assert np.array_equal(np.concatenate([part.scores for _, part in groups]), top.scores)
    assert done == [(25, 60), (50, 60), (60, 60)]


def test_dense_features(tiny_dense, tmp_path, small_groups):
    dense = train(Config(buckets=13, repetitions=1, hidden=8, epochs=1), tiny_dense, tmp_path / "run")
    write_predictions(dense, tiny_dense, "test", tmp_path / "p", **JOB)
    top = said(dense, tiny_dense.split("test"))
    assert pq.read_table(tmp_path / "p")["labels"].to_pylist() == top.labels.tolist()


def test_a_killed_job_goes_on_where_it_was(model, tiny, tmp_path, small_groups, asked):
    write_predictions(model, tiny, "test", tmp_path / "never-killed", **JOB)
    asked.clear()
    out = tmp_path / "p"
    killed_after_one_group(model, tiny, out, asked)
    assert not out.exists() and [p.name for p in (tmp_path / "p.parts").iterdir()] == ["rows-000000000000.parquet"]
    write_predictions(model, tiny, "test", out, **JOB)
    assert asked == [25, 10]  # the first 25 rows are not predicted again
    assert out.read_bytes() == (tmp_path / "never-killed").read_bytes()
    assert not (tmp_path / "p.parts").exists()


@pytest.mark.parametrize("change", [{"k": 6}, {"run_key": "f00d"}, {"estimator": "min"}, {"repetitions": [0, 2]}])
def test_parts_of_another_job_are_refused_and_kept(model, tiny, tmp_path, small_groups, asked, change):
    killed_after_one_group(model, tiny, tmp_path / "p", asked)
    (part,) = (tmp_path / "p.parts").iterdir()
    before = part.read_bytes()
    others = model.select(change["repetitions"]) if "repetitions" in change else model
    job = JOB | {name: value for name, value in change.items() if name != "repetitions"}
    name = {"run_key": "run"}.get(*change, *change)
    words = rf"p.parts: holds finished parts of another job \({name}=.* there, .* now\); finish that .* choose another --out"
    with pytest.raises(DataError, match=words):
        write_predictions(others, tiny, "test", tmp_path / "p", **job)
    assert asked == [] and part.read_bytes() == before
    write_predictions(model, tiny, "test", tmp_path / "p", **JOB)
    assert asked == [25, 10]


def test_parts_beyond_the_end_of_another_job_are_refused_too(model, tiny, tmp_path, small_groups, asked):
    """Workers finish parts in any order: none of the job's own names need be there."""
    killed_after_one_group(model, tiny, tmp_path / "p", asked)
    (tmp_path / "p.parts" / "rows-000000000000.parquet").rename(tmp_path / "p.parts" / "rows-000000000050.parquet")
    with pytest.raises(DataError, match="split=test there, dev now; n_samples=60 there, 40 now"):
        write_predictions(model, tiny, "dev", tmp_path / "p", **JOB)
    assert asked == []


def test_what_killed_workers_left_half_written_goes(model, tiny, tmp_path, small_groups, asked):
    (tmp_path / "p.parts").mkdir()
    (tmp_path / "p.parts" / f".rows-000000000025.parquet.{2**22 + 1}.tmp").touch()  # of no process that runs
    killed_after_one_group(model, tiny, tmp_path / "p", asked)
    assert [file.name for file in (tmp_path / "p.parts").iterdir()] == ["rows-000000000000.parquet"]


def test_parts_of_another_size_are_made_again(model, tiny, tmp_path, small_groups, asked, monkeypatch):
    killed_after_one_group(model, tiny, tmp_path / "p", asked)
    monkeypatch.setattr(predictions, "GROUP_ROWS", 40)
    write_predictions(model, tiny, "test", tmp_path / "p", **JOB)
    assert asked == [40, 20] and pq.read_table(tmp_path / "p")["row"].to_pylist() == [*range(N)]


def test_a_part_that_is_cut_short_is_made_again(model, tiny, tmp_path, small_groups, asked):
    killed_after_one_group(model, tiny, tmp_path / "p", asked)
    (part,) = (tmp_path / "p.parts").iterdir()
    part.write_bytes(part.read_bytes()[: random.Random(0).randrange(part.stat().st_size)])
    write_predictions(model, tiny, "test", tmp_path / "p", **JOB)
    assert asked == [25, 25, 10]


def test_a_full_disk_loses_nothing(model, tiny, tmp_path, small_groups, asked, monkeypatch):
    out = tmp_path / "p"
    write_predictions(model, tiny, "test", out, **JOB)
    before, real, writes = out.read_bytes(), pq.write_table, []

    def write_table(table, where):
        writes.append(where)
        if len(writes) == 2:
            where.write_bytes(b"PAR1 half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(table, where)

    monkeypatch.setattr(pq, "write_table", write_table)
    words = r"p: predictions cannot be written \(.*No space left on device\); run the same command again to go on$"
    with pytest.raises(DataError, match=words):
        write_predictions(model, tiny, "test", out, **(JOB | {"k": 3}))
    assert out.read_bytes() == before
    assert [p.name for p in (tmp_path / "p.parts").iterdir()] == ["rows-000000000000.parquet"]
    asked.clear()
    write_predictions(model, tiny, "test", out, **(JOB | {"k": 3}))
    assert asked == [25, 10] and len(pq.read_table(out)["labels"][0]) == 3
    assert not (tmp_path / "p.parts").exists()


def test_a_disk_that_is_full_at_the_end_keeps_the_parts_and_the_old_file(model, tiny, tmp_path, small_groups, monkeypatch):
    out = tmp_path / "p"
    out.write_text("old")

    class Full(pq.ParquetWriter):  # pq.write_table, for the parts, uses the name in another module
        def write_table(self, *args, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(predictions.pq, "ParquetWriter", Full)
        with pytest.raises(DataError, match="No space left on device"):
            write_predictions(model, tiny, "test", out, **JOB)
    assert out.read_text() == "old" and len([*(tmp_path / "p.parts").iterdir()]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p", "p.parts"]


@pytest.mark.parametrize(("out", "words"), [("", "is a folder; give the name of the file"), ("file/p", "Not a directory")])
def test_places_that_cannot_be_written(model, tiny, tmp_path, asked, out, words):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=words):
        write_predictions(model, tiny, "test", tmp_path / out, **JOB)
    assert asked == []


def test_what_is_refused_leaves_nothing_behind(model, tiny, tmp_path):
    other = write_dataset(tmp_path / "other", {"train": (sp.eye_array(5, 9).tocsr(), sp.eye_array(5, 40).tocsr())})
    with pytest.raises(DataError, match="other: has 9 features and 40 labels, the model was trained on 50 and 40"):
        write_predictions(model, other, "train", tmp_path / "p", **JOB)
    with pytest.raises(DataError, match="has no split 'valid'; there are: train, test, dev"):
        write_predictions(model, tiny, "valid", tmp_path / "p", **JOB)
    with pytest.raises(ConfigError, match=r"k=41 must lie in \[1, 40\]"):
        write_predictions(model, tiny, "test", tmp_path / "p", **(JOB | {"k": 41}))
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_split_without_samples(model, tmp_path):
    whole, empty = (sp.csr_array(np.eye(5, 50)), sp.csr_array(np.eye(5, 40))), (sp.csr_array((0, 50)), sp.csr_array((0, 40)))
    data = write_dataset(tmp_path / "data", {"train": whole, "test": empty})
    write_predictions(model, data, "test", tmp_path / "p", **JOB)
    table = pq.read_table(tmp_path / "p")
    assert (table.num_rows, table.column_names) == (0, ["row", "labels", "scores"])
    assert list(read_predictions(tmp_path / "p")) == [] and read_facts(tmp_path / "p")["n_samples"] == 0
    assert not (tmp_path / "p.parts").exists()


def test_files_of_other_kinds_are_refused(tmp_path):
    pq.write_table(pa.table({"row": [1]}), tmp_path / "foreign")
    (tmp_path / "text").write_text("hello")
    for name in ("foreign", "text", "."):
        with pytest.raises(DataError, match="is not a prediction file of `mach predict`"):
            read_facts(tmp_path / name)
    with pytest.raises(DataError, match="absent: there is no such file; make it with `mach predict`"):
        read_facts(tmp_path / "absent")
