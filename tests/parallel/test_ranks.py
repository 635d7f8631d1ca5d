"""The command on several ranks: a run folder like that of one process, gone on with by any number; lost ranks are named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mach
from mach.cli import main
from mach.config import Config, dump_toml
from mach.errors import ConfigError, ModelError, Stopped
from mach.parallel import rerank as reranking
from mach.parallel import sharded, train
from mach.store import Run
from mach.store.reranker import load_reranker
from mach.store.shards import ShardSet
from mach.train.checkpoint import checkpoint_path
from mach.train.log import log_path, read_log
from mach.train.loop import Group
from mach.train.sharded import ShardedGroup

CONFIG = Config(
    table="identity", hidden=9, layers=1, dropout=0.3, batch_size=70, epochs=3, learning_rate=0.02, precision="float32", rerank=0
)  # 9 steps
STOPPING = {"patience": 2, "epochs": 12, "learning_rate": 0.3, "loss": "softmax"}


def together(ranks, size, config, dataset, run, *, stop=None, **how):
    """Train on P ranks that are threads."""
    how = {"device": "cpu", "resume": False, "checkpoint_s": 1e9, "tensorboard": False, "progress": False, "timeout_s": 1, **how}
    return ranks(size, lambda comm: sharded.train_sharded(config, dataset, run, comm=comm, stop=stop, **how))


def weights_of(run):
    return load_file(Run.open(run).weights_path(0))


def assert_same_bits(run, truth):
    ours, theirs = weights_of(run), weights_of(truth)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logged(run, what):
    return [line[what] for line in read_log(log_path(run, [0])) if what in line]


def assert_finished(run, *, like, size):
    """Check that a run is whole, and that it learnt what another did, but for rounding that 9 steps let grow."""
    ours, theirs = Run.open(run), Run.open(like)
    assert ours.verify() == [] and ours.manifest == theirs.manifest
    record, truth = ours.records()[0], theirs.records()[0]
    assert (
        all(record[key] == truth[key] for key in ("bytes", "parameters", "steps", "products", "group"))
        and record["ranks"] == size
    )
    assert not list((run / "checkpoints").glob("*")) and not list(run.glob(".*"))
    assert logged(run, "loss") == pytest.approx(logged(like, "loss"), rel=1e-2)
    assert logged(run, "finished") == [[0]]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    train(CONFIG, tiny, path)
    return path


def test_ranks_write_the_folder_of_one_process(ranks, tiny, alone, tmp_path):
    models = together(ranks, 3, CONFIG, tiny, tmp_path / "run")
    assert_finished(tmp_path / "run", like=alone, size=3)
    found = [model.predict_topk(tiny.split("test").features, 5) for model in models]
    assert all((f.labels == found[0].labels).all() for f in found)
    together(ranks, 2, CONFIG, tiny, tmp_path / "run")  # finished: nothing to do
    assert len(logged(tmp_path / "run", "event")) == 1


def test_rank_0_fits_the_second_stage(ranks, tiny, tmp_path, monkeypatch):
    config, run = CONFIG.replace(rerank=5), tmp_path / "run"

    def too_large(*args, **how):
        raise MemoryError("no room for the lists")

    with monkeypatch.context() as patch:
        patch.setattr(reranking, "rerank", too_large)
        with pytest.raises(ModelError, match=r"can be used, but its second stage does not fit the memory of cpu \(no room for"):
            together(ranks, 2, config, tiny, run)
    assert load_reranker(run, Run.open(run).manifest["key"]) is None and Run.open(run).problems() == {}
    first, _ = together(ranks, 2, config, tiny, run)
    assert first.reranker.depth == 5 and Run.open(run).load().reranker.depth == 5
    train(config, tiny, tmp_path / "alone")
    test, truth = tiny.split("test").features, Run.open(tmp_path / "alone").load()
    assert (first.predict_topk(test, 5).labels == truth.predict_topk(test, 5).labels).mean() > 0.9  # rounding of the products


def stopped_at(monkeypatch, step, rank=1):
    """Let one rank hear a wish to stop within a step."""
    take = ShardedGroup._learn

    def asked(self, ready, want_loss):
        if self.step + 1 == step and self.comm.rank == rank:
            (self.stop_file).write_text("SIGTERM")
            time.sleep(0.15)
        return take(self, ready, want_loss)

    monkeypatch.setattr(ShardedGroup, "_learn", asked)


def stop_and_go_on(ranks, monkeypatch, config, dataset, run, sizes, step=4):
    """Stop on P ranks, and go on with another number."""
    with monkeypatch.context() as patch:
        patch.setattr(ShardedGroup, "stop_file", run.with_name("stop"), raising=False)
        stopped_at(patch, step)
        where = rf"run: stopped at step {step} of {{}} \({sizes[0]} processes\)$"
        with pytest.raises(Stopped, match=where.format(r"\d+")):
            together(ranks, sizes[0], config, dataset, run, stop=run.with_name("stop"))
    run.with_name("stop").unlink()
    found = ShardSet.find(run / "checkpoints", "full", run=Run.open(run).manifest["key"], n_labels=40)
    assert (found.step, len(found.parts)) == (step, sizes[0])
    together(ranks, sizes[1], config, dataset, run, resume=True)


@pytest.mark.parametrize("changes", [{}, STOPPING], ids=["plain", "early stopping"])
def test_a_stopped_run_goes_on_to_the_same_bits(ranks, tiny, tmp_path, monkeypatch, changes):
    config = CONFIG.replace(**changes)
    together(ranks, 2, config, tiny, tmp_path / "truth")
    stop_and_go_on(ranks, monkeypatch, config, tiny, tmp_path / "run", (2, 2), step=4)
    assert_same_bits(tmp_path / "run", tmp_path / "truth")
    assert logged(tmp_path / "run", "event") == ["begun", "stopped", "resumed"]


@pytest.mark.parametrize("sizes", [(2, 3), (4, 1)], ids=str)
def test_another_number_of_ranks_goes_on(ranks, tiny, alone, tmp_path, monkeypatch, sizes):
    stop_and_go_on(ranks, monkeypatch, CONFIG, tiny, tmp_path / "run", sizes)
    assert_finished(tmp_path / "run", like=alone, size=sizes[1])


def test_one_process_goes_on_where_ranks_stopped_and_ranks_where_one_did(ranks, tiny, alone, tmp_path, monkeypatch):
    run, stop = tmp_path / "run", tmp_path / "stop"
    step = Group._step

    def asked(self, ready, want_loss):
        if self.step == 2:
            stop.write_text("SIGTERM")
            time.sleep(0.15)
        return step(self, ready, want_loss)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "_step", asked)
        with pytest.raises(Stopped, match="stopped at step 3 of 9"):
            train(CONFIG, tiny, run, stop=stop)
    stop.unlink()
    assert checkpoint_path(run, [0]).exists()
    with pytest.raises(ModelError, match="are under way here; add --resume"):
        together(ranks, 2, CONFIG, tiny, run)
    with monkeypatch.context() as patch:
        patch.setattr(ShardedGroup, "stop_file", stop, raising=False)
        stopped_at(patch, 6, rank=0)
        with pytest.raises(Stopped, match="stopped at step 6 of 9"):
            together(ranks, 2, CONFIG, tiny, run, stop=stop, resume=True)
    stop.unlink()
    assert not checkpoint_path(run, [0]).exists()
    with pytest.raises(ModelError, match="the full head is under way here; add --resume to go on"):
        train(CONFIG, tiny, run)
    train(CONFIG, tiny, run, resume=True)
    assert_finished(run, like=alone, size=1)


def test_early_stopping_keeps_the_best_as_one_process_does(ranks, tiny, tmp_path):
    config = CONFIG.replace(**STOPPING, dropout=0.0)
    train(config, tiny, tmp_path / "alone")
    together(ranks, 3, config, tiny, tmp_path / "run")
    ours, theirs = (Run.open(tmp_path / name).records()[0] for name in ("run", "alone"))
    assert ours["steps"] < 36 and ours["bucket_P@1"] == pytest.approx(theirs["bucket_P@1"], abs=0.1)
    validations = logged(tmp_path / "run", "validation")
    best = max(v["P@1"] for v in validations)
    assert ours["bucket_P@1"] == best
    model = Run.open(tmp_path / "run").load()
    dev = tiny.split("dev")
    assert mach.precision_at_k(model.predict_topk(dev.features, 1).labels, dev.labels, 1) == best


def test_a_kill_at_any_moment_loses_the_last_steps_only(ranks, tiny, tmp_path, monkeypatch):
    together(ranks, 2, CONFIG, tiny, tmp_path / "truth")
    replace, n = os.replace, [0, 0]

    class Killed(BaseException):
        """Stands in for a kill."""

    def count(*args):
        n[0] += 1
        if n[0] >= n[1]:
            raise Killed
        replace(*args)

    for limit in (3, 6, 8, 9, 11):
        n[:] = 0, limit
        run = tmp_path / f"run-{limit}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", count)
            with pytest.raises(BaseException):  # noqa: B017
                together(ranks, 2, CONFIG, tiny, run, checkpoint_s=0.0)
        together(ranks, 2, CONFIG, tiny, run, resume=True)
        assert_same_bits(run, tmp_path / "truth")


def test_no_room_for_a_checkpoint_is_warned_of_once(ranks, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "free_bytes", lambda folder: 1000)
    together(ranks, 2, CONFIG, tiny, tmp_path / "run", checkpoint_s=0.0)
    (text,) = logged(tmp_path / "run", "text")
    assert re.search(r"no room for a checkpoint of [\d,]+ bytes, 1,000 are free here; there is none yet; training goes on", text)
    assert Run.open(tmp_path / "run").verify() == []


def test_what_cannot_be_trained_together_is_refused(tiny, tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    hashed = CONFIG.replace(table="hashed", buckets=8)
    with pytest.raises(ConfigError, match=r"table='hashed' under torchrun: hashed repetitions need no communication; .* --work"):
        train(hashed, tiny, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^no run folder: processes that torchrun started need an out"):
        train(CONFIG, tiny)
    with pytest.raises(
        ConfigError, match=r"^workers=2: processes that torchrun started need an out that all see, and no workers"
    ):
        train(CONFIG, tiny, tmp_path / "run", workers=2)
    with pytest.raises(ConfigError, match=r"device='cuda:0' for process 0 of this machine, which has 0 GPUs"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        train(CONFIG, tiny, tmp_path / "run", device="cuda:0")
    (tmp_path / "train.txt").write_text("1 1 1\n0 0:1\n")
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "is not a data set yet, and several processes would prepare it at once" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Launched:
    """`torchrun ... -m mach train ...` in a process group of its own."""

    def __init__(self, size, *args):
        launcher = ["torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", size]
        command = [sys.executable, "-m", *launcher, "-m", "mach", *args]
        environment = os.environ | {"PYTHONPATH": str(Path(mach.__file__).parents[1])}
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=environment,
        )  # fmt: skip

    def await_file(self, path):
        deadline = time.monotonic() + 120
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"no {path} within two minutes"
            time.sleep(0.05)

    def workers(self):
        """Give the process numbers of the ranks, in their order."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True).stdout
        return sorted(map(int, found.split()))

    def end(self):
        return self.process.communicate(timeout=120)[1]

    def kill(self):
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


