"""The run folder: its layout frozen, everything that can break in it named, parts of an ensemble put together."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open
from scipy import sparse

from mach.config import Config
from mach.data import Dataset, bundled, prepare, write_dataset
from mach.errors import ConfigError, MachError, ModelError
from mach.model import resolve_precision
from mach.parallel import train
from mach.store import Run, folder, load
from mach.store.folder import format_repetitions, parse_repetitions

CONFIG = Config(buckets=13, repetitions=3, hidden=9, dropout=0.3, batch_size=100, epochs=2, rerank=0, grouped=0)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run folder of three repetitions: to read, not to change."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train(CONFIG, tiny, path)
    return path


@pytest.fixture
def run(trained, tmp_path):
    """The same, to break."""
    return Run.open(shutil.copytree(trained, tmp_path / "run"))


def weights_of(path):
    return {r: load_file(Run.open(path).weights_path(r)) for r in Run.open(path).finished()}


def same_bits(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_layout_is_frozen(trained, tiny):
    """A change here orphans every stored model: raise folder.FORMAT with it."""
    files = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    numbered = {f"repetition-00{r}.{kind}" for r in range(3) for kind in ("json", "safetensors")}
    assert files == {"manifest.json", "logs/group-0-2.jsonl", *numbered}
    manifest = json.loads((trained / "manifest.json").read_text())
    assert list(manifest) == [
        "format", "config", "sizes", "table", "data", "key", "versions", "repetitions", "files", "checksum"
    ]  # fmt: skip
    assert (manifest["format"], manifest["repetitions"], manifest["files"]) == (1, 3, {})
    assert manifest["sizes"] == {
        "n_features": 50, "n_labels": 40, "n_buckets": 13, "hidden": 9, "features": "sparse", "labels_a_sample": 1.915
    }  # fmt: skip
    assert manifest["data"] == tiny.fingerprint
    assert set(manifest["config"]) == set(CONFIG.to_dict()) - {"repetitions"}
    assert set(manifest["table"]) == {"kind", "n_labels", "n_buckets", "family", "seed", "fingerprint"}
    assert set(manifest["versions"]) == {"mach", "torch", "numpy", "python"}
    with safe_open(trained / "repetition-001.safetensors", framework="pt") as file:
        shapes = {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}
        assert file.metadata() == {"format": "pt", "run": manifest["key"]}
    rows = {torch.bfloat16: "BF16", torch.float32: "F32"}[resolve_precision("auto", torch.device("cpu"))]
    assert shapes == {
        "input.weight": ([50, 9], rows), "input.bias": ([9], "F32"),
        "head.weight": ([13, 9], "F32"), "head.bias": ([13], "F32"),
    }  # fmt: skip
    record = json.loads((trained / "repetition-001.json").read_text())
    assert {"repetition", "run", "bytes", "xxh3_128", "parameters", "versions", "steps", "train_s", "group"} <= set(record)
    assert (record["repetition"], record["parameters"], record["steps"]) == (1, 50 * 9 + 9 + 13 * 9 + 13, 4)
    assert (record["run"], record["group"]) == (manifest["key"], [0, 1, 2])


def test_what_was_stored_is_loaded(trained, tiny):
    model = load(trained, device="cpu")
    assert (model.config, model.sizes.n_buckets, model.table.repetitions) == (CONFIG, 13, (0, 1, 2))
    assert model.vectorizer is None and model.label_names is None and model.name_of(3) == "3"
    again = Run.open(trained).load()
    features = tiny.split("test").features
    assert np.array_equal(model.bucket_logits(features), again.bucket_logits(features))
    assert Run.open(trained).verify() == [] and Run.open(trained).problems() == {}


def test_a_manifest_that_is_missing_broken_or_of_another_format_is_refused(run):
    file = run.path / "manifest.json"
    text = file.read_text()
    for changed, message in {
        text.replace('"format": 1', '"format": 2'): "run: has model format 2, this version of mach reads format 1; train it",
        text.replace('"format": 1', '"fromat": 1'): "run: has model format None, this version",
        text.replace('"n_labels": 40', '"n_labels": 41'): r"manifest\.json: does not match its own checksum; restore it",
        text[:-9]: r"manifest\.json: is broken: ",
        "[]": r"manifest\.json: is broken: .*holds list, not an object",
    }.items():
        assert changed != text
        file.write_text(changed)
        with pytest.raises(ModelError, match=message):
            Run.open(run.path)
    file.unlink()
    with pytest.raises(ModelError, match=r"run: is not a run folder \(no readable manifest\.json\); make one with `mach train`"):
        Run.open(run.path)


def test_a_data_set_is_no_run_folder(tiny):
    with pytest.raises(ModelError, match="tiny: is a data set, not a run folder; choose another folder for the run"):
        Run.open(tiny.path)


def alter(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def test_a_flipped_bit_anywhere_is_noticed_by_verify(run):
    """One bit at 150 random places of each kind of file, and in the first bytes, where the weights' header begins."""
    rng = random.Random(0)
    for file in (run.path / "manifest.json", run.weights_path(1), run.weights_path(1).with_suffix(".json")):
        whole = file.read_bytes()
        positions = [*range(0, 16), *(rng.sample(range(len(whole)), 150))]
        for position in positions:
            flip(file, position, rng.randrange(8))
            try:
                noticed = Run.open(run.path).verify()
            except ModelError as error:
                noticed = [str(error)]
            assert noticed, (file.name, position)
            file.write_bytes(whole)
    assert run.verify() == []


