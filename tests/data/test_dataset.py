"""The folder of a data set: written, opened, verified, and its format frozen."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp

from mach.data import CSR, Dataset, take_rows, write_dataset
from mach.data.writer import GrowingArray, writing_dataset
from mach.errors import DataError

X = sp.csr_array(np.array([[0, 1.5, 0, 2], [0, 0, 0, 0], [3, 0, 0, 0]], np.float32))
Y = sp.csr_array(np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], np.float32))
NAMES = ["a\nb", "ü", ""]
GOLDEN = {
    "label_names_blob.npy": "720c9323",
    "label_names_offsets.npy": "2ca5fa2d",
    "train/features_indices.npy": "b9a6fd84",
    "train/features_indptr.npy": "b4e1a4f7",
    "train/features_values.npy": "3b2376dc",
    "train/labels_indices.npy": "dfc57e74",
    "train/labels_indptr.npy": "22ce10cd",
}  # the first 32 bits of each checksum


@pytest.fixture
def tiny(tmp_path):
    return write_dataset(tmp_path / "tiny", {"train": (X, Y), "dev": (X[:1], Y[:1])}, label_names=NAMES)


def test_threads_read_headers_one_after_another(tiny, monkeypatch):
    """CPython 3.11 parses them wrongly now and then where threads do so at once."""
    load, inside, most = np.load, [], []

    def slow(*args, **named):
        inside.append(args)
        most.append(len(inside))
        time.sleep(0.001)
        inside.pop()
        return load(*args, **named)

    monkeypatch.setattr(np, "load", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: Dataset.open(tiny.path).split(name).n_samples, ["train", "dev"] * 4))
    assert found == [3, 1] * 4 and len(most) >= 40 and max(most) == 1


def test_what_is_written_is_read(tiny):
    assert (tiny.n_features, tiny.n_labels, tiny.split_names) == (4, 3, ("train", "dev"))
    train = tiny.split("train")
    assert (train.name, train.n_samples, train.text, tiny.vectorizer) == ("train", 3, None, None)
    assert np.array_equal(train.features.to_scipy().toarray(), X.toarray())
    assert np.array_equal(train.labels.to_scipy().toarray(), Y.toarray())
    assert train.labels.values is None and train.labels.nnz == 3
    assert list(tiny.label_names) == NAMES  # a newline in a name survives
    assert take_rows(train.features, [2, 2]).indices.tolist() == [0, 0]


def test_arrays_are_mapped_and_read_only(tiny):
    features = tiny.split("train").features
    for array in (features.indptr, features.indices, features.values):
        assert not array.flags.writeable and not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        features.values[0] = 1


def test_dense_features(tmp_path):
    dense = np.arange(12, dtype=np.float64).reshape(3, 4)
    dataset = write_dataset(tmp_path / "d", {"test": (dense, Y)})
    features = dataset.split("test").features
    assert features.dtype == np.float32 and np.array_equal(features, dense) and dataset.label_names is None


def test_a_data_set_travels_to_another_process(tiny):
    assert pickle.loads(pickle.dumps(tiny)).split("dev").n_samples == 1


def test_a_missing_split_names_those_there_are(tiny):
    with pytest.raises(DataError, match="has no split 'test'; there are: train, dev"):
        tiny.split("test")


def test_format_is_frozen(tiny):
    """A change here orphans every data set: raise dataset.FORMAT with it."""
    manifest = json.loads((tiny.path / "manifest.json").read_text())
    assert (manifest["format"], manifest["n_features"], manifest["n_labels"]) == (1, 4, 3)
    assert manifest["splits"]["train"] == {"n_samples": 3, "features_nnz": 3, "labels_nnz": 3}
    assert {name: known["xxh3_128"][:8] for name, known in manifest["files"].items() if not name.startswith("dev")} == GOLDEN
    assert tiny.fingerprint == "3b8bba402339eb7b"
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortran_order': False, 'shape': (3,)}"
    body = np.array([0, 2, 1], "<i4").tobytes()
    assert (tiny.path / "train/labels_indices.npy").read_bytes() == header.ljust(127) + b"\n" + body


def test_fingerprint_is_of_the_data_alone(tmp_path, tiny):
    again = write_dataset(tmp_path / "again", {"dev": (X[:1], Y[:1]), "train": (X, Y)}, label_names=NAMES)
    assert again.fingerprint == tiny.fingerprint
    other = write_dataset(tmp_path / "other", {"train": (2 * X, Y), "dev": (X[:1], Y[:1])}, label_names=NAMES)
    assert other.fingerprint != tiny.fingerprint


def test_another_format_is_refused_by_name(tiny):
    text = (tiny.path / "manifest.json").read_text()
    (tiny.path / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="tiny: has data format 2, this version of mach reads format 1; prepare it again"):
        Dataset.open(tiny.path)


def test_a_folder_without_manifest_is_not_a_data_set(tiny):
    (tiny.path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"is not a data set .*mach prepare"):
        Dataset.open(tiny.path)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_manifest_is_refused(tiny, text):
    (tiny.path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: is not a manifest"):
        Dataset.open(tiny.path)


def test_a_changed_manifest_is_noticed(tiny):
    text = (tiny.path / "manifest.json").read_text()
    (tiny.path / "manifest.json").write_text(text.replace('"n_labels": 3', '"n_labels": 2'))
    with pytest.raises(DataError, match=r"manifest\.json: has changed since it was written"):
        Dataset.open(tiny.path)


def test_a_short_or_missing_file_is_noticed_on_open(tiny):
    file = tiny.path / "train/features_values.npy"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    (tiny.path / "dev/labels_indptr.npy").unlink()
    expected = rf"is damaged: dev/labels_indptr.npy is missing; train/features_values.npy has {size - 1} bytes instead of {size};"
    with pytest.raises(DataError, match=expected):
        Dataset.open(tiny.path)


def test_a_flipped_byte_in_any_file_is_noticed_by_verify(tiny):
    tiny.verify()
    files = [file for file in tiny.path.rglob("*.npy") if file.stat().st_size]
    assert len(files) == 12
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(
            DataError, match=f"is damaged: {re.escape(file.relative_to(tiny.path).as_posix())} has changed; prepare"
        ):
            Dataset.open(tiny.path).verify()
        file.write_bytes(whole)


def test_a_broken_array_header_is_a_data_error(tiny):
    file = tiny.path / "train/labels_indices.npy"
    file.write_bytes(file.read_bytes().replace(b"'shape'", b"'sharp'"))
    with pytest.raises(DataError, match=r"is damaged: train/labels_indices\.npy cannot be mapped"):
        Dataset.open(tiny.path).split("train")


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({"train": (X, Y[:2])}, {}, "train: 3 rows of features and 2 rows of labels must be equally many"),
        (
            {"train": (X, Y), "test": (X[:, :2], Y)},
            {},
            "train has 4 features and test has 2; the splits of a data set must agree",
        ),
        ({"train": (X, Y), "test": (X, Y[:, :2])}, {}, "train has 3 labels and test has 2"),
        ({"train": (X, Y)}, {"label_names": ["a"]}, "label_names: 1 label names for 3 labels; there must be one for each"),
        ({"valid": (X, Y)}, {}, r"splits \['valid'\] must be some of train, test, dev"),
        ({}, {}, r"splits \[\] must be some of train, test, dev"),
        ({"train": (X * np.nan, Y)}, {}, "train: row 0: feature 1 has value nan; values must be finite"),
        ({"train": (np.zeros(3), Y)}, {}, r"dense features must have two axes \(N, F\), got shape \(3,\)"),
    ],
)
def test_bad_matrices_are_named_and_leave_nothing(tmp_path, splits, options, message):
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "d", splits, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(tmp_path, tiny):
    with pytest.raises(DataError, match="tiny: holds another data set, which is left alone; remove it or choose another folder"):
        write_dataset(tiny.path, {"train": (X, Y)})
    Dataset.open(tiny.path).verify()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="notes: exists and is not a data set, which is left alone"):
        write_dataset(tmp_path / "notes", {"train": (X, Y)})
    (tmp_path / "empty").mkdir()
    assert write_dataset(tmp_path / "empty", {"train": (X, Y)}).n_labels == 3


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # stands in for a full disk: writing fails with an OSError
    try:
        with pytest.raises(DataError, match=r"features\.npy: cannot be written \(File too large\); free space there or choose"):
            write_dataset(tmp_path / "d", {"train": (np.ones((3, 5000)), Y)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file/d: cannot be written \(.*\); free space there"):
        write_dataset(tmp_path / "file" / "d", {"train": (X, Y)})


def test_folders_of_dead_processes_are_removed(tmp_path):
    with writing_dataset(tmp_path / "d") as writer:
        dead = writer.folder.with_name(writer.folder.name.replace(f".{os.getpid()}.", ".4194399."))
        alive = writer.folder.with_name(writer.folder.name.replace(f".{os.getpid()}.", f".{os.getppid()}."))
        writer.split("train").append_features(CSR.from_scipy(X))
        writer.split("train").append_labels(CSR.from_scipy(Y, with_values=False))
        writer.finish(4, 3, {})
        for folder in (dead, alive):
            folder.mkdir()
    write_dataset(tmp_path / "d2", {"train": (X, Y)})
    assert dead.exists()  # it belongs to `d`, not to `d2`
    (tmp_path / "d").rename(tmp_path / "old")
    write_dataset(tmp_path / "d", {"train": (X, Y)})
    assert not dead.exists() and alive.exists()


def test_growing_array_equals_numpy(tmp_path):
    array = GrowingArray(tmp_path / "a.npy", np.float32, (2,))
    parts = [np.ones((3, 2), np.float32), np.empty((0, 2), np.float32), np.full((1, 2), 7, np.float32)]
    for part in parts:
        array.append(part)
    array.close()
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.concatenate(parts))
