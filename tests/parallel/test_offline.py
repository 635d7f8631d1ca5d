"""Prediction by several processes: the same file as by one, gone on from after whatever ended it, and asked to stop."""

from __future__ import annotations

import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from joblib.externals.loky.process_executor import TerminatedWorkerError

from mach.config import Config
from mach.decoding.reference import label_scores, topk
from mach.errors import ConfigError, DataError, ModelError, Stopped
from mach.model import Model
from mach.parallel import calibrate, offline, train
from mach.parallel.offline import predict
from mach.store import predictions
from mach.store.predictions import read_facts, read_predictions

N, K = 60, 40


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(Config(buckets=13, repetitions=3, hidden=8, epochs=1, batch_size=100, rerank=0), tiny, path)
    return path


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of 10 rows: six for the test split."""
    monkeypatch.setattr(predictions, "GROUP_ROWS", 10)


@pytest.fixture
def asked(monkeypatch):
    """Note the first row's features of every call of the model in this process."""
    asked, real = [], Model.predict_topk

    def predict_topk(self, X, k, **options):
        asked.append(len(X))
        return real(self, X, k, **options)

    monkeypatch.setattr(Model, "predict_topk", predict_topk)
    return asked


@pytest.fixture
def said(run, tiny):
    """Score every label of every test sample: float64 loops."""
    model = train(Config(buckets=13, repetitions=3, hidden=8, epochs=1, batch_size=100, rerank=0), tiny, run)
    outputs_NRB, table_RK = model.bucket_logits(tiny.split("test").features), model.table.array()
    return [label_scores(outputs_RB, table_RK, loss="logistic", estimator="logits") for outputs_RB in outputs_NRB.tolist()]


def test_two_workers_write_what_one_does(run, tiny, tmp_path):
    done = []
    assert predict(run, tiny.path, tmp_path / "one", k=7, progress=lambda *counts: done.append(counts)) == N
    assert predict(run, tiny.path, tmp_path / "two", k=7, workers=2, progress=lambda *counts: done.append(counts)) == N
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert pq.ParquetFile(tmp_path / "two").num_row_groups == 6
    assert done[0] == (0, N) and done[-1] == (N, N) and done.count((0, N)) >= 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("table", ["hashed", "identity"])
def test_approximate_scores_are_of_products_in_the_type_of_training(tiny, tmp_path, table):
    sizes = {"hashed": {"buckets": 13, "repetitions": 3}, "identity": {}}[table]
    config = Config(table=table, hidden=8, epochs=1, batch_size=100, rerank=0, precision="bfloat16", head_precision="float32")
    train(config.replace(**sizes), tiny, tmp_path / "run")
    for name, how in (("exact", {}), ("near", {"approximate": True}), ("two", {"approximate": True, "workers": 2})):
        predict(tmp_path / "run", tiny.path, tmp_path / name, k=K, **how)
    exact, near = scores_by_label(tmp_path / "exact"), scores_by_label(tmp_path / "near")
    assert not np.array_equal(exact, near) and np.allclose(exact, near, rtol=0.02, atol=0.02)
    assert (tmp_path / "near").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_facts(tmp_path / "near")["products"] == "torch.bfloat16" and "products" not in read_facts(tmp_path / "exact")


def scores_by_label(path):
    """Give the scores (N, K) of a prediction file that holds every label of every sample."""
    scores_NK = np.empty((N, K), np.float32)
    for rows, top in read_predictions(path):
        scores_NK[rows[:, None], top.labels] = top.scores
    return scores_NK


@pytest.mark.parametrize("wanted", [{"probabilities": True}, {"precision": 0.2}, {"min_probability": 0.2}])
def test_two_workers_believe_what_one_does(run, tiny, tmp_path, wanted):
    calibrate(run, tiny, precisions=[0.2], k=7)
    for n in (1, 2):
        predict(run, tiny.path, tmp_path / f"p{n}", k=7, workers=n, **wanted)
    assert (tmp_path / "p1").read_bytes() == (tmp_path / "p2").read_bytes()
    lengths = list(map(len, pq.read_table(tmp_path / "p1")["probabilities"].to_pylist()))
    assert min(lengths) == max(lengths) == 7 if "probabilities" in wanted else 0 <= min(lengths) < max(lengths) <= 7


