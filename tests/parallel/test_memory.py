"""Groups that fit: the estimate, the size it gives, and what happens where memory runs out all the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mach.config import Config
from mach.errors import ModelError
from mach.inspect.history import histories
from mach.inspect.show import show
from mach.model import Sizes, resolve_precision
from mach.parallel import memory, runners, train
from mach.parallel.memory import free_memory, group_bytes, group_size, is_out_of_memory
from mach.store import Run
from mach.train import checkpoint
from mach.train.checkpoint import checkpoint_path, leftover_checkpoints, read_progress
from mach.train.log import log_path, read_log

CPU = torch.device("cpu")
SIZES = Sizes(n_features=1000, n_labels=500, n_buckets=64, hidden=32, features="sparse", labels_a_sample=2.0)
CONFIG = Config(
    buckets=13, repetitions=4, hidden=9, layers=1, dropout=0.3, batch_size=50, epochs=2, precision="float32"
)  # 8 steps


@given(st.integers(0, 10**12), st.integers(1, 64), st.integers(1, 40))
def test_a_group_fits_its_share_of_memory_or_is_one(free_bytes, n_workers, n_repetitions):
    config = Config(hidden=32, repetitions=n_repetitions)
    size = group_size(config, SIZES, free_bytes=free_bytes, n_workers=n_workers, device=CPU)
    assert 1 <= size <= n_repetitions
    assert size == 1 or group_bytes(config, SIZES, size, device=CPU) * n_workers <= free_bytes
    assert size == n_repetitions or group_bytes(config, SIZES, size + 1, device=CPU) * n_workers > 0.9 * free_bytes


def test_the_bytes_of_a_group_are_counted_by_hand():
    config = Config(hidden=32, precision="bfloat16", batch_size=10)
    weights = 2 * 1000 * 32 + 4 * (32 + 64 * 32 + 64)  # rows of the input layer, and the rest
    moments = 4 * (1000 + 2 * (32 + 64 * 32 + 64))
    stays = 3 * (weights + moments + 500 + 2 * 64 * 32)  # the label table has a byte an entry
    hidden, outputs, gradient = 3 * 10 * 32 * 16, 3 * 10 * 64 * 2, 3 * 64 * 32 * 2
    comes_and_goes = weights + hidden + outputs * (1 + 3 * 2) + 2 * gradient + (2 << 20)  # a chunk of the weights lies apart
    assert group_bytes(config, SIZES, 3, device=CPU) == memory.PROCESS_BYTES + stays + comes_and_goes
    one_label = dataclasses.replace(SIZES, labels_a_sample=1.0)
    by_row = memory.PROCESS_BYTES + stays - 3 * 4 * (2 * (64 * 32 + 64) - 2 * 64) + comes_and_goes  # a number an output each
    assert group_bytes(config, one_label, 3, device=CPU) == by_row


def test_the_settings_of_the_head_are_counted_by_hand():
    config = Config(
        hidden=32, precision="bfloat16", batch_size=10, head_batch_size=4, bottleneck=8, head_precision="float8",
        head_optimizer="rowwise-adam",
    )  # fmt: skip
    encoder, head = 2 * 1000 * 32 + 4 * (32 + 32 * 8), 64 * 8 + 4 * 64
    kept = 4 * (1000 + 2 * (32 + 32 * 8)) + 4 * 2 * 64
    stays = 3 * (encoder + head + kept + 500)
    hidden, chunk = 3 * 10 * (32 * 16 + 8 * 12), 3 * 64 * (4 * (2 + 12) + 2 * 8 * 2)
    comes_and_goes = encoder + head + hidden + chunk + (2 << 20)
    assert group_bytes(config, SIZES, 3, device=CPU) == memory.PROCESS_BYTES + stays + comes_and_goes
    in_float8 = config.replace(precision="float8")  # their products are of what the device multiplies fast
    size = resolve_precision("float8", CPU).itemsize
    plain = group_bytes(config.replace(precision="bfloat16" if size == 2 else "float32"), SIZES, 3, device=CPU)
    assert group_bytes(in_float8, SIZES, 3, device=CPU) == plain + 3 * 4 * 8 * (1 + size)
    many = Sizes(n_features=1000, n_labels=10**6, n_buckets=10**6, hidden=32, features="sparse", labels_a_sample=1.0)
    full = config.replace(table="identity", head_precision="bfloat16", head_batch_size=0)
    of_memory = [group_bytes(full.replace(head_memory=MiB), many, 1, device=CPU) for MiB in (0, 64, 128)]
    assert of_memory[0] == of_memory[1] == of_memory[2] - (64 << 20)
    more = group_bytes(full.replace(compensated=0.25), many, 1, device=CPU) - of_memory[0]
    assert more == 10**6 * 4 + 10**6 // 4 * 8 * 2


def test_what_buckets_are_learnt_from_counts_where_it_is_most():
    config = Config(hidden=32, head_optimizer="adamw")
    few = group_bytes(config, SIZES, 1, device=CPU)
    one = dataclasses.replace(SIZES, labels_a_sample=1.0)
    assert group_bytes(config, one, 1, device=CPU) == few
    many = dataclasses.replace(one, n_labels=100_000)
    assert group_bytes(config, many, 1, device=CPU) == memory.PROCESS_BYTES + 2 * 4 * 256 * 100_000
    for other in (config.replace(grouped=0), config.replace(table="identity")):
        assert group_bytes(other, many, 1, device=CPU) < few + 100_000 + 64 * 100_000


def test_a_lone_repetition_is_held_once():
    one, two, three = (group_bytes(Config(hidden=32, precision="float32"), SIZES, n, device=CPU) for n in (1, 2, 3))
    weights = 4 * (1000 * 32 + 32 + 64 * 32 + 64)
    assert two - one == three - two + weights


def test_the_identity_table_is_not_held():
    config = Config(buckets=500, head_precision="float32", head_optimizer="adamw")
    hashed, full = (group_bytes(config.replace(table=table), SIZES, 1, device=CPU) for table in ("hashed", "identity"))
    assert hashed - full == 500  # a byte an entry


def test_hashed_features_count_as_rows():
    config = Config(input_precision="float32")
    full, hashed = (group_bytes(config.replace(feature_buckets=n), SIZES, 8, device=CPU) for n in (0, 100))
    assert full - hashed == 8 * 900 * (32 * 4 + 4) + 900 * 32 * 4


@pytest.mark.parametrize(("limit", "left"), [("max", None), ("1000", 300), ("600", 0)])
def test_a_container_leaves_what_its_limit_says(tmp_path, monkeypatch, limit, left):
    (tmp_path / "max").write_text(f"{limit}\n")
    (tmp_path / "current").write_text("700\n")
    monkeypatch.setattr(memory, "CGROUPS", [(str(tmp_path / "none"), ""), (str(tmp_path / "max"), str(tmp_path / "current"))])
    found = free_memory(CPU)
    assert found == left if left is not None else found > 1 << 20


def test_errors_of_memory_are_told_from_others():
    for allocate in (lambda: torch.empty(1 << 60), lambda: np.empty(1 << 50), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def failing(at_step, most):
    """Give a training step that runs out of memory at a step in groups of more than `most`."""
    take = runners_group().Group._step

    def step(self, ready, want_loss):
        if self.step == at_step and len(self.repetitions) > most:
            raise MemoryError("planted")
        return take(self, ready, want_loss)

    return step


def runners_group():
    from mach.train import group

    return group


@pytest.mark.parametrize("at_step", [0, 5])
def test_a_group_that_does_not_fit_goes_on_in_smaller_ones(tiny, tmp_path, monkeypatch, at_step):
    """At once, or from its checkpoint; each repetition ends as it would have, to rounding."""
    train(CONFIG, tiny, tmp_path / "whole")
    steps = []
    monkeypatch.setattr(runners_group().Group, "_step", failing(at_step, 1))
    read = checkpoint.read_progress
    monkeypatch.setattr(runners_group(), "read_progress", lambda path: steps.append(read(path)["step"]) or read(path))
    train(CONFIG, tiny, tmp_path / "run", checkpoint_s=0)
    records = Run.open(tmp_path / "run").records()
    assert [record["group"] for record in records.values()] == [[0], [1], [2], [3]]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert set(steps) == {at_step}  # where the group stood
    for r in range(4):
        whole, cut = (load_file(Run.open(tmp_path / name).weights_path(r)) for name in ("whole", "run"))
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-5)
    (warning,) = [line for line in read_log(log_path(tmp_path / "run", [0, 1, 2, 3])) if line.get("event") == "warning"]
    assert warning["text"] == "repetitions 0-3 do not fit the memory together: 0-1 and 2-3 go on apart"
    assert warning["at_step"] == at_step
    assert any("0-1 and 2-3 go on apart" in line for history in histories(tmp_path / "run") for line in show(history))


def test_a_group_is_cut_no_more_than_needed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runners_group().Group, "_step", failing(3, 2))
    train(CONFIG, tiny, tmp_path / "run")
    records = Run.open(tmp_path / "run").records()
    assert [record["group"] for record in records.values()] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_repetition_that_does_not_fit_alone_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runners_group().Group, "_step", failing(0, 0))
    with pytest.raises(ModelError, match=r"repetition 0 alone does not fit .* of cpu \(planted\): it takes about 0.44 GiB"):
        train(CONFIG, tiny, tmp_path / "run")


def test_a_killed_worker_is_tried_again_with_half(tiny, tmp_path, monkeypatch):
    parallel, calls = runners.joblib.Parallel, []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise runners.TerminatedWorkerError("killed")
        return parallel(*args, **kwargs)

    monkeypatch.setattr(runners.joblib, "Parallel", killed)
    train(CONFIG, tiny, tmp_path / "run", workers=2)
    assert [record["group"] for record in Run.open(tmp_path / "run").records().values()] == [[0], [1], [2], [3]]


class Killed(BaseException):
    """Stands in for a kill: nothing in the package may catch it."""


@pytest.mark.parametrize("n_parts_written", [1, 2])
def test_killed_while_a_checkpoint_is_cut(tiny, tmp_path, monkeypatch, n_parts_written):
    """After one part the group still counts; after all, the parts do. Nothing is trained twice or lost."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runners_group().Group, "_step", failing(5, 2))
        write, written = checkpoint.write_checkpoint, []

        def stopped(path, tensors, progress):
            if len(written) == n_parts_written:
                raise Killed
            written.append(path)
            write(path, tensors, progress)

        patch.setattr(checkpoint, "write_checkpoint", stopped)
        if n_parts_written == 2:
            unlink = checkpoint.Path.unlink

            def refuse(self, missing_ok=False):
                if self.name == "group-0-3.safetensors":
                    raise Killed
                unlink(self, missing_ok)

            patch.setattr(checkpoint.Path, "unlink", refuse)
        train(CONFIG, tiny, tmp_path / "run", checkpoint_s=0)
    left = {file.name for file in (tmp_path / "run" / "checkpoints").glob("*.safetensors")}
    assert left == {"group-0-3.safetensors", "group-0-1.safetensors", "group-2-3.safetensors"} - (
        {"group-2-3.safetensors"} if n_parts_written == 1 else set()
    )
    assert read_progress(checkpoint_path(tmp_path / "run", [0, 1]))["step"] == 5
    train(CONFIG, tiny, tmp_path / "run", resume=True)
    groups = [record["group"] for record in Run.open(tmp_path / "run").records().values()]
    assert groups == ([[0, 1, 2, 3]] * 4 if n_parts_written == 1 else [[0, 1], [0, 1], [2, 3], [2, 3]])