@pytest.fixture
def launch():
    launches = []

    def start(*args):
        launches.append(Launched(*args))
        return launches[-1]

    yield start
    for launched in launches:
        launched.kill()


def begin(launch, size, dataset, tmp_path, *args):
    """Start a run that would take hours, and wait for its first checkpoint."""
    (tmp_path / "config.toml").write_text(dump_toml(CONFIG.replace(epochs=100_000)))
    run = tmp_path / "run"
    started = launch(
        size, "train", dataset.path, "--out", run, "--config", tmp_path / "config.toml", "--checkpoint-seconds", "0.2", *args
    )
    started.await_file(run / "checkpoints" / "full.json")
    return started, run


def found_step(run):
    return ShardSet.find(run / "checkpoints", "full", run=Run.open(run).manifest["key"], n_labels=40).step


def test_a_killed_rank_is_named_by_the_others_and_a_checkpoint_is_left(launch, tiny, tmp_path):
    started, run = begin(launch, 3, tiny, tmp_path)
    os.kill(started.workers()[1], signal.SIGKILL)
    lines = re.findall(r"^mach train: .*", started.end(), flags=re.M)
    step = found_step(run)
    said = f"rank 1 of 3 is gone: it gives no more signs of life; the checkpoint of step {step:,} is whole: go on with --resume"
    assert set(lines) == {f"mach train: {run}: {said}"} and len(lines) <= 2 and step > 0  # torchrun ends who is slower to say so


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(launch, tiny, tmp_path):
    started, run = begin(launch, 2, tiny, tmp_path, "--rank-timeout", "8")
    began = time.monotonic()
    os.kill(started.workers()[1], signal.SIGSTOP)
    lines = re.findall(r"^mach train: .*", started.end(), flags=re.M)
    assert len(lines) == 1 and "rank 1 of 2 is gone" in lines[0] and f"step {found_step(run):,} is whole" in lines[0]
    assert time.monotonic() - began < 90


def test_all_ranks_stop_at_the_same_step_when_the_launcher_is_asked_to(launch, tiny, tmp_path):
    started, run = begin(launch, 2, tiny, tmp_path)
    os.kill(started.process.pid, signal.SIGTERM)
    lines = re.findall(r"^mach train: .*", started.end(), flags=re.M)
    step = found_step(run)
    assert lines == [f"mach train: {run}: stopped at step {step:,} of 300,000 (2 processes); go on with --resume"]
    assert list(read_log(log_path(run, [0])))[-1]["event"] == "stopped" and not list(run.glob(".*"))
