"""What every test shares: one thread (bits and speed), and two tiny planted data sets that a model must solve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import hypothesis
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mach.comm import Ready
from mach.data import write_dataset
from mach.train.log import read_log

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # some compile, and machines are shared
hypothesis.settings.load_profile("untimed")
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # the tests were started in the background: what they start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, and kept: its own functions are made for one way to run

N_LABELS, N_FEATURES = 40, 50  # K, F


def planted(seed: int, n_samples: int) -> tuple[sp.csr_array, sp.csr_array]:
    """Draw samples of one to three labels; each label adds its own four features, and a little noise is strewn over all."""
    signatures = np.stack([np.random.default_rng([7, k]).choice(N_FEATURES, 4, replace=False) for k in range(N_LABELS)])
    rng = np.random.default_rng(seed)
    X, Y = np.zeros((n_samples, N_FEATURES), np.float32), np.zeros((n_samples, N_LABELS), np.float32)
    for i in range(n_samples):
        for k in rng.choice(N_LABELS, rng.integers(1, 4), replace=False):
            Y[i, k] = 1
            X[i, signatures[k]] += 1
    X += np.float32(0.1) * (rng.random(X.shape) < 0.02)
    return sp.csr_array(X), sp.csr_array(Y)


def planted_splits():
    return {"train": planted(0, 200), "test": planted(1, 60), "dev": planted(2, 40)}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A data set of sparse features with splits train (200 samples), test (60) and dev (40): to read, not to change."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny", planted_splits())


@pytest.fixture(scope="session")
def tiny_without_dev(tmp_path_factory):
    """The same without the dev split."""
    splits = {name: split for name, split in planted_splits().items() if name != "dev"}
    return write_dataset(tmp_path_factory.mktemp("data") / "undeveloped", splits)


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory):
    """The same with dense features."""
    splits = {name: (X.toarray(), Y) for name, (X, Y) in planted_splits().items()}
    return write_dataset(tmp_path_factory.mktemp("data") / "dense", splits)


class Largest(TorchDispatchMode):
    """Note the most elements of any tensor that an operation inside the block makes; views are not counted."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.n_elements = max([self.n_elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.fixture
def largest():
    """`with largest: ...`, then `largest.n_elements`."""
    return Largest()


class Process:
    """`mach ...` in a process group of its own."""

    def __init__(self, *args):
        command = [sys.executable, "-m", "mach", *map(str, args)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def await_steps(self, *logs):
        """Wait until each log holds a step."""
        deadline = time.monotonic() + 90
        while not all(any("step" in line for line in read_log(log)) for log in logs):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "no step within a minute and a half"
            time.sleep(0.02)

    def end(self):
        """Give the exit status and the last line of standard error."""
        _, err = self.process.communicate(timeout=90)
        return self.process.returncode, err.rstrip("\n").splitlines()[-1], err


@pytest.fixture
def started():
    """Start `mach ...`: `process = started("train", ...)`. What still runs at the end is killed."""
    processes = []

    def start(*args):
        processes.append(Process(*args))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


class ThreadComm:
    """Ranks that are threads of this process: what they exchange lies on one board."""

    def __init__(self, rank, board, meeting):
        self.rank, self.size, self._board, self._meeting = rank, len(board), board, meeting

    def _swap(self, value):
        self._board[self.rank] = value
        self._meeting.wait()
        values = list(self._board)
        self._meeting.wait()
        return values

    def all_gather(self, part, lengths):
        parts = self._swap(part.clone())
        assert [len(p) for p in parts] == list(lengths)
        return Ready(torch.cat(parts))

    def reduce_scatter(self, whole, lengths):
        parts = [part.split(list(lengths))[self.rank] for part in self._swap(whole.clone())]
        return Ready(sum(parts[1:], parts[0].clone()))

    def all_reduce(self, value, operation="sum"):
        values = torch.stack(self._swap(value.clone()))
        return Ready(values.sum(0) if operation == "sum" else values.amax(0))

    def broadcast(self, value):
        return self._swap(value)[0]

    def barrier(self):
        self._swap(None)

    def fail(self, error):
        self._meeting.abort()

    def close(self):
        pass


@pytest.fixture
def ranks():
    """Call a function of a `Comm` on P ranks that are threads: `results = ranks(P, function)`, in the order of the ranks."""

    def call(size, function):
        board, meeting, results, errors = [None] * size, threading.Barrier(size, timeout=60), [None] * size, []

        def work(rank):
            comm = ThreadComm(rank, board, meeting)
            try:
                results[rank] = function(comm)
            except BaseException as error:
                comm.fail(error)
                errors.append(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    return call
