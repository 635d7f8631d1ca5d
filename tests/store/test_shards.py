"""Sets of shards: read by any number of ranks, switched whole, refused where they do not fit; a head written in parts."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mach.comm import part_of
from mach.errors import ModelError
from mach.store.shards import Layout, ShardSet, delete_set, is_cut, read_whole, switch, write_part

RUN, K = "0123456789abcdef", 10
OPENING = {"run": RUN, "n_labels": K}


def tensors_of(labels, seed=0, n_labels=K):
    """Give the tensors of a rank: those of the whole model, cut."""
    generator = torch.Generator().manual_seed(seed)
    whole = {
        "input.weight": (5, 1, 3), "head.weight": (1, n_labels, 3), "head.bias": (1, n_labels),
        "optimizer.input.weight.second": (5, 1), "optimizer.head.weight.first": (1, n_labels, 3),
    }  # fmt: skip
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in whole.items()}
    return {name: x[:, labels.start : labels.stop] if "head." in name else x for name, x in drawn.items()}


def write(folder, size, step=120, seed=0, *, switches=True, run=RUN, n_labels=K):
    parts, files = [part_of(n_labels, rank, size) for rank in range(size)], {}
    for rank, part in enumerate(parts):
        tensors = tensors_of(part, seed, n_labels)
        files |= write_part(folder, "full", step, part, tensors, run=run, n_labels=n_labels, with_whole=rank == 0)
    if switches:
        switch(folder, "full", step, parts, files, {"step": step}, run=run, n_labels=n_labels)


def assert_reads(folder, size, seed=0, step=120):
    found = ShardSet.find(folder, "full", **OPENING)
    assert (found.step, found.progress) == (step, {"step": step})
    for rank in range(size):
        labels = part_of(K, rank, size)
        truth = tensors_of(labels, seed)
        into = {name: torch.full_like(x, float("nan")) for name, x in truth.items()}
        found.read(into, labels)
        assert all(torch.equal(into[name], truth[name]) for name in truth)


@settings(max_examples=20)
@given(st.integers(1, K), st.integers(1, K))
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path_factory, n_writers, n_readers):
    folder = tmp_path_factory.mktemp("set")
    write(folder, n_writers)
    assert_reads(folder, n_readers)


@pytest.mark.parametrize("size", [1, 3])
def test_what_one_process_wrote_is_read_too(tmp_path, size):
    save_file({k: x.contiguous() for k, x in tensors_of(range(K)).items()}, tmp_path / "group.safetensors")
    for rank in range(size):
        labels = part_of(K, rank, size)
        truth, into = tensors_of(labels), tensors_of(labels, seed=1)
        read_whole(tmp_path / "group.safetensors", into, labels)
        assert all(torch.equal(into[name], truth[name]) for name in truth)


def test_the_last_whole_set_counts_whenever_the_next_is_cut_short(tmp_path, monkeypatch):
    write(tmp_path / "set", 3)
    replace, n = os.replace, [0]

    def stop_at(limit):
        n[0] = 0

        def count(*args):
            n[0] += 1
            if n[0] == limit:
                raise KeyboardInterrupt
            replace(*args)

        monkeypatch.setattr(os, "replace", count)

    for limit in range(1, 5):  # two parts, what all have alike, and the switch
        stop_at(limit)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "set", 2, step=240, seed=1)
        assert_reads(tmp_path / "set", 2)
    stop_at(5)
    write(tmp_path / "set", 2, step=240, seed=1)
    assert_reads(tmp_path / "set", 4, seed=1, step=240)
    assert len(list((tmp_path / "set").iterdir())) == 4  # nothing of the old set is left


def test_no_set_is_none_and_a_deleted_one_too(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert ShardSet.find(run / "checkpoints", "full", **OPENING) is None and not is_cut(run)
    write(run / "checkpoints", 2)
    assert is_cut(run)
    delete_set(run / "checkpoints", "full")
    assert ShardSet.find(run / "checkpoints", "full", **OPENING) is None and not list((run / "checkpoints").iterdir())


def replaced(folder, file, *args, **kwargs):
    """Put in a file's place what another set has there, with its bytes noted."""
    write(folder / "other", *args, **kwargs, switches=False)
    (other,) = [f for f in (folder / "other").iterdir() if f.name.split("-")[2:] == file.split("-")[2:]]
    other.replace(folder / file)
    return {"bytes": (folder / file).stat().st_size}