def test_which_checkpoints_no_longer_count():
    assert leftover_checkpoints([[0, 1], [2, 3]]) == []
    assert leftover_checkpoints([[0, 1, 2, 3], [0, 1]]) == [[0, 1]]
    assert leftover_checkpoints([[0, 1, 2, 3], [0, 1], [2, 3], [4]]) == [[0, 1, 2, 3]]


def test_what_to_lower_says_how_much_each_setting_saves():
    sizes = Sizes(n_features=10**6, n_labels=10**6, n_buckets=10**6, hidden=512, features="sparse", labels_a_sample=1.0)
    config = Config(table="identity", head_precision="float32", head_optimizer="adamw", precision="float32", batch_size=64)
    text = memory.what_to_lower(config, sizes, CPU)
    now, _, less = text.partition("; with one of these settings less: ")
    gib = group_bytes(config, sizes, 1, device=CPU) / 2**30
    assert now == f"it takes about {gib:.2f} GiB"
    changes = dict(part.removesuffix(" GiB").split(" ") for part in less.split(", "))
    assert list(changes) == sorted(changes, key=lambda change: float(changes[change]))  # the largest saving first
    for change, said in changes.items():
        name, _, value = change.partition("=")
        other = config.replace(**{name: int(value) if value.isdigit() else value})
        lower = dataclasses.replace(sizes, hidden=other.n_hidden(10**6))
        assert float(said) == pytest.approx(group_bytes(other, lower, 1, device=CPU) / 2**30, abs=0.006) and float(said) < gib
    assert {change.partition("=")[0] for change in changes} == {
        "head_precision", "head_optimizer", "hidden", "bottleneck", "feature_buckets"
    }  # fmt: skip
    hashed = memory.what_to_lower(Config(), sizes, CPU)
    assert "buckets=500000 " in hashed and "bottleneck" not in hashed


def test_settings_that_bear_on_each_other_are_lowered_together():
    sizes = Sizes(n_features=10, n_labels=10**6, n_buckets=10**6, hidden=512, features="dense", labels_a_sample=1.0)
    config = Config(table="identity", compensated=0.5, batch_size=2048, head_batch_size=2048)
    found = memory.what_to_lower(config, sizes, CPU)  # float8 knows no compensation, and no batch is below the head's
    assert "head_precision=float8" in found and "feature_buckets" not in found