def test_a_broken_repetition_is_named_left_out_and_trained_alone(run, tiny):
    whole = {name: value.clone() for name, value in weights_of(run.path)[1].items()}  # not a map of what is to be cut
    middle = run.weights_path(1)
    os.truncate(middle, middle.stat().st_size - 1)
    text = f"is cut short or changed: {middle.stat().st_size} bytes instead of {middle.stat().st_size + 1}"
    assert run.problems() == {1: text} and run.verify() == [f"repetition 1 {text}"] and run.finished() == [0, 2]
    with pytest.raises(ModelError, match=rf"run: repetition 1 {text}; train again with --repetitions 1-1, or leave out"):
        load(run.path, device="cpu")
    model = load(run.path, device="cpu", skip_broken=True)
    assert model.table.repetitions == (0, 2)
    assert model.predict_topk(tiny.split("test").features, 3).labels.shape == (60, 3)
    train(CONFIG, tiny, run.path, repetitions=parse_repetitions("1-1"))
    assert run.verify() == []
    for name, value in weights_of(run.path)[1].items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5)  # alone: other sums, so to rounding


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda run: (run.weights_path(1).unlink(), run.weights_path(1).with_suffix(".json").unlink()), "is missing"),
        (lambda run: run.weights_path(1).unlink(), "is missing its weights"),
        (lambda run: run.weights_path(1).with_suffix(".json").unlink(), "is missing"),
        (lambda run: run.weights_path(1).with_suffix(".json").write_text("{"), "is broken: its record is unreadable"),
        (lambda run: run.weights_path(1).with_suffix(".json").write_text('{"repetition": [1]}'), "is broken: its record"),
        (lambda run: alter(run.weights_path(1).with_suffix(".json"), '"bytes"', '"bites"'), "is broken: its record"),
    ],
    ids=["both", "weights", "record", "half-record", "odd-record", "short-record"],
)
def test_every_way_to_lose_a_repetition(run, tiny, harm, text):
    harm(run)
    assert list(run.problems()) == [1] and run.problems()[1].startswith(text)
    with pytest.raises(ModelError, match=f"repetition 1 {text}"):
        run.load()
    assert run.load(skip_broken=True).table.repetitions == (0, 2)
    train(CONFIG, tiny, run.path)
    assert run.verify() == [] and run.load().table.repetitions == (0, 1, 2)


def test_flipped_weights_are_found_by_verify_and_replaced_once_deleted(run, tiny):
    flip(run.weights_path(2), run.weights_path(2).stat().st_size - 3, 4)
    assert run.verify() == ["repetition 2 has changed: repetition-002.safetensors does not match its checksum"]
    run.weights_path(2).unlink()
    train(CONFIG, tiny, run.path)
    assert run.verify() == []


@pytest.mark.parametrize("position", [0, 9, 20])
def test_a_header_that_cannot_be_read_is_left_out_on_request(run, position):
    flip(run.weights_path(1), position, 7)
    with pytest.raises(ModelError, match=r"repetition-001\.safetensors: repetition 1 is broken"):
        run.load()
    assert run.load(skip_broken=True).table.repetitions == (0, 2)