SHARD = "full-00000120-5-10.safetensors"


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda f: (f / SHARD).unlink(), "is missing, with labels 5 to 9; restore it from a copy"),
        (lambda f: (f / "full-00000120-whole.safetensors").unlink(), "is missing, with what all ranks have alike"),
        (lambda f: os.truncate(f / SHARD, 100), r"has 100 bytes instead of \d+"),
        (lambda f: replaced(f, SHARD, 2, step=100), "is of another set: step 100 instead of 120"),
        (lambda f: replaced(f, SHARD, 2, run="fedcba9876543210"), f"another set: run fedcba9876543210 instead of {RUN}"),
        (lambda f: (f / SHARD).write_bytes(b"x" * (f / SHARD).stat().st_size), "is broken"),
        (lambda f: {"parts": [[0, 5]]}, r"full.json: labels 5 to 9 are missing"),
        (lambda f: {"parts": [[0, 5], [6, 10]]}, r"full.json: labels 5 to 5 are missing"),
        (lambda f: {"parts": [[0, 6], [5, 10]]}, r"full.json: labels 5 to 5 are held twice"),
        (lambda f: {"run": "fedcba9876543210"}, "is of run fedcba9876543210 with 10 labels, this is run .*; it was copied here"),
        (lambda f: {"n_labels": 11}, "with 11 labels, this is run .* with 10"),
        (lambda f: {"parts": None}, "full.json: is broken"),
        (lambda f: (f / "full.json").write_text("{"), "full.json: is broken"),
    ],
)  # fmt: skip
def test_shards_that_do_not_fit_together_are_refused(tmp_path, break_, message):
    write(tmp_path, 2)
    changes = break_(tmp_path)
    if isinstance(changes, dict):
        about = json.loads((tmp_path / "full.json").read_text())
        if "bytes" in changes:
            changes = {"bytes": about["bytes"] | {SHARD: changes["bytes"]}}
        (tmp_path / "full.json").write_text(json.dumps(about | changes))
    with pytest.raises(ModelError, match=message):
        ShardSet.find(tmp_path, "full", **OPENING)


def test_a_set_of_another_model_is_refused(tmp_path):
    write(tmp_path, 2)
    into = tensors_of(range(K))
    with pytest.raises(ModelError, match=r"is of another model \(head.weight has shape \[1, 5, 3\] instead of \[1, 5, 4\]\)"):
        ShardSet.find(tmp_path, "full", **OPENING).read(into | {"head.weight": torch.zeros(1, K, 4)}, range(K))
    with pytest.raises(ModelError, match="is of another model"):
        ShardSet.find(tmp_path, "full", **OPENING).read({"layers.0.weight": torch.zeros(1, 3, 3)}, range(K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_file_written_in_parts_equals_one_written_whole(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr("mach.store.shards.BLOCK_BYTES", block)
    tensors = {"head.weight": torch.randn(K, 3).to(dtype), "head.bias": torch.randn(K), "input.weight": torch.randn(5, 3)}
    metadata = {"format": "pt", "run": RUN}
    layout = Layout.of({name: (x.dtype, x.shape) for name, x in tensors.items()}, metadata)
    path, whole = tmp_path / "parts.safetensors", tmp_path / "whole.safetensors"
    layout.create(path)
    for first, last in ((7, 10), (0, 0), (0, 7)):
        with layout.opened(path) as file:
            for name, value in tensors.items():
                file.write(name, value[first:last] if name.startswith("head.") else value, first if "head." in name else 0)
    save_file(tensors, whole, metadata=metadata)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors)
    assert path.stat().st_size == whole.stat().st_size
