"""What each of some processes does in the tests of the ways between them: `python exchanges.py torch|horovod OUT`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from mach.comm import lengths_of, part_of
from mach.config import Config
from mach.data import Dataset
from mach.errors import MachError
from mach.parallel.comm import CountingComm, TorchComm, connect
from mach.store.folder import sizes_of, table_of
from mach.train.sharded import ShardedGroup

CPU = torch.device("cpu")
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)
CONFIG = Config(table="identity", hidden=8, layers=1, batch_size=33, epochs=1, loss="softmax")


def numbers(n, dtype, rank):
    return (torch.arange(n * 3).view(n, 1, 3) * (rank + 1)).to(dtype)


def exchange(comm):
    """Try every operation, with parts of every length, against what they should give."""
    P, rank = comm.size, comm.rank
    for n in (0, 1, 2 * P - 1, 2 * P, 5 * P + 1):
        lengths, own = lengths_of(n, P), part_of(n, rank, P)
        for dtype in TYPES:
            part = numbers(n, dtype, 0)[own.start : own.stop]
            found = comm.all_gather(part, lengths).wait()
            assert found.dtype == dtype and torch.equal(found, numbers(n, dtype, 0))
        for dtype in (torch.float64, torch.float32):
            pending = comm.reduce_scatter(numbers(n, dtype, rank), lengths)
            beside = comm.all_gather(torch.full((1,), rank), [1] * P).wait()  # begun before the other ended
            total = sum(numbers(n, dtype, r) for r in range(P))
            assert torch.equal(pending.wait(), total[own.start : own.stop]) and beside.tolist() == list(range(P))
            value = numbers(max(1, n), dtype, rank)
            assert torch.equal(comm.all_reduce(value).wait(), sum(numbers(max(1, n), dtype, r) for r in range(P)))
            assert torch.equal(comm.all_reduce(value, "max").wait(), numbers(max(1, n), dtype, P - 1))
            assert torch.equal(value, numbers(max(1, n), dtype, rank))  # what was given stays
    assert comm.broadcast({"rank": rank, "text": "é"}) == {"rank": 0, "text": "é"}
    comm.barrier()


def train(comm, data):
    """Train in float64 and give all weights, put together, as lists."""
    dataset = Dataset.open(data)
    sizes = sizes_of(CONFIG, dataset)
    group = ShardedGroup(CONFIG, dataset, sizes, table_of(CONFIG, sizes, [0], None), CPU, comm, torch.float64)
    losses = [record.loss for record in group.steps(lambda r: None) if record.loss is not None]
    lengths = lengths_of(sizes.n_labels, comm.size)
    weights = {}
    for name, value in group.packed.parameters.items():
        whole = comm.all_gather(value.transpose(0, 1).contiguous(), lengths).wait() if name.startswith("head.") else value
        weights[name] = (whole.transpose(0, 1) if name.startswith("head.") else whole).tolist()
    return {"weights": weights, "losses": losses}


def fail(comm, out):
    """Let rank 1 fail and the others write what they are told; rank 0, which holds the store here, leaves last."""
    if comm.rank == 1:
        comm.fail(ValueError("a planted error"))
    else:
        try:
            comm.barrier()
        except MachError as error:
            out.with_name(f"told-{comm.rank}").write_text(str(error))
    deadline = time.monotonic() + 60
    while comm.rank == 0 and len(list(out.parent.glob("told-*"))) < comm.size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def main(data, out):
    torch.set_num_threads(1)
    comm = CountingComm(connect(CPU, timeout_s=30))
    try:
        exchange(comm)
        comm.sent.clear()
        found = train(comm, data)
        if comm.rank == 0:
            Path(out).write_text(json.dumps({**found, "size": comm.size, "sent": dict(comm.sent)}))
        if isinstance(comm.comm, TorchComm):
            fail(comm, Path(out))
    finally:
        comm.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
