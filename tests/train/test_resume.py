"""A run killed at any moment and resumed ends with the bits of one never killed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from mach.config import Config, dump_toml, load_config
from mach.data import Dataset
from mach.errors import ModelError
from mach.parallel import runners, train
from mach.store import Run
from mach.train import checkpoint, group

SMALL = Config(
    buckets=13,
    repetitions=2,
    grouped=0,
    hidden=9,
    layers=1,
    dropout=0.3,
    batch_size=100,
    epochs=3,
    learning_rate=0.02,
    weight_decay=0.01,
)  # 6 steps
STOPPING = {"patience": 2, "epochs": 12, "learning_rate": 0.3, "loss": "softmax"}  # stops before its last epoch


class Killed(BaseException):
    """Stands in for a kill: nothing in the package may catch it."""


def weights_of(run):
    """Give every stored repetition's tensors, by number."""
    return {r: load_file(Run.open(run).weights_path(r)) for r in Run.open(run).finished()}


def assert_same_bits(run, truth):
    ours, theirs = weights_of(run), weights_of(truth)
    assert ours.keys() == theirs.keys()
    for r in ours:
        assert ours[r].keys() == theirs[r].keys()
        for name in ours[r]:
            assert torch.equal(ours[r][name], theirs[r][name]), (r, name)


def facts_of(run):
    """Give what the records say of each repetition, but for times, memory and checksums."""
    return {
        r: {k: v for k, v in record.items() if k in ("steps", "group", "bucket_P@1", "bytes", "parameters", "versions", "run")}
        for r, record in Run.open(run).records().items()
    }


def kill_at(monkeypatch, n):
    """Let the n-th durable change (a rename, or the removal of a checkpoint) be the first that does not happen."""
    count, replace, unlink = [0], os.replace, Path.unlink

    def counted(change):
        def changed(*args, **kwargs):
            count[0] += 1
            if count[0] == n:
                raise Killed
            change(*args, **kwargs)

        return changed

    def unlinked(path, **kwargs):
        (counted(unlink) if path.exists() and not path.name.endswith(".tmp") else unlink)(path, **kwargs)

    monkeypatch.setattr(os, "replace", counted(replace))
    monkeypatch.setattr(Path, "unlink", unlinked)
    return count


@pytest.fixture(scope="module", params=[{}, STOPPING, {"table": "identity"}], ids=["plain", "patience", "full"])
def case(request, tiny, tmp_path_factory):
    """Give a config, and the folder of a run of it that nothing interrupted."""
    config, truth = SMALL.replace(**request.param), tmp_path_factory.mktemp("truth") / "run"
    train(config, tiny, truth, checkpoint_s=0)
    return config, truth


def test_checkpoints_change_no_bit_and_leave_nothing(case, tiny, tmp_path):
    config, truth = case
    train(config, tiny, tmp_path / "run")  # two minutes between checkpoints: none is written
    assert_same_bits(tmp_path / "run", truth)
    assert facts_of(tmp_path / "run") == facts_of(truth)
    assert not list(truth.glob("checkpoints/*")) and not list(truth.glob("**/.*"))


def test_the_best_weights_are_kept_where_the_last_are_not(tiny, tmp_path, monkeypatch):
    """The file that a repetition ends with is the one of its best epoch, which is not its last."""
    kept, keep = {}, group._keep_best

    def note(trained, r, path):
        kept[r] = trained.step, {name: value.clone() for name, value in trained.packed.repetition(r).items()}
        keep(trained, r, path)

    monkeypatch.setattr(group, "_keep_best", note)
    train(SMALL.replace(**STOPPING), tiny, tmp_path / "run")
    steps = {record["steps"] for record in Run.open(tmp_path / "run").records().values()}
    assert len(steps) == 1
    last = steps.pop()
    assert last < 12 * 2  # stopped early, together
    for r, (step, best) in kept.items():
        assert step <= last - 2 * 2
        for name, value in weights_of(tmp_path / "run")[r].items():
            assert torch.equal(value, best[name])