def test_nothing_usable_is_said(tiny, tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, tiny)
    with pytest.raises(ModelError, match="repetition 0 is missing; repetition 1 is missing; repetition 2 is missing; train"):
        run.load()
    with pytest.raises(ModelError, match=r"run: holds no finished repetition yet; train one with `mach train`"):
        run.load(skip_broken=True)
    with pytest.raises(ModelError, match=r"repetition 7 is missing; train again with --repetitions 7-7"):
        run.load([7])


def test_parts_trained_apart_decode_as_one(tiny, tmp_path):
    """Repetitions 0-1 here and 2-3 there, copied together, equal all four trained here in groups of two."""
    four = CONFIG.replace(repetitions=4)
    train(CONFIG.replace(repetitions=2), tiny, tmp_path / "a")
    train(four, tiny, tmp_path / "b", repetitions=[2, 3])
    train(CONFIG.replace(repetitions=2), tiny, tmp_path / "all")
    whole = train(four, tiny, tmp_path / "all")  # an ensemble grows: the first two stay
    for file in (tmp_path / "a").glob("repetition-*"):
        shutil.copy(file, tmp_path / "b")
    joined = load(tmp_path / "b", device="cpu")
    assert joined.table.repetitions == whole.table.repetitions == (0, 1, 2, 3)
    features = tiny.split("test").features
    ours, theirs = joined.predict_topk(features, 5), whole.predict_topk(features, 5)
    assert np.array_equal(ours.labels, theirs.labels) and np.array_equal(ours.scores, theirs.scores)
    assert Run.open(tmp_path / "b").verify() == []
    for file in (tmp_path / "b").glob("repetition-00[23]*"):
        shutil.copy(file, tmp_path / "a")  # the other way round, into a folder that was meant for two
    assert load(tmp_path / "a", device="cpu").table.repetitions == (0, 1, 2, 3)


def test_growing_keeps_what_is_there(run, tiny):
    before = weights_of(run.path)
    train(CONFIG.replace(repetitions=5), tiny, run.path)
    grown = Run.open(run.path)
    assert grown.finished() == [0, 1, 2, 3, 4] and grown.config.repetitions == 5
    assert all(same_bits(before[r], weights_of(run.path)[r]) for r in range(3))
    assert train(CONFIG, tiny, run.path).table.repetitions == (0, 1, 2)  # asked for three of them, gives three
    assert Run.open(run.path).config.repetitions == 5


def test_a_repetition_of_another_run_is_named(run, tiny, tmp_path):
    train(CONFIG.replace(seed=1), tiny, tmp_path / "other")
    for kind in ("json", "safetensors"):
        shutil.copy(tmp_path / "other" / f"repetition-001.{kind}", run.path)
    with pytest.raises(ModelError, match="repetition 1 was trained with another config, data set or format; train again"):
        run.load()
    train(CONFIG, tiny, run.path)
    assert run.verify() == []


def test_another_config_or_data_set_is_refused(run, tiny, tiny_dense):
    with pytest.raises(ModelError, match=r"run: was made with other settings: seed=0 there, 5 now; choose another --out"):
        train(CONFIG.replace(seed=5), tiny, run.path)
    with pytest.raises(ModelError, match=rf"run: was trained on another data set .*{tiny.fingerprint}.*{tiny_dense.fingerprint}"):
        train(CONFIG, tiny_dense, run.path)
    assert run.verify() == []


def test_settings_that_are_equal_are_the_same_run(tiny, tmp_path):
    Run.create(tmp_path / "run", CONFIG.replace(learning_rate=1, dropout=0), tiny)
    Run.create(tmp_path / "run", CONFIG.replace(learning_rate=np.float64(1), dropout=0.0), tiny)
    Run.create(tmp_path / "run2", CONFIG.replace(learning_rate=np.float64(1)), tiny)
    assert Run.open(tmp_path / "run2").config.learning_rate == 1.0


def test_a_full_disk_keeps_what_is_finished(run, tiny, monkeypatch):
    before = weights_of(run.path)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_file", full)
        with pytest.raises(ModelError, match=r"repetition-003\.safetensors: cannot be written \(.*No space.*before are safe"):
            train(CONFIG.replace(repetitions=4), tiny, run.path)
    assert not list(run.path.glob(".*")) and not run.weights_path(3).exists()
    assert all(same_bits(before[r], weights_of(run.path)[r]) for r in range(3))
    train(CONFIG.replace(repetitions=4), tiny, run.path, resume=True)
    assert Run.open(run.path).finished() == [0, 1, 2, 3]