def test_relative_paths_and_repetitions_reach_the_workers(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in (1, 2):
        predict(os.path.relpath(run), os.path.relpath(tiny.path), f"p{n}", k=3, repetitions=[0, 2], workers=n, split="dev")
    assert read_facts("p2")["repetitions"] == [0, 2] and pq.read_table("p1").equals(pq.read_table("p2"))


def test_a_worker_that_fails_loses_nothing_and_nothing_is_done_twice(run, tiny, tmp_path, asked):
    predict(run, tiny.path, tmp_path / "whole", k=7)
    out, in_the_way = tmp_path / "p", tmp_path / "p.parts" / "rows-000000000020.parquet"
    in_the_way.mkdir(parents=True)
    (in_the_way / "file").touch()
    with pytest.raises(DataError, match=r"p: predictions cannot be written .* run the same command again to go on"):
        predict(run, tiny.path, out, k=7, workers=2)
    finished = sorted(p.name for p in (tmp_path / "p.parts").glob("rows-*") if p.is_file())  # not what a worker was cut short in
    assert "rows-000000000000.parquet" in finished and len(finished) < 6 and not out.exists()
    (in_the_way / "file").unlink()
    in_the_way.rmdir()
    with pytest.raises(DataError, match=r"parts: holds finished parts of another job \(k=7 there, 6 now\)"):
        predict(run, tiny.path, out, k=6, workers=2)
    asked.clear()
    predict(run, tiny.path, out, k=7)
    assert len(asked) == 6 - len(finished)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and not (tmp_path / "p.parts").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_part_under_way(run, tiny, tmp_path, monkeypatch, asked, number, status):
    predict(run, tiny.path, tmp_path / "whole", k=7)
    real = Model.predict_topk
    before = signal.signal(number, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

    def signalled(self, X, k, **options):
        if len(asked) == 1:
            os.kill(os.getpid(), number)
        return real(self, X, k, **options)

    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Model, "predict_topk", signalled)
        with pytest.raises(Stopped, match=r"p: stopped after 20 of 60 rows$") as stop:
            predict(run, tiny.path, tmp_path / "p", k=7)
    assert signal.signal(number, before) is signal.default_int_handler
    assert stop.value.status == status and len(list((tmp_path / "p.parts").iterdir())) == 2
    asked.clear()
    predict(run, tiny.path, tmp_path / "p", k=7)
    assert len(asked) == 4 and (tmp_path / "p").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_wish_of_a_killed_process_of_the_same_number_is_no_wish(run, tiny, tmp_path):
    """In a container every process may be number 7."""
    (tmp_path / "p.parts").mkdir()
    (tmp_path / "p.parts" / f".stop.{os.getpid()}.tmp").write_text("SIGTERM")
    assert predict(run, tiny.path, tmp_path / "p", k=7) == N


def test_workers_are_told_to_stop(run, tiny, tmp_path, monkeypatch):
    def stopped(works, n_workers, stop, real=offline._run):
        stop.file.write_text("SIGTERM")
        real(works, n_workers, stop)

    with monkeypatch.context() as patch:
        patch.setattr(offline, "_run", stopped)
        with pytest.raises(Stopped, match="p: stopped after 0 of 60 rows"):
            predict(run, tiny.path, tmp_path / "p", k=7, workers=2)
    assert not (tmp_path / "p").exists()
    (tmp_path / "p.parts" / f".stop.{os.getpid()}.tmp").unlink()  # what made it would have


def test_a_worker_that_is_killed_is_told(run, tiny, tmp_path, monkeypatch):
    class Killed:
        def __init__(self, **_):
            pass

        def __call__(self, _):
            raise TerminatedWorkerError("killed")

    monkeypatch.setattr(offline.joblib, "Parallel", Killed)
    with pytest.raises(ModelError, match=r"p: a worker was killed, .* again to go on, with fewer workers"):
        predict(run, tiny.path, tmp_path / "p", k=7, workers=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_restrict_and_exclude(run, tiny, tmp_path, said, workers):
    rng = np.random.default_rng(0)
    subset = sorted(rng.choice(K, 20, replace=False).tolist())
    without = [rng.choice(K, rng.integers(0, 15), replace=False).tolist() for _ in range(N)]
    (tmp_path / "r.txt").write_text("\n".join(map(str, subset)))
    (tmp_path / "e.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in without))
    np.save(tmp_path / "r.npy", subset)
    matrix = sp.lil_array((N, K))
    for n, row in enumerate(without):
        matrix[n, row] = 1
    sp.save_npz(tmp_path / "e.npz", matrix.tocsr())

    def labels(name, **files):
        files = {what: tmp_path / file for what, file in files.items()}
        predict(run, tiny.path, tmp_path / name, k=5, workers=workers, **files)
        return pq.read_table(tmp_path / name)["labels"].to_pylist()

    def brute(allowed, lists):
        return [topk([s if k in allowed and k not in out else -np.inf for k, s in enumerate(row)], 5)
                for row, out in zip(said, lists, strict=True)]  # fmt: skip

    assert labels("r", restrict="r.txt") == brute(subset, [[]] * N)
    assert labels("e", exclude="e.txt") == brute(range(K), without)
    assert labels("both", restrict="r.npy", exclude="e.npz") == brute(subset, without)
    assert "restrict" in read_facts(tmp_path / "both") and "exclude" not in read_facts(tmp_path / "r")


def test_a_choice_is_part_of_the_job(run, tiny, tmp_path):
    in_the_way = tmp_path / "p.parts" / "rows-000000000050.parquet"
    (in_the_way / "folder").mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be written"):
        predict(run, tiny.path, tmp_path / "p", k=5)
    (tmp_path / "r").write_text("\n".join("0123456789"))
    with pytest.raises(DataError, match=r"another job \(restrict=None there, [0-9a-f]{32} now\)"):
        predict(run, tiny.path, tmp_path / "p", k=5, restrict=tmp_path / "r")


def test_what_is_refused(run, tiny, tmp_path):
    def refused(words, error=DataError, **options):
        with pytest.raises(error, match=words):
            predict(run, tiny.path, tmp_path / "p", **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "r"]

    (tmp_path / "r").write_text("3\n4\nx\n")
    (tmp_path / "e").write_text("\n" * 12 + " ".join(map(str, range(37))) + "\n" * 48)
    refused("workers=0 must be at least 1", ConfigError, workers=0)
    refused("r:3: 'x' is no label id", restrict=tmp_path / "r")
    refused("r: has 3 lines for 60 samples", exclude=tmp_path / "r")
    (tmp_path / "r").write_text("3\n4\n")
    refused(r"k=3 must lie in \[1, 2\], the number of different labels in restrict", ConfigError, k=3, restrict=tmp_path / "r")


def test_the_line_that_leaves_too_few_labels_is_named_before_the_work(run, tiny, tmp_path, asked):
    (tmp_path / "e").write_text("\n" * 12 + " ".join(map(str, range(37))) + "\n" * 48)
    with pytest.raises(DataError, match=r"e:13: leaves 3 labels to find k=5 among"):
        predict(run, tiny.path, tmp_path / "p", k=5, exclude=tmp_path / "e")
    assert asked == [] and not (tmp_path / "p.parts").exists()
    (tmp_path / "r").write_text("0\n1\n38\n39\n")
    with pytest.raises(DataError, match=r"e:13: leaves 2 labels to find k=3 among"):
        predict(run, tiny.path, tmp_path / "p", k=3, restrict=tmp_path / "r", exclude=tmp_path / "e")
    predict(run, tiny.path, tmp_path / "q", k=3, exclude=tmp_path / "e")
    assert sorted(pq.read_table(tmp_path / "q")["labels"].to_pylist()[12]) == [37, 38, 39]


def test_k_is_a_hundred_or_what_there_is(run, tiny, tmp_path):
    (tmp_path / "r").write_text("3\n4\n")
    predict(run, tiny.path, tmp_path / "p")
    predict(run, tiny.path, tmp_path / "q", restrict=tmp_path / "r")
    assert [len(pq.read_table(tmp_path / name)["labels"][0]) for name in "pq"] == [K, 2]