def test_killed_between_any_two_durable_changes(case, tiny, tmp_path, monkeypatch):
    """Every rename and every removal of a checkpoint, one run each."""
    config, truth = case
    with monkeypatch.context() as patch:
        count = kill_at(patch, 0)
        train(config, tiny, tmp_path / "counted", checkpoint_s=0)
    assert count[0] >= 9
    for n in range(1, count[0] + 1):
        run = tmp_path / str(n)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, n)
            train(config, tiny, run, checkpoint_s=0)
        train(config, tiny, run, resume=True)
        assert_same_bits(run, truth)
        assert facts_of(run) == facts_of(truth), n  # also the group: nobody was trained with other companions
        assert Run.open(run).verify() == []
        assert [p.name for p in run.glob("checkpoints/*")] == []
        shutil.rmtree(run)


def test_killed_again_and_again(case, tiny, tmp_path, monkeypatch):
    config, truth = case
    kills = 0
    while True:
        try:
            with monkeypatch.context() as patch:
                kill_at(patch, 4)  # fewer, and an epoch's two best files would be all that ever happens
                train(config, tiny, tmp_path / "run", checkpoint_s=0, resume=True)
            break
        except Killed:
            kills += 1
            assert kills < 20
    assert kills >= 2
    assert_same_bits(tmp_path / "run", truth)


def test_killed_while_finishing_without_a_checkpoint_before(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)  # manifest, checkpoint, weights and record of repetition 0 are there
        train(SMALL, tiny, tmp_path / "run")
    assert Run.open(tmp_path / "run").finished() == [0]
    train(SMALL, tiny, tmp_path / "run", resume=True)
    assert [facts["group"] for facts in facts_of(tmp_path / "run").values()] == [[0, 1], [0, 1]]


def test_work_is_not_done_twice(tiny, tmp_path, monkeypatch):
    steps, step = [], group.Group._step

    def counted(self, rows, want_loss):
        steps.append(self.step)
        if len(steps) == 5:
            raise Killed
        return step(self, rows, want_loss)

    monkeypatch.setattr(group.Group, "_step", counted)
    with pytest.raises(Killed):
        train(SMALL, tiny, tmp_path / "run", checkpoint_s=0)
    train(SMALL, tiny, tmp_path / "run", resume=True)
    assert steps == [*range(5), *range(4, 6)]
    train(SMALL, tiny, tmp_path / "run", resume=True)
    train(SMALL, tiny, tmp_path / "run")
    assert len(steps) == 7


SCRIPT = """
import sys
from mach.config import load_config
from mach.data import Dataset
from mach.parallel import train
import torch
torch.set_num_threads(1)
train(load_config(sys.argv[1]), Dataset.open(sys.argv[2]), sys.argv[3], checkpoint_s=0, resume=True)
"""