def test_a_record_never_speaks_of_other_weights(run, monkeypatch):
    """Stored again and stopped before the new record is written, a repetition is unfinished: not new weights, old checksum."""

    def refuse(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_json", refuse)
    other = {name: value + 1 for name, value in weights_of(run.path)[1].items()}
    with pytest.raises(ModelError, match="cannot be written"):
        run.add(1, other, {})
    assert run.finished() == [0, 2]


def test_a_folder_that_cannot_be_written_is_named(tiny, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match=r"file/run: cannot be written \(Not a directory\); choose another --out"):
        Run.create(tmp_path / "file" / "run", CONFIG, tiny)
    with pytest.raises(ModelError, match=r"file: cannot be written \(File exists\); choose another --out"):
        Run.create(tmp_path / "file", CONFIG, tiny)

    def refuse(path, value):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(folder, "write_json", refuse)
    with pytest.raises(ModelError, match=r"run: cannot be written \(Read-only file system\)"):
        Run.create(run.path, CONFIG.replace(repetitions=9), tiny)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The bundled places, cut to 300 lines, and a run on them."""
    at = tmp_path_factory.mktemp("places")
    (at / "raw").mkdir()
    for split in ("train", "test"):
        lines = (bundled.path("places") / f"{split}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        (at / "raw" / f"{split}.tsv").write_text("".join(lines[:300]), encoding="utf-8")
    return prepare(at / "raw", at / "data", hash_bits=12)


def test_texts_are_asked_without_the_data_set(places, tmp_path):
    data = Dataset.open(shutil.copytree(places.path, tmp_path / "data"))
    train(CONFIG.replace(epochs=1, family="xxhash"), data, tmp_path / "run")
    names, text = list(data.label_names), data.split("train").text[0]
    features = data.split("train").features
    assert Run.open(tmp_path / "run").verify() == []
    shutil.rmtree(data.path)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    model = load(tmp_path / "moved", device="cpu")
    assert [model.name_of(k) for k in range(len(names))] == names
    found = model.predict_topk([text, "Zürich"], k=3)
    assert found.labels.shape == (2, 3)
    assert np.array_equal(model.predict_topk(text, k=3).labels, found.labels[:1])
    del features
    vectorized = model.vectorizer.transform([text])
    assert np.array_equal(model.predict_topk(vectorized, k=3).scores, found.scores[:1])


def test_shared_files_are_checked(places, tmp_path):
    train(CONFIG.replace(epochs=1, repetitions=1), places, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    names = sorted(run.manifest["files"])
    assert names == ["label_names_blob.npy", "label_names_offsets.npy",
                     "vectorizer/kept.npy", "vectorizer/vectorizer.json", "vectorizer/weights.npy"]  # fmt: skip
    for name in names:
        whole = (run.path / name).read_bytes()
        flip(run.path / name, len(whole) - 2, 1)
        assert run.verify() == [f"{name} has changed: it does not match its checksum"]
        (run.path / name).unlink()
        assert run.verify() == [f"{name} is missing"]
        with pytest.raises(MachError, match=re.escape(name.split("/")[0])):
            run.load()
        (run.path / name).write_bytes(whole)
    assert run.verify() == []


def test_names_are_needed_to_hash_names(tiny, tmp_path):
    with pytest.raises(ConfigError, match="family 'xxhash' hashes label names and this table has none"):
        train(CONFIG.replace(family="xxhash"), tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_hash_is_refused(run, tiny):
    """A manifest whose table no longer comes out of its seed: the hash code changed."""
    manifest = dict(run.manifest)
    manifest["table"] = dict(manifest["table"]) | {"fingerprint": "0" * 32}
    run._write_manifest(manifest)
    with pytest.raises(ModelError, match=r"the label table has fingerprint .*read it with the version of mach"):
        load(run.path, device="cpu")


@pytest.mark.parametrize(("table", "width"), [("hashed", 256), ("identity", 512)])
def test_the_data_decide_the_width(tiny, tmp_path, table, width):
    model = train(Config(table=table, buckets=13, repetitions=1, epochs=1), tiny, tmp_path / "run", device="cpu")
    assert model.sizes.hidden == width and model.repetitions[0].parameters["input.weight"].shape[-1] == width


def samples_of(path, n_labels, a_sample):
    """Write 30 samples with so many of K labels each."""
    rng = np.random.default_rng(0)
    X, Y = sparse.random_array((30, 9), density=0.5, rng=rng), np.zeros((30, n_labels), np.float32)
    for row in Y:
        row[rng.choice(n_labels, a_sample, replace=False)] = 1
    return write_dataset(path, {"train": (X, Y)})


@pytest.mark.parametrize(("labels", "buckets", "repetitions"), [(1, 1024, 2), (3, 256, 8)])
def test_the_data_decide_buckets_and_repetitions(tmp_path, labels, buckets, repetitions):
    dataset = samples_of(tmp_path / "data", 2000, labels)
    run = Run.create(tmp_path / "run", Config(), dataset)
    assert (run.sizes.n_buckets, run.config.repetitions, run.config.buckets) == (buckets, repetitions, "auto")
    for asked, there in ((11, 11), (3, 11), ("auto", 11)):
        again = Run.create(tmp_path / "run", Config(repetitions=asked), dataset)
        assert (again.config.repetitions, again.manifest["key"]) == (there, run.manifest["key"])


@pytest.mark.parametrize(("labels", "width", "buckets"), [(1, 64, 20_000), (3, None, 2048)])
def test_the_data_decide_the_bottleneck(tmp_path, labels, width, buckets):
    """That is narrow before the many buckets of many labels, of which samples have one each."""
    dataset = samples_of(tmp_path / "data", 40_000, labels)
    config = Config(hidden=65, epochs=1, rerank=0, grouped=0, batch_size=8)
    train(config, dataset, tmp_path / "run", repetitions=[0], device="cpu", workers=1)
    weights = load_file(Run.open(tmp_path / "run").weights_path(0))
    assert weights["head.weight"].shape == (buckets, width or 65)
    assert ("bottleneck.weight" in weights) == (width is not None)
    train(config, dataset, tmp_path / "run", device="cpu", workers=1)
    found = load(tmp_path / "run", device="cpu").predict_topk(dataset.split("train").features, 3)
    assert found.labels.shape == (30, 3)


def test_a_run_of_before_widths_were_decided_by_the_data_is_read(run):
    """Its width is in its settings alone."""
    manifest = dict(run.manifest)
    manifest["sizes"] = {name: value for name, value in manifest["sizes"].items() if name != "hidden"}
    earlier = run._write_manifest(manifest)
    assert earlier.sizes == run.sizes and load(run.path, device="cpu").sizes.hidden == 9


@given(st.sets(st.integers(0, 300), min_size=1, max_size=20))
def test_numbers_written_are_numbers_read(numbers):
    assert parse_repetitions(format_repetitions(sorted(numbers))) == sorted(numbers)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("8", list(range(8))), (" 2 ", [0, 1]), ("0-7", list(range(8))), ("3-3", [3]), ("3,5,8-11", [3, 5, 8, 9, 10, 11]),
     ("5, 3,3", [3, 5]), ("0,", None), ("", None), ("0", None), ("-1", None), ("3-1", None), ("a", None), ("1-2-3", None),
     ("²", None), ("1-", None), ("100001", None), ("0-99999999999999", None)],
)  # fmt: skip
def test_repetitions_are_parsed_or_refused(text, numbers):
    if numbers is None:
        with pytest.raises(ConfigError, match=r"repetitions=.*(must be a count such as 8|must be a count in|must lie in)"):
            parse_repetitions(text)
    else:
        assert parse_repetitions(text) == numbers


def test_dense_runs_too(tiny_dense, tmp_path):
    train(CONFIG, tiny_dense, tmp_path / "run")
    assert Run.open(tmp_path / "run").sizes.features == "dense"
    features = tiny_dense.split("test").features
    assert load(tmp_path / "run", device="cpu").predict_topk(features, 3).labels.shape == (60, 3)


def test_two_data_sets_of_one_content_are_one(tiny, tmp_path):
    """Prepared twice, here and there, the data has one fingerprint: parts of an ensemble fit together."""
    splits = {name: (tiny.split(name).features.to_scipy(), tiny.split(name).labels.to_scipy()) for name in tiny.split_names}
    again = write_dataset(tmp_path / "again", splits)
    assert Run.create(tmp_path / "a", CONFIG, tiny).manifest == Run.create(tmp_path / "b", CONFIG, again).manifest
