"""Training as a whole: the same bits whoever runs it, and what is refused."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mach
from mach.config import Config
from mach.errors import ConfigError, DataError, MissingExtra, ModelError
from mach.metrics import precision_at_k
from mach.parallel import progress, runners, train
from mach.store import Run
from mach.train.log import log_path

CONFIG = Config(buckets=13, repetitions=4, hidden=9, layers=1, dropout=0.3, batch_size=100, epochs=2)


def weights_of(path):
    return {r: load_file(Run.open(path).weights_path(r)) for r in Run.open(path).finished()}


def test_two_processes_give_the_bits_of_one(tiny, tmp_path, monkeypatch):
    """The same groups of repetitions, one thread each: here one after the other, there side by side."""
    train(CONFIG, tiny, tmp_path / "two", workers=2)
    assert Run.open(tmp_path / "two").records()[3]["group"] == [2, 3]
    monkeypatch.setattr(runners, "group_size", lambda *args, **kwargs: 2)
    train(CONFIG, tiny, tmp_path / "one", workers=1)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys() == {0, 1, 2, 3}
    for r in one:
        for name in one[r]:
            assert torch.equal(one[r][name], two[r][name])


def test_an_error_in_a_worker_arrives_as_it_was(tiny, tmp_path):
    with pytest.raises(DataError, match=r"patience=1 needs a dev split, or validation above 0"):
        splits = {"train": (tiny.split("train").features.to_scipy(), tiny.split("train").labels.to_scipy())}
        dataset = mach.write_dataset(tmp_path / "data", splits)
        train(CONFIG.replace(patience=1), dataset, tmp_path / "run", workers=2)


def test_the_planted_problem_is_solved_from_end_to_end(tiny):
    config = Config(buckets=16, repetitions=6, hidden=32, dropout=0.1, batch_size=16, epochs=20, learning_rate=0.02)
    model = train(config, tiny)
    test = tiny.split("test")
    assert precision_at_k(model.predict_topk(test.features, 5).labels, test.labels, 1) >= 0.9


def test_more_repetitions_are_trained_in_groups_that_fit(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "free_memory", lambda device: 0)
    train(CONFIG, tiny, tmp_path / "run")
    assert [record["group"] for record in Run.open(tmp_path / "run").records().values()] == [[0], [1], [2], [3]]


def test_a_model_without_a_folder_lives_as_long_as_it_is_held(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = train(CONFIG.replace(epochs=1), tiny)
    (folder,) = tmp_path.glob("mach-*")
    before = model.predict_topk(tiny.split("test").features, 3)
    part = model.select([1, 2])
    del model
    gc.collect()
    assert not folder.exists()
    assert part.predict_topk(tiny.split("test").features, 3).labels.shape == before.labels.shape  # what is mapped stays


def test_a_run_that_fails_leaves_no_temporary_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match="buckets=41 must lie in"):
        train(CONFIG.replace(buckets=41), tiny)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error")
def test_the_full_head_is_one_repetition(tiny, tmp_path):
    config = CONFIG.replace(table="identity")
    with pytest.raises(
        ConfigError, match=r"repetitions=\[0, 1\]: the full head \(table='identity'\) has one repetition, number 0"
    ):
        train(config, tiny, tmp_path / "run", repetitions=[0, 1])
    model = train(config, tiny, tmp_path / "run")
    assert (len(model.repetitions), model.sizes.n_buckets, model.table.is_identity) == (1, 40, True)
    assert Run.open(tmp_path / "run").config.repetitions == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetitions": []}, r"repetitions=\[\] must be numbers from 0 on, at least one"),
        ({"repetitions": [0, -1]}, r"repetitions=\[-1, 0\] must be numbers from 0 on"),
        ({"workers": 0}, r"workers=0 must be at least 1"),
        ({"workers": -2}, r"workers=-2 must be at least 1"),
        ({"device": "gpu"}, r"device='gpu' must be 'auto', 'cpu' or 'cuda:i'"),
        ({"device": "cuda:x"}, r"device='cuda:x' must be 'auto', 'cpu' or 'cuda:i'"),
        ({"device": "cuda:99"}, r"device='cuda:99': this machine has \d+ CUDA devices"),
    ],
)
def test_options_that_cannot_work_are_named(tiny, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(CONFIG, tiny, tmp_path / "run", **options)


def test_a_repetition_named_twice_is_trained_once(tiny, tmp_path):
    model = train(CONFIG.replace(epochs=1), tiny, tmp_path / "run", repetitions=[5, 3, 5])
    assert sorted(model.table.repetitions) == [3, 5]
    assert Run.open(tmp_path / "run").finished() == [3, 5]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_holds_losses_validations_and_the_end(tiny, tmp_path):
    train(CONFIG, tiny, tmp_path / "run")
    lines = lines_of(tmp_path / "run" / "logs" / "group-0-3.jsonl")
    steps = {line["step"]: line for line in lines if "step" in line}
    assert {1, 2, 4} <= set(steps)  # the first, the ends of both epochs
    assert steps[1]["loss"] > 0 and steps[1]["n_steps"] == 4 and steps[1]["peak_bytes"] > 0
    assert set(steps[4]["validation"]) == {"P@1", "P@3", "P@5"} and steps[4]["epoch"] == 2
    assert all(line["samples_per_s"] > 0 for line in steps.values())
    assert lines[-1]["finished"] == [0, 1, 2, 3] and lines[-1]["seconds"] >= 0


def test_a_log_that_cannot_be_written_is_named(tiny, tmp_path):
    Run.create(tmp_path / "run", CONFIG, tiny)
    (tmp_path / "run" / "logs").write_text("in the way")
    with pytest.raises(ModelError, match=r"logs/group-0-3\.jsonl: the log cannot be written \(File exists\)"):
        train(CONFIG, tiny, tmp_path / "run")


def test_a_missing_extra_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        MissingExtra, match=r"writing TensorBoard events needs an optional package: pip install 'mach\[tensorboard\]'"
    ):
        train(CONFIG, tiny, tmp_path / "run", tensorboard=True)


def test_progress_is_read_from_the_log_to_its_end(tiny, tmp_path, monkeypatch, capsys):
    seen = []
    update = progress.Watch._update
    monkeypatch.setattr(
        progress.Watch, "_update", lambda self, name, fields: (seen.append((name, fields)), update(self, name, fields))
    )
    train(CONFIG, tiny, tmp_path / "run", progress=True)
    assert [fields for _, fields in seen] == lines_of(tmp_path / "run" / "logs" / "group-0-3.jsonl")
    assert {name for name, _ in seen} == {"0-3"}
    out, err = capsys.readouterr()
    assert out == "" and "r 0-3" in err and "4/4" in err and "P@1" in err


def test_progress_skips_what_an_earlier_run_logged_even_half_a_line(tmp_path, monkeypatch):
    log, seen = tmp_path / "log", []
    log.write_text('{"step": 1}\n{"st')
    monkeypatch.setattr(progress.Watch, "_update", lambda self, name, fields: seen.append(fields))
    with progress.Watch({"0": log}, shown=True), open(log, "a") as file:
        file.write('{"step": 2}\n{"half')
    assert seen == [{"step": 2}]


def test_workers_share_the_threads(tiny, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(runners, "_run", lambda found, *_: jobs.extend(found))
    monkeypatch.setattr(runners.os, "cpu_count", lambda: 8)
    with pytest.raises(ModelError, match="is missing"):
        train(CONFIG, tiny, tmp_path / "run", workers=3)
    assert [(job.repetitions, job.threads, job.device) for job in jobs] == [
        ((0,), 2, "cpu"),
        ((1,), 2, "cpu"),
        ((2, 3), 2, "cpu"),
    ]
    assert all(isinstance(job.run, Path) and job.run.is_absolute() and job.data.is_absolute() for job in jobs)


def test_logs_are_found_where_groups_write_them(tmp_path):
    assert log_path(tmp_path, [0, 1, 2]) == tmp_path / "logs" / "group-0-2.jsonl"
    assert log_path(tmp_path, [3]) == tmp_path / "logs" / "group-3-3.jsonl"
    assert log_path(tmp_path, [3, 5]) == tmp_path / "logs" / "group-3,5.jsonl"


def test_a_killed_worker_is_named_with_what_to_do(tiny, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise runners.TerminatedWorkerError("killed")

    monkeypatch.setattr(runners.joblib, "Parallel", killed)
    with pytest.raises(ModelError, match=r"run: a worker was killed, perhaps for lack of memory; go on with --resume"):
        train(CONFIG, tiny, tmp_path / "run", workers=2)


def test_a_wrong_device_leaves_nothing_behind(tiny, tmp_path):
    with pytest.raises(ConfigError, match="device='tpu'"):
        train(CONFIG, tiny, tmp_path / "run", device="tpu")
    assert not (tmp_path / "run").exists()