def kill_when_under_way(arguments, checkpoint_file, least_step):
    """Start training in a process of its own and kill it outright some milliseconds after a checkpoint of `least_step`."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, arguments)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (checkpoint_file.exists() and checkpoint.read_progress(checkpoint_file)["step"] >= least_step):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "no checkpoint within a minute"
            time.sleep(0.001)
        time.sleep(secrets.randbelow(30) / 1000)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.stderr.close()
    return checkpoint.read_progress(checkpoint_file)["step"]


@pytest.mark.parametrize(
    "settings", [pytest.param({}, id="plain"), pytest.param({"patience": 200}, id="patience", marks=pytest.mark.slow)]
)
def test_killed_outright_at_a_random_moment(tiny, tmp_path, settings):
    config = SMALL.replace(epochs=200, **settings)  # 400 steps
    (tmp_path / "config.toml").write_text(dump_toml(config))
    train(config, tiny, tmp_path / "truth")
    run = tmp_path / "run"
    file = checkpoint.checkpoint_path(run, [0, 1])
    step = kill_when_under_way([tmp_path / "config.toml", tiny.path, run], file, least_step=10)
    assert 10 <= step < 400
    train(load_config(tmp_path / "config.toml"), Dataset.open(tiny.path), run, resume=True)
    assert_same_bits(run, tmp_path / "truth")
    assert Run.open(run).verify() == []


def interrupted(config, dataset, run, monkeypatch, n_checkpoints=3, **options):
    """Train until `n_checkpoints` are written, then die."""
    write, left = checkpoint.write_checkpoint, [n_checkpoints]

    def counted(*args):
        write(*args)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(group, "write_checkpoint", counted)
        train(config, dataset, run, checkpoint_s=0, **options)


def test_work_under_way_is_not_passed_over(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    interrupted(SMALL, tiny, run, monkeypatch)
    with pytest.raises(
        ModelError, match=r"run: repetitions 0-1 are under way here; add --resume to go on, or choose another --out"
    ):
        train(SMALL, tiny, run)
    with pytest.raises(
        ModelError, match=r"run: repetitions 0-1 were begun together; resume all of them, or delete .*checkpoints"
    ):
        train(SMALL, tiny, run, repetitions=[1], resume=True)
    train(SMALL, tiny, run, repetitions=[2, 3])  # others are free to go
    assert Run.open(run).finished() == [2, 3]
    train(SMALL, tiny, run, resume=True)
    assert Run.open(run).finished() == [0, 1, 2, 3]


def test_groups_are_resumed_as_they_were_begun(tiny, tmp_path, monkeypatch):
    """More memory or other workers on resume change no group, so no bit."""
    config, run = SMALL.replace(repetitions=5), tmp_path / "run"
    monkeypatch.setattr(runners, "group_size", lambda *args, **kwargs: 2)
    train(config, tiny, tmp_path / "truth")
    interrupted(config, tiny, run, monkeypatch, n_checkpoints=7)  # in the second group of three
    monkeypatch.setattr(runners, "group_size", lambda *args, **kwargs: 1)
    train(config, tiny, run, resume=True)
    assert [facts["group"] for facts in facts_of(run).values()] == [[0], [1, 2], [1, 2], [3], [4]]
    for r in (1, 2):
        for name, value in weights_of(run)[r].items():
            assert torch.equal(value, weights_of(tmp_path / "truth")[r][name])


def test_resuming_with_other_settings_or_data_is_refused(tiny, tiny_dense, tmp_path, monkeypatch):
    run = tmp_path / "run"
    interrupted(SMALL, tiny, run, monkeypatch)
    with pytest.raises(ModelError, match=r"run: was made with other settings: hidden=9 there, 8 now; choose another --out"):
        train(SMALL.replace(hidden=8), tiny, run, resume=True)
    with pytest.raises(ModelError, match=r"settings: seed=0 there, 1 now; loss='logistic' there, 'softmax' now;"):
        train(SMALL.replace(loss="softmax", seed=1), tiny, run, resume=True)
    with pytest.raises(
        ModelError, match=rf"another data set \(fingerprint {tiny.fingerprint}, this one has {tiny_dense.fingerprint}"
    ):
        train(SMALL, tiny_dense, run, resume=True)
    train(SMALL, tiny, run, resume=True)


def test_a_checkpoint_of_another_ensemble_is_refused(tiny, tmp_path, monkeypatch):
    """Folders copied together may bring one: of the same shapes, it would go on silently with another hash."""
    for seed in (0, 1):
        interrupted(SMALL.replace(seed=seed), tiny, tmp_path / str(seed), monkeypatch)
    shutil.copytree(tmp_path / "0" / "checkpoints", tmp_path / "1" / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(ModelError, match=r"group-0-1\.safetensors: .*another"):
        train(SMALL.replace(seed=1), tiny, tmp_path / "1", resume=True)


@pytest.mark.parametrize("harm", ["cut", "header", "empty"])
def test_a_broken_checkpoint_is_named(tiny, tmp_path, monkeypatch, harm):
    run = tmp_path / "run"
    interrupted(SMALL, tiny, run, monkeypatch)
    file = checkpoint.checkpoint_path(run, [0, 1])
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-1], "header": whole[:20] + b"\xff" + whole[21:], "empty": b""}[harm])
    with pytest.raises(
        ModelError, match=r"group-0-1\.safetensors: the checkpoint is broken \(.*\); delete it to start this group"
    ):
        train(SMALL, tiny, run, resume=True)
    file.unlink()
    train(SMALL, tiny, run, resume=True)
    assert Run.open(run).finished() == [0, 1]


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path):
    checkpoint.write_checkpoint(tmp_path / "c" / "x.safetensors", {"a": torch.zeros(2)}, {"step": 3})
    assert checkpoint.read_progress(tmp_path / "c" / "x.safetensors") == {"step": 3}
    into = torch.zeros(2)
    checkpoint.read_tensors(tmp_path / "c" / "x.safetensors", {"a": into})
    for other in ({"b": into}, {"a": torch.zeros(2, 2)}, {"a": into, "b": into}):
        with pytest.raises(ModelError, match=r"x\.safetensors: the checkpoint is of another model; delete it to start"):
            checkpoint.read_tensors(tmp_path / "c" / "x.safetensors", other)


def test_progress_is_read_from_one_file_though_another_takes_its_place(tmp_path, monkeypatch):
    """Whoever looks while a process trains: `mach train` on its folder, or a test that waits for a step."""
    path, map_file = tmp_path / "c" / "x.safetensors", torch.UntypedStorage.from_file
    checkpoint.write_checkpoint(path, {"a": torch.zeros(2)}, {"step": 3, "seconds": 1.06258741258})

    def replaced(*args, **kwargs):
        checkpoint.write_checkpoint(path, {"a": torch.zeros(2)}, {"step": 4, "seconds": 2.0})
        return map_file(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced)
    assert checkpoint.read_progress(path)["step"] == 3


def test_a_full_disk_while_writing_a_checkpoint_is_named_and_can_be_resumed(tiny, tmp_path, monkeypatch):
    run, save, n_calls = tmp_path / "run", checkpoint.save_file, [0]

    def full(tensors, path, metadata):
        n_calls[0] += 1
        if n_calls[0] > 4:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            ModelError, match=r"the checkpoint cannot be written \(.*No space.*\); free some space and go on with"
        ):
            train(SMALL, tiny, run, checkpoint_s=0)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["group-0-1.safetensors"]
    train(SMALL, tiny, run, resume=True)
    train(SMALL, tiny, tmp_path / "truth")
    assert_same_bits(run, tmp_path / "truth")


def test_a_checkpoint_holds_all_state_and_little_more(tiny, tmp_path, monkeypatch):
    """Weights, two moments of the dense ones, one second moment a row and repetition; progress as text."""
    run = tmp_path / "run"
    interrupted(SMALL.replace(head_optimizer="adamw"), tiny, run, monkeypatch)
    with safe_open(checkpoint.checkpoint_path(run, [0, 1]), framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}
    dense = {"input.bias", "layers.0.weight", "layers.0.bias", "head.weight", "head.bias"}
    assert set(sizes) == {
        "input.weight", "optimizer.input.weight.second", *dense,
        *(f"optimizer.{name}.{moment}" for name in dense for moment in ("first", "second")),
    }  # fmt: skip
    assert sizes["optimizer.input.weight.second"] == 50 * 2
    progress = checkpoint.read_progress(checkpoint.checkpoint_path(run, [0, 1]))
    assert (progress["repetitions"], progress["step"], len(progress["standings"])) == ([0, 1], 3, 2)


def test_groups_are_known_from_their_start_where_there_are_several(tiny, tmp_path, monkeypatch):
    """The first group finishes, the second is stopped before any checkpoint was due: it goes on as the group it was."""
    config = SMALL.replace(repetitions=4)
    monkeypatch.setattr(runners, "group_size", lambda *args, **named: 2)
    steps = group.Group.steps

    def stopped(self, on_better):
        if self.repetitions == (2, 3):
            raise Killed
        return steps(self, on_better)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(group.Group, "steps", stopped)
        train(config, tiny, tmp_path / "run")
    assert Run.open(tmp_path / "run").finished() == [0, 1]
    monkeypatch.setattr(runners, "group_size", lambda *args, **named: 1)
    train(config, tiny, tmp_path / "run", resume=True)
    assert [facts["group"] for facts in facts_of(tmp_path / "run").values()] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_the_time_by_part_before_a_stop_is_counted(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)
        train(SMALL, tiny, tmp_path / "run", checkpoint_s=0)
    read = group.read_progress
    monkeypatch.setattr(group, "read_progress", lambda path: read(path) | {"parts_s": read(path)["parts_s"] | {"data": 3000.0}})
    train(SMALL, tiny, tmp_path / "run", resume=True)
    for record in Run.open(tmp_path / "run").records().values():
        assert 3000 <= record["parts_s"]["data"] * len(record["group"]) < 3100 and record["parts_s"]["head forward"] > 0
