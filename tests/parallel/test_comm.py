"""Ways between real processes on this machine, over gloo; and what the environment says of who started them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exchanges import CONFIG, CPU

import mach
from mach.comm import Alone
from mach.errors import ConfigError, MissingExtra
from mach.parallel.comm import Launch, connect, launched
from mach.store.folder import sizes_of, table_of
from mach.train.loop import Group


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def assert_like_one(out, dataset, size):
    """Compare what `exchanges.py` wrote to a run of one process."""
    found = json.loads(out.read_text())
    sizes = sizes_of(CONFIG, dataset)
    group = Group(CONFIG, dataset, sizes, table_of(CONFIG, sizes, [0], None), CPU, torch.float64)
    losses = [record.loss for record in group.steps(lambda r: None) if record.loss is not None]
    assert found["size"] == size and found["losses"] == pytest.approx(losses, rel=1e-9)
    assert found["weights"].keys() == group.packed.parameters.keys()
    for name, value in group.packed.parameters.items():
        np.testing.assert_allclose(found["weights"][name], value.numpy(), rtol=1e-9, atol=1e-9, err_msg=name)
    assert all(found["sent"][name] > 0 for name in ("all_gather", "reduce_scatter", "all_reduce"))


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_exchange_train_and_name_who_fails(tiny, tmp_path, size):
    script, port = Path(__file__).with_name("exchanges.py"), free_port()
    processes = []
    for rank in range(size):
        own = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own["PYTHONPATH"] = Path(mach.__file__).parents[1]
        environment = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, str(script), str(tiny.path), str(tmp_path / "out")]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        ends = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(ends)
    assert_like_one(tmp_path / "out", tiny, size)
    for rank in range(size):
        if rank != 1:
            assert (tmp_path / f"told-{rank}").read_text() == f"rank 1 of {size} failed with ValueError: a planted error"


@pytest.mark.parametrize(
    ("environment", "truth"),
    [
        ({}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Launch("torchrun", 3, 4, 1)),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1"}, Launch("horovodrun", 1, 2, 1)),
    ],
)
def test_the_environment_tells_who_started_it(monkeypatch, environment, truth):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == truth
    if truth.size == 1:
        assert connect(CPU) == Alone()


def test_an_environment_that_is_not_whole_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match=r"^RANK='one', WORLD_SIZE='4', LOCAL_RANK='' in the environment must be numbers"):
        launched()


def test_horovod_that_is_missing_is_named_with_the_pip_line(monkeypatch):
    for name in ("HOROVOD_RANK", "HOROVOD_LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "horovod", None)
    with pytest.raises(MissingExtra, match=r"training under horovodrun needs an optional package: pip install 'mach\[horovod\]'"):
        connect(CPU)
