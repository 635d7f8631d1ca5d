"""Scores of one repetition on disk: their frozen form, what is kept of them, and pieces that are not what they say."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.config import Config
from mach.data import write_dataset
from mach.errors import ConfigError, DataError, ModelError
from mach.model import Model
from mach.parallel import train
from mach.store import Run, predictions, scores
from mach.store.scores import parse_shard, read_piece, shard_rows, write_scores

N, K, B = 60, 40, 13


@pytest.fixture(scope="module", params=["logistic", "softmax"])
def run(request, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(
        Config(buckets=B, repetitions=3, hidden=8, epochs=1, batch_size=100, rerank=0, grouped=0, loss=request.param), tiny, path
    )
    return Run.open(path)


def outputs_of(run, tiny, repetition, rows=slice(None)):
    model = run.load([repetition])
    return model.bucket_logits(model.features_of(tiny.split("test").features.to_scipy()[rows]))[:, 0]


def test_the_form_is_frozen(run, tiny, tmp_path):
    """Other machines, and other programs, read these files."""
    piece = write_scores(run, tiny, tmp_path / "s", split="test", repetition=1, shard=(0, 2))
    record = json.loads((tmp_path / "s" / "scores-001.0-of-2.json").read_text())
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["scores-001.0-of-2.json", "scores-001.0-of-2.outputs.npy"]
    assert record == piece.record | {"checksum": record["checksum"]}
    assert list(record) == [
        "format", "run", "repetition", "n_repetitions", "weights", "data", "split", "n_samples", "shard", "n_shards", "rows",
        "n_buckets", "top_buckets", "loss", "table", "names", "files", "versions", "checksum",
    ]  # fmt: skip
    assert (record["run"], record["data"], record["rows"], record["n_repetitions"]) == (
        run.manifest["key"], tiny.fingerprint, [0, 30], 3,
    )  # fmt: skip
    array = np.load(tmp_path / "s" / "scores-001.0-of-2.outputs.npy")
    assert array.dtype == np.float32 and np.array_equal(array, outputs_of(run, tiny, 1, slice(30)))
    assert read_piece(tmp_path / "s" / "scores-001.0-of-2.json").trouble(by_checksum=True) == ""


def test_only_the_best_buckets(run, tiny, tmp_path):
    piece = write_scores(run, tiny, tmp_path, split="test", repetition=2, top_buckets=4)
    loss, full_NB = run.config.loss, outputs_of(run, tiny, 2)
    arrays = {part: np.asarray(piece.array(part)) for part in piece.record["files"]}
    assert {part: (array.dtype, array.shape) for part, array in arrays.items()} == {
        "outputs": (np.float32, (N, 4)), "buckets": (np.uint8, (N, 4)), "bounds": (np.float32, (N,)),
    } | ({"totals": (np.float32, (N,))} if loss == "softmax" else {})  # fmt: skip
    falling = np.sort(full_NB, axis=1)[:, ::-1]
    assert np.array_equal(arrays["outputs"], falling[:, :4]) and np.array_equal(arrays["bounds"], falling[:, 4])
    assert np.array_equal(np.take_along_axis(full_NB, arrays["buckets"].astype(int), 1), arrays["outputs"])
    if loss == "softmax":
        exact = np.log(np.exp(full_NB.astype(float) - full_NB.max(axis=1, keepdims=True)).sum(axis=1))
        np.testing.assert_allclose(arrays["totals"], exact, rtol=1e-6)


def test_shards_are_the_whole_and_progress_is_told(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "GROUP_ROWS", 25)
    told, found = [], []
    for i in range(2):
        piece = write_scores(
            run, tiny, tmp_path, split="test", repetition=0, shard=(i, 2), progress=lambda *counts: told.append(counts)
        )
        found.append(np.asarray(piece.array("outputs")))
    assert [len(part) for part in found] == [25, 35] and told == [(25, 25), (25, 35), (35, 35)]
    np.testing.assert_allclose(np.concatenate(found), outputs_of(run, tiny, 0), atol=1e-6)


def test_products_have_the_shapes_that_predicting_takes(run, tiny, tmp_path, monkeypatch):
    """Of all repetitions at once, though one is held: products of other shapes may round otherwise."""
    shapes, real = [], Model.bucket_outputs

    def bucket_outputs(self, features):
        shapes.append(len(features))
        return real(self, features)

    monkeypatch.setattr(Model, "bucket_outputs", bucket_outputs)
    monkeypatch.setattr("mach.model.SCORE_BYTES", 4 * 3 * B * 17)
    monkeypatch.setattr(predictions, "GROUP_ROWS", 40)
    write_scores(run, tiny, tmp_path / "s", split="test", repetition=0)
    scored = shapes.copy()
    shapes.clear()
    job = {"k": 3, "estimator": "logits", "run_key": "cafe"}
    predictions.write_predictions(run.load(), tiny, "test", tmp_path / "p", **job)
    assert scored == shapes == [17, 17, 6, 17, 3]


def test_what_is_there_stays(run, tiny, tmp_path, monkeypatch):
    piece = write_scores(run, tiny, tmp_path, split="test", repetition=0)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = write_scores(run, tiny, tmp_path, split="test", repetition=0)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == times and again.record["files"] == piece.record["files"]
    with pytest.raises(DataError, match=r"000.0-of-1.json: is of another job \(top_buckets=None there, 3 now\); delete it, or"):
        write_scores(run, tiny, tmp_path, split="test", repetition=0, top_buckets=3)
    with pytest.raises(DataError, match=r"another job \(split=test there, dev now; n_samples=60 there, 40 now"):
        write_scores(run, tiny, tmp_path, split="dev", repetition=0)
    whole = piece.file("outputs").read_bytes()
    piece.file("outputs").write_bytes(whole[:-1])
    write_scores(run, tiny, tmp_path, split="test", repetition=0)
    assert piece.file("outputs").read_bytes() == whole


def test_a_full_disk_leaves_no_piece(run, tiny, tmp_path, monkeypatch):
    real = scores.checksum

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scores, "checksum", full)
    with pytest.raises(DataError, match=r"s: scores cannot be written \(.*No space left on device\); run the same command"):
        write_scores(run, tiny, tmp_path / "s", split="test", repetition=0)
    assert list((tmp_path / "s").iterdir()) == []
    monkeypatch.setattr(scores, "checksum", real)
    theirs = tmp_path / "s" / f".scores-001.0-of-1.outputs.npy.{2**22 + 1}.tmp"  # of another machine, perhaps
    ours = tmp_path / "s" / f".scores-000.0-of-1.outputs.npy.{2**22 + 1}.tmp"
    for file in (theirs, ours):
        file.touch()
    write_scores(run, tiny, tmp_path / "s", split="test", repetition=0)
    assert theirs.exists() and not ours.exists()


def test_a_record_never_speaks_of_other_arrays(run, tiny, tmp_path, monkeypatch):
    """A broken piece is written again: what dies after the new arrays and before the new record leaves no old one."""
    piece = write_scores(run, tiny, tmp_path, split="test", repetition=0)
    piece.file("outputs").write_bytes(b"broken")

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scores, "write_json", dies)
    with pytest.raises(KeyboardInterrupt):
        write_scores(run, tiny, tmp_path, split="test", repetition=0)
    assert [file.name for file in tmp_path.iterdir()] == ["scores-000.0-of-1.outputs.npy"]


def test_label_names_go_along(tiny, tmp_path):
    data = write_dataset(
        tmp_path / "data", {s: (tiny.split(s).features.to_scipy(), tiny.split(s).labels.to_scipy()) for s in ("train", "test")},
        label_names=[f"name {i}" for i in range(K)],
    )  # fmt: skip
    train(Config(buckets=B, repetitions=1, hidden=8, epochs=1), data, tmp_path / "run")
    piece = write_scores(Run.open(tmp_path / "run"), data, tmp_path / "s", split="test", repetition=0)
    assert sorted(piece.record["names"]) == ["label_names_blob.npy", "label_names_offsets.npy"]
    for name in piece.record["names"]:
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_outputs_that_are_not_finite_are_not_written(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "bucket_logits", lambda self, X: np.full((len(X), 1, B), np.nan, np.float32))
    with pytest.raises(ConfigError, match="repetition 1: the head gave an output that is not a finite number"):
        write_scores(run, tiny, tmp_path / "s", split="test", repetition=1)
    assert list((tmp_path / "s").iterdir()) == []


def test_what_is_refused(run, tiny, tmp_path):
    def refused(words, error, **options):
        with pytest.raises(error, match=words):
            write_scores(run, tiny, tmp_path / "s", **({"split": "test", "repetition": 0} | options))

    refused(rf"top_buckets={B} must lie in \[1, {B}\)", ConfigError, top_buckets=B)
    refused("top_buckets=0 must lie in", ConfigError, top_buckets=0)
    refused("shard=2/2 must be i/n with i from 0 to n - 1", ConfigError, shard=(2, 2))
    refused("repetition 3 is missing", ModelError, repetition=3)
    refused("has no split 'valid'", DataError, split="valid")
    (tmp_path / "s").touch()
    refused("s: scores cannot be written", DataError)


def test_records_that_are_not_what_they_say(run, tiny, tmp_path):
    piece = write_scores(run, tiny, tmp_path, split="test", repetition=0)
    file = tmp_path / "scores-000.0-of-1.json"
    text = file.read_text()
    for changed, words in [
        (text.replace('"shard": 0', '"shard": 1'), "does not match its own checksum"),
        (text.replace('"format": 1', '"format": 9'), "has score format 9, this version of mach reads format 1"),
        (text[:-5], "cannot be read"),
    ]:
        file.write_text(changed)
        with pytest.raises(DataError, match=words):
            read_piece(file)
    content = bytearray(piece.file("outputs").read_bytes())
    content[-1] ^= 1
    piece.file("outputs").write_bytes(content)
    assert (piece.trouble(), piece.trouble(by_checksum=True)) == ("", "scores-000.0-of-1.outputs.npy has changed")
    piece.file("outputs").write_bytes(content[:-1])
    assert piece.trouble().endswith(f"has {len(content) - 1} bytes instead of {len(content)}")
    piece.file("outputs").unlink()
    assert piece.trouble() == "scores-000.0-of-1.outputs.npy is missing"
    with pytest.raises(DataError, match=r"cannot be mapped .* score repetition 0, shard 0/1 again"):
        piece.array("outputs")


@given(n_samples=st.integers(0, 300), n=st.integers(1, 40), group=st.integers(1, 60))
def test_shards_cut_all_rows_at_groups_where_there_are_enough(n_samples, n, group):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "GROUP_ROWS", group)
        found = [shard_rows(n_samples, i, n) for i in range(n)]
    assert [row for start, stop in found for row in range(start, stop)] == [*range(n_samples)]
    if -(-n_samples // group) >= n:
        assert all(start % group == 0 and start < stop for start, stop in found)
    else:
        lengths = [stop - start for start, stop in found]
        assert max(lengths) - min(lengths) <= 1


def test_shards_as_people_write_them():
    assert [parse_shard(text) for text in ("0/1", "3/4")] == [(0, 1), (3, 4)]
    for text in ("4/4", "1", "-1/2", "a/b", "1/", "1/2/3"):
        with pytest.raises(ConfigError, match=f"shard='{text}' must be i/n with i from 0 to n - 1, such as 0/4"):
            parse_shard(text)


def test_folders_of_several_machines_can_be_copied_together(run, tiny, tmp_path):
    for r in range(2):
        write_scores(run, tiny, tmp_path / str(r), split="test", repetition=r)
        shutil.copytree(tmp_path / str(r), tmp_path / "all", dirs_exist_ok=True)
    assert len(os.listdir(tmp_path / "all")) == 4
