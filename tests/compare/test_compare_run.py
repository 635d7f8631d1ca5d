"""Comparisons: each configuration trained once and measured as the library itself measures; all that can be refused is, first."""

from __future__ import annotations

import errno
import json
import os
import re
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from mach.compare import run as compare_run
from mach.compare.evaluate import evaluator_for
from mach.compare.run import Named, by_repetitions, compare, facts_of, measure, read_configurations
from mach.config import Config
from mach.data import write_dataset
from mach.errors import ConfigError, DataError, ModelError
from mach.metrics import precision_at_k
from mach.parallel import train
from mach.parallel.memory import group_bytes
from mach.parallel.second import Samples, second_stage
from mach.store import Run

SMALL = Config(buckets=13, repetitions=3, hidden=8, epochs=1, batch_size=50, rerank=0)
HASHED, FULL = Named("hashed", SMALL), Named("full", SMALL.replace(table="identity"))


class Here:
    """Stands for a pool of one process, and works in this one."""

    def __init__(self, *args, **options): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(compare_run, "ProcessPoolExecutor", Here)


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return train(SMALL, tiny, tmp_path_factory.mktemp("runs") / "run")


def put(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def files_of(folder):
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("repetition-*")}


def test_configurations_share_a_base(tmp_path):
    path = put(
        tmp_path / "c.toml", '[base]\nhidden = 8\n[[configurations]]\nname = "a"\n[[configurations]]\nname = "b"\nhidden = 9\n'
    )
    assert read_configurations(path) == [Named("a", Config(hidden=8)), Named("b", Config(hidden=9))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"c.toml: needs \[\[configurations\]\] with different names, got none"),
        ('[[configurations]]\nname = "a"\n' * 2, r"different names, got \['a', 'a'\]"),
        ("[[configurations]]\nhidden = 8", "configuration 1 needs a name that can be a folder's, got None"),
        ('[[configurations]]\nname = "../a"', "needs a name that can be a folder's, got '../a'"),
        ("[[configuration]]", r"c.toml: unknown key 'configuration'; did you mean 'configurations'\?"),
        ('[[configurations]]\nname = "a"\nhiden = 8', r"c.toml, 'a': unknown key 'hiden'; did you mean 'hidden'\?"),
        ('[base]\nbukets = 8\n[[configurations]]\nname = "a"', r"unknown key 'bukets'; did you mean 'buckets'\?"),
        ('[[configurations]]\nname = "a"\nepochs = 0', r"epochs=0 must lie in \[1, inf\]"),
        *((text, r"c.toml: base and configurations must be tables") for text in ("base = 3", "configurations = 3")),
        ("configurations = [3]", r"must be tables: write \[base\] and \[\[configurations\]\]"),
        ("[", "c.toml: is not TOML"),
    ],
)
def test_a_file_that_says_no_comparison_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        read_configurations(put(tmp_path / "c.toml", text))


def test_what_the_data_decided_is_told(tiny, tmp_path, here):
    (row,) = compare(tiny, tmp_path / "out", [Named("auto", Config(repetitions=1, epochs=1))], device="cpu", say=list)
    assert (row.config["hidden"], row.config["buckets"]) == (256, 40)


def test_it_trains_measures_and_reports(tiny, tmp_path, here):
    said = []
    rows = compare(tiny, tmp_path / "out", [HASHED, FULL], device="cpu", say=said.append)
    assert said == ["[1/2] hashed", "[2/2] full"]
    for row, n_repetitions, n_buckets in zip(rows, (3, 1), (13, 40), strict=True):
        run = Run.open(tmp_path / "out" / row.name)
        model, records = run.load(), run.records().values()
        top = model.predict_topk(tiny.split("test").features, 5)
        assert row.metrics["P@1"] == precision_at_k(top.labels, tiny.split("test").labels, 1)
        assert row.parameters == n_repetitions * (50 * 8 + 8 + n_buckets * 8 + n_buckets)
        assert row.bytes == sum(run.weights_path(r).stat().st_size for r in run.finished()) > 2 * row.parameters
        assert row.train_s == sum(record["train_s"] for record in records) > 0
        assert row.peak_bytes == max(record["peak_bytes"] for record in records) > 1e7
        trained = group_bytes(run.config, run.sizes, n_repetitions, device=torch.device("cpu"))
        second = second_stage(run.config, run.sizes, Samples.of(tiny))
        assert row.predicted_bytes == (trained if second is None else second.peak_bytes) >= trained
        assert row.parts_s["head forward"] > 0 and 0 < sum(row.time_by_part.values()) <= row.train_s + 0.01
        assert row.predict_s >= row.decode_s > 0 and row.n_test == 60
        assert (row.config["table"], row.config["buckets"]) == (run.config.table, n_buckets)
        assert (row.config["repetitions"], row.config["hidden"]) == (n_repetitions, 8)
    assert [[n for n, _ in row.by_repetitions] for row in rows] == [[1, 2, 3], []]
    assert rows[0].by_repetitions[-1][1]["P@1"] == rows[0].metrics["P@1"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"] == tiny.fingerprint and [row["name"] for row in results["rows"]] == ["hashed", "full"]
    assert results["rows"][0]["metrics"] == rows[0].metrics and results["rows"][1]["config"]["table"] == "identity"
    assert "2 configurations compared" in (tmp_path / "out" / "report.html").read_text()


def test_a_second_call_trains_only_what_is_left(tiny, tmp_path, here):
    compare(tiny, tmp_path, [HASHED])
    before = files_of(tmp_path)
    rows = compare(tiny, tmp_path, [HASHED, FULL])
    after = files_of(tmp_path)
    assert len(before) == 6 and {name: after[name] for name in before} == before and len(after) == 8
    Run.open(tmp_path / "hashed").weights_path(1).unlink()
    again = compare(tiny, tmp_path, [HASHED, FULL])
    assert [row.metrics for row in again] == [row.metrics for row in rows]
    changed = {name for name, known in files_of(tmp_path).items() if known != after[name]}
    assert {name.name for name in changed} == {"repetition-001.json", "repetition-001.safetensors"}


def test_repetitions_beyond_the_configured_ones_do_not_count(tiny, tmp_path, here):
    train(SMALL, tiny, tmp_path / "hashed")
    (row,) = compare(tiny, tmp_path, [Named("hashed", SMALL.replace(repetitions=2))])
    assert row.config["repetitions"] == 2 and row.parameters == 2 * (50 * 8 + 8 + 13 * 8 + 13)
    assert [n for n, _ in row.by_repetitions] == [1, 2]


def test_what_could_only_fail_later_is_refused_before_training(tiny, tmp_path, here, monkeypatch):
    monkeypatch.setattr(compare_run, "_measure", lambda *_: pytest.fail("it trained"))
    untested = write_dataset(tmp_path / "data", {"train": (sp.csr_array(np.eye(5, 9)), sp.csr_array(np.eye(5, 4)))})
    with pytest.raises(DataError, match="data: has no split 'test'; there are: train"):
        compare(untested, tmp_path / "out", [HASHED])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"buckets=41 must lie in \[2, 40\]"):
        compare(tiny, tmp_path / "out", [HASHED, Named("wide", SMALL.replace(buckets=41))])
    Run.create(tmp_path / "out" / "other", SMALL.replace(seed=3), tiny)
    with pytest.raises(ModelError, match="other: was made with other settings: seed=3 there, 0 now; choose another --out"):
        compare(tiny, tmp_path / "out", [HASHED, Named("other", SMALL)])


