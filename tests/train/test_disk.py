"""Room on the disk: refused before the first step, warned of once while training, and nothing lost."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from mach.config import Config
from mach.errors import ModelError, Stopped
from mach.model import resolve_precision, resolve_rows
from mach.parallel import ready, runners, train
from mach.parallel.plan import disk_bytes
from mach.parallel.rerank import rerank
from mach.parallel.second import Samples, second_stage
from mach.store import Run
from mach.store.folder import sizes_of
from mach.train import checkpoint, group
from mach.train.checkpoint import checkpoint_path, read_progress
from mach.train.log import log_path, read_log

CONFIG = Config(
    input_precision="float32", buckets=13, repetitions=2, hidden=9, layers=1, batch_size=20, epochs=3, rerank=0
)  # 30 steps


def weights_of(run):
    return {r: load_file(Run.open(run).weights_path(r)) for r in Run.open(run).finished()}


def same_bits(run, truth):
    ours, theirs = weights_of(run), weights_of(truth)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[r][name], theirs[r][name]) for r in ours for name in ours[r])


def warnings_of(run):
    return [line for line in read_log(log_path(run, [0, 1])) if line.get("event") == "warning"]


@pytest.mark.parametrize("features", ["tiny", "tiny_dense"])
@pytest.mark.parametrize(
    "settings", [{}, {"input_precision": "auto"}, {"layers": 0}, {"table": "identity", "layers": 3}, {"patience": 3}]
)
def test_the_estimate_is_what_is_written(request, features, tmp_path, monkeypatch, settings):
    """To within the headers of the files: as large as the folder is when the last checkpoint is replaced and all is stored."""
    dataset, config, most = request.getfixturevalue(features), CONFIG.replace(**{"hidden": 300} | settings), [0]
    finish, save = group._finish, checkpoint.save_file

    def size():
        return sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))

    def finished(*args):
        finish(*args)
        most[0] = size()

    def saved(tensors, path, metadata):
        save(tensors, path, metadata)
        if "group" in path.name:
            extra.append(path.stat().st_size)

    extra = []
    monkeypatch.setattr(group, "_finish", finished)
    monkeypatch.setattr(checkpoint, "save_file", saved)
    train(config, dataset, tmp_path / "run", checkpoint_s=0)
    sizes = sizes_of(config, dataset)
    repetitions = list(range(config.n_repetitions(sizes.n_labels, sizes.labels_a_sample)))
    width = resolve_rows(config, sizes.features, resolve_precision(config.precision, torch.device("cpu"))).itemsize
    estimate = disk_bytes(config, sizes, [repetitions], n_workers=1, input_bytes=width)
    written = most[0] + extra[-1]  # with the temporary file beside the checkpoint
    assert 0.97 * written <= estimate <= written


def test_only_groups_under_way_together_hold_checkpoints(tiny):
    sizes = sizes_of(CONFIG, tiny)
    one = disk_bytes(CONFIG, sizes, [[0]], n_workers=1)
    weights = 4 * (50 * 9 + 9 + 90 + 13 * 9 + 13)
    checkpoints = one - weights
    assert disk_bytes(CONFIG, sizes, [], n_workers=3) == 0
    assert disk_bytes(CONFIG, sizes, [[0, 1], [2], [3, 4, 5]], n_workers=1) == 6 * weights + 3 * checkpoints
    assert disk_bytes(CONFIG, sizes, [[0, 1], [2], [3, 4, 5]], n_workers=2) == 6 * weights + 5 * checkpoints
    assert disk_bytes(CONFIG, sizes, [[0, 1], [2], [3, 4, 5]], n_workers=9) == 6 * (weights + checkpoints)


def test_too_little_room_is_refused_before_the_first_step(tiny, tmp_path, monkeypatch):
    needed = disk_bytes(CONFIG, sizes_of(CONFIG, tiny), [[0, 1]], n_workers=1)
    free, asked = [needed - 1], []
    monkeypatch.setattr(ready, "free_bytes", lambda folder: (asked.append(folder), free[0])[1])
    with pytest.raises(ModelError) as caught:
        train(CONFIG, tiny, tmp_path / "run")
    assert re.search(rf"^{tmp_path}/run: training writes {needed:,} more bytes of checkpoints, finished", str(caught.value))
    assert f" and {needed - 1:,} are free there; free some space, choose another --out, or" in str(caught.value)
    assert asked == [tmp_path / "run"] and not (tmp_path / "run" / "logs").exists()
    free[0] = needed
    train(CONFIG, tiny, tmp_path / "run")
    free[0] = 0
    train(CONFIG, tiny, tmp_path / "run")  # nothing is left to write


def test_the_second_stage_needs_room_once_checkpoints_are_gone(tiny, tmp_path, monkeypatch):
    config, free = CONFIG.replace(rerank=10), [0]
    monkeypatch.setattr(ready, "free_bytes", lambda folder: free[0])

    def refused(*, repetitions=None):
        with pytest.raises(
            ModelError, match="more bytes of checkpoints, finished repetitions and shortlists at its fullest"
        ) as caught:
            train(config, tiny, tmp_path / "run", repetitions=repetitions)
        return int(re.search(r"writes ([\d,]+) more", str(caught.value))[1].replace(",", ""))

    sizes = sizes_of(config, tiny)
    weights = 2 * 4 * (50 * 9 + 9 + 90 + 13 * 9 + 13)
    second = second_stage(config, sizes, Samples.of(tiny))
    assert refused() == disk_bytes(config, sizes, [[0, 1]], n_workers=1, after=second.disk_bytes) == weights + second.disk_bytes
    assert refused(repetitions=[1]) == disk_bytes(config, sizes, [[1]], n_workers=1)  # is not fitted then
    free[0] = weights + second.disk_bytes
    monkeypatch.setattr(runners, "rerank_if_wanted", lambda *args, **kwargs: None)
    train(config, tiny, tmp_path / "run")
    free[0] = 0
    assert refused() == second.disk_bytes
    (tmp_path / "run" / "shortlists.parquet").touch()
    assert refused() == second.disk_bytes - second.lists_bytes
    (tmp_path / "run" / "shortlists.parquet").unlink()
    rerank(tmp_path / "run", tiny)
    train(config, tiny, tmp_path / "run")  # nothing is left to write


def test_checkpoints_that_are_there_are_not_needed_again(tiny, tmp_path, monkeypatch):
    Run.create(tmp_path / "run", CONFIG, tiny)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "other.safetensors").write_bytes(12_345 * b"x")
    monkeypatch.setattr(ready, "free_bytes", lambda folder: 0)
    needed = disk_bytes(CONFIG, sizes_of(CONFIG, tiny), [[0, 1]], n_workers=1) - 12_345
    with pytest.raises(ModelError, match=rf"training writes {needed:,} more bytes"):
        train(CONFIG, tiny, tmp_path / "run")


def test_without_room_training_goes_on_and_the_last_checkpoint_stays(tiny, tmp_path, monkeypatch, capsys):
    """Room for a checkpoint at steps 1 to 4, then none, and room again from step 20 on."""
    train(CONFIG, tiny, tmp_path / "truth")
    written, write, now = [], checkpoint.write_checkpoint, [0]
    take = group.Group._step

    def step(self, rows, want_loss):
        loss = take(self, rows, want_loss)
        now[0] = self.step
        return loss

    def noted(path, tensors, progress):
        written.append(progress["step"])
        write(path, tensors, progress)

    monkeypatch.setattr(group.Group, "_step", step)
    monkeypatch.setattr(group, "write_checkpoint", noted)
    monkeypatch.setattr(group, "free_bytes", lambda folder: 10**9 if now[0] < 5 or now[0] >= 20 else 4321)
    train(CONFIG, tiny, tmp_path / "run", checkpoint_s=0, progress=True)
    assert written == [1, 2, 3, 4, *range(20, 31)]
    (warning,) = warnings_of(tmp_path / "run")
    words = (
        r"run/checkpoints: no room for a checkpoint of [\d,]+ bytes, 4,321 are free; the last one, of step 4, stays; training "
    )
    assert warning["at_step"] == 5 and re.search(words, warning["text"])
    err = capsys.readouterr().err
    assert err.count("no room for a checkpoint") == 1 and "r 0-1: warning: " in err
    assert same_bits(tmp_path / "run", tmp_path / "truth")


def test_a_checkpoint_fits_when_it_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(group, "free_bytes", lambda folder: 0)
    train(CONFIG, tiny, tmp_path / "run", checkpoint_s=0)
    needed = int(re.search(r"a checkpoint of ([\d,]+) bytes", warnings_of(tmp_path / "run")[0]["text"])[1].replace(",", ""))
    assert "there is none yet; training goes on" in warnings_of(tmp_path / "run")[0]["text"]
    assert Run.open(tmp_path / "run").finished() == [0, 1]  # what could be stored is
    sizes, save = [], checkpoint.save_file

    def saved(tensors, path, metadata):
        save(tensors, path, metadata)
        sizes.append(path.stat().st_size)

    monkeypatch.setattr(checkpoint, "save_file", saved)
    monkeypatch.setattr(group, "free_bytes", lambda folder: needed)
    train(CONFIG, tiny, tmp_path / "other", checkpoint_s=0)
    assert needed - group.HEADER_BYTES <= max(sizes) <= needed


def test_a_stop_without_room_says_what_it_costs(tiny, tmp_path, monkeypatch):
    take = group.Group._step

    def step(self, rows, want_loss):
        loss = take(self, rows, want_loss)
        if self.step == 4:
            monkeypatch.setattr(group, "free_bytes", lambda folder: 0)
        if self.step == 11:
            monkeypatch.setattr(group.Stop, "asked", True)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(group.Group, "_step", step)
        words = r"run: stopped at step 3 of 30 \(repetitions 0-1, without room to keep the 8 steps after it\)$"
        with pytest.raises(Stopped, match=words):
            train(CONFIG, tiny, tmp_path / "run", checkpoint_s=0)
    assert read_progress(checkpoint_path(tmp_path / "run", [0, 1]))["step"] == 3
    last = json.loads(log_path(tmp_path / "run", [0, 1]).read_text().splitlines()[-1])
    assert (last["event"], last["at_step"], last["kept_step"]) == ("stopped", 11, 3)
    monkeypatch.undo()
    train(CONFIG, tiny, tmp_path / "run", resume=True)
    train(CONFIG, tiny, tmp_path / "truth")
    assert same_bits(tmp_path / "run", tmp_path / "truth")
