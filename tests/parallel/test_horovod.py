"""Horovod, where it is installed: the same exchanges and the same weights as over torch.distributed. See `make test-horovod`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("horovod.torch", reason="Horovod is not installed")

from test_comm import assert_like_one

HERE = Path(__file__).parent


def horovodrun(n, *command):
    runner = Path(sys.executable).with_name("horovodrun")
    line = [runner, "--gloo", "-np", n, "-H", f"localhost:{n}", sys.executable, *command]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("size", [2, 3])
def test_processes_exchange_and_train(tiny, tmp_path, size):
    status, text = horovodrun(size, HERE / "exchanges.py", tiny.path, tmp_path / "out")
    assert status == 0, text
    assert_like_one(tmp_path / "out", tiny, size)


def test_the_command_trains_under_horovodrun(tiny, tmp_path):
    run = tmp_path / "run"
    status, text = horovodrun(2, "-m", "mach", "train", tiny.path, "--table", "identity", "--hidden", "8", "--out", run)
    assert status == 0, text
    assert text.count("run: 1 repetition") == 1
    assert (run / "repetition-000.safetensors").exists()