def test_a_worker_that_is_killed_is_named(tiny, tmp_path, here, monkeypatch):
    def killed(*_):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(compare_run, "_measure", killed)
    with pytest.raises(ModelError, match="hashed: its process was killed, perhaps for want of memory; run again"):
        compare(tiny, tmp_path, [HASHED])


def test_a_full_disk_at_the_end_keeps_what_is_trained(tiny, tmp_path, here, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(compare_run, "write_json", full)
        with pytest.raises(DataError, match=r"the report cannot be written \(.*No space left on device\); run again"):
            compare(tiny, tmp_path, [HASHED])
    before = files_of(tmp_path)
    compare(tiny, tmp_path, [HASHED])
    assert files_of(tmp_path) == before and (tmp_path / "report.html").exists()


def test_measuring_in_chunks_equals_measuring_at_once(model, tiny, monkeypatch):
    evaluator, test = evaluator_for(tiny), tiny.split("test")
    top = model.predict_topk(test.features, 40)
    evaluator.update(top.labels, top.scores, test.labels)
    monkeypatch.setattr("mach.model.SCORE_BYTES", 4 * 3 * 13 * 25)  # 25 rows a chunk
    metrics, predict_s, decode_s = measure(model, tiny)
    assert metrics == pytest.approx(evaluator.result(), abs=1e-12)
    assert predict_s > decode_s > 0


def test_decoding_with_the_first_repetitions_equals_the_selected_model(model, tiny, monkeypatch):
    monkeypatch.setattr("mach.model.SCORE_BYTES", 4 * 3 * 13 * 25)
    found = dict(by_repetitions(model, tiny))
    assert list(found) == [1, 2, 3]
    for n, metrics in found.items():
        top = model.select(range(n)).predict_topk(tiny.split("test").features, 5)
        evaluator = evaluator_for(tiny)
        evaluator.update(top.labels, top.scores, tiny.split("test").labels)
        assert metrics == pytest.approx(evaluator.result(), abs=1e-12)
    assert found[1] != found[3]
    assert by_repetitions(model.select([2]), tiny) == []


def test_the_numbers_of_repetitions_double(tiny, tmp_path):
    model = train(SMALL.replace(repetitions=8), tiny)
    assert [n for n, _ in by_repetitions(model, tiny)] == [1, 2, 4, 8]
    assert [n for n, _ in by_repetitions(model.select([1, 3, 4, 5, 7]), tiny)] == [1, 2, 4, 5]


def test_dense_features_are_measured_too(tiny_dense, tiny):
    dense = train(SMALL.replace(repetitions=1), tiny_dense)
    top = dense.predict_topk(tiny_dense.split("test").features, 5)
    assert measure(dense, tiny_dense)[0]["P@1"] == precision_at_k(top.labels, tiny.split("test").labels, 1)


def test_the_facts_of_the_data(tiny):
    facts = facts_of(tiny)
    assert (facts.name, facts.n_train, facts.n_test, facts.n_features, facts.n_labels) == ("tiny", 200, 60, 50, 40)
    assert facts.labels_a_point == tiny.split("train").labels.nnz / 200
    assert re.fullmatch(r"[12]\.\d+", str(facts.labels_a_point))
