"""Ways to other processes: torch.distributed (gloo, NCCL) under torchrun, Horovod under horovodrun, and one that counts.

Tensors that are only moved travel as bytes, so any type does. A reduce-scatter sends each rank its rows and adds them up there,
in the order of the ranks, so its bits do not depend on the way.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mach.comm import Alone, Comm, Operation, Pending
from mach.errors import ConfigError, MissingExtra, RankLost
from mach.parallel.vigil import Vigil, short
from mach.train.traffic import gathered_bytes, reduced_bytes, scattered_bytes

TIMEOUT_S = 40.0  # that an exchange may take, the slowest rank's work before it included


@dataclass(frozen=True, slots=True)
class Launch:
    """Who started this process together with which others."""

    launcher: str = ""  # torchrun or horovodrun; empty: nobody
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine


def launched() -> Launch:
    """Read from the environment who started this process.

    Raises: ConfigError if what stands there is not whole.
    """
    for launcher, names in (
        ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        ("horovodrun", ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK")),
    ):
        if names[1] not in os.environ:
            continue
        given = [os.environ.get(name, "") for name in names]
        if not all(value.isdecimal() for value in given):
            texts = ", ".join(f"{name}={value!r}" for name, value in zip(names, given, strict=True))
            raise ConfigError(f"{texts} in the environment must be numbers; start the processes with {launcher}")
        rank, size, local_rank = map(int, given)
        if size > 1:
            return Launch(launcher, rank, size, local_rank)
    return Launch()


def connect(device: torch.device, *, timeout_s: float = TIMEOUT_S) -> Comm:
    """Give the way to the processes that this one was started with.

    Raises: ConfigError; MissingExtra; RankLost if the others do not come in time.
    """
    launch = launched()
    if launch.launcher == "torchrun":
        return TorchComm("nccl" if device.type == "cuda" else "gloo", timeout_s=timeout_s)
    return HorovodComm() if launch.launcher else Alone()


@dataclass(frozen=True, slots=True)
class Begun:
    """An exchange under way: `wait` ends it and makes the result of what came."""

    end: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """Give the result, once it is there."""
        return self.end()


def as_bytes(rows: Tensor) -> Tensor:
    """Give rows (n, ...) as bytes (n, row bytes)."""
    row_bytes = rows.shape[1:].numel() * rows.element_size()
    return rows.contiguous().view(-1).view(torch.uint8).view(len(rows), row_bytes)


def as_rows(data: Tensor, like: Tensor) -> Tensor:
    """Turn bytes (n, row bytes) back into rows of another tensor's type and shape."""
    return data.view(-1).view(like.dtype).view(len(data), *like.shape[1:])


def sum_in_order(parts: Tensor, size: int) -> Tensor:
    """Add up P tensors that follow each other along the first axis, in their order."""
    each = parts.view(size, len(parts) // size, *parts.shape[1:])
    total = each[0].clone()
    for part in each[1:]:
        total += part
    return total


class TorchComm:
    """torch.distributed among the processes that torchrun started.

    Raises: RankLost, naming the rank, if one does not come in `timeout_s` seconds, or is gone.
    """

    def __init__(self, backend: str, *, timeout_s: float = TIMEOUT_S):
        timeout = timedelta(seconds=timeout_s)
        try:
            store, self.rank, self.size = next(rendezvous("env://", timeout=timeout))
        except (RuntimeError, ValueError) as error:
            raise RankLost(f"the other processes cannot be reached ({short(error)}); start all of them with torchrun") from error
        self._vigil = Vigil(store, self.rank, self.size)
        try:
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)
        except RuntimeError as error:
            raise self._vigil.accuse(error) from error

    def all_gather(self, part: Tensor, lengths: Sequence[int]) -> Pending:
        """Join every rank's part; those shorter than the longest are filled up on their way."""
        data, longest = as_bytes(part), max(lengths)
        if len(data) < longest:
            data = torch.cat([data, data.new_zeros(longest - len(data), data.shape[1])])
        came = [torch.empty_like(data) for _ in lengths]

        def join() -> Tensor:
            return as_rows(torch.cat([rows[:n] for rows, n in zip(came, lengths, strict=True)]), part)

        return self._begin(lambda: dist.all_gather(came, data, async_op=True), join)

    def reduce_scatter(self, whole: Tensor, lengths: Sequence[int]) -> Pending:
        """Send every rank its rows, and add up those that come."""
        data, n = as_bytes(whole), lengths[self.rank]
        came = data.new_empty(self.size * n, data.shape[1])
        return self._begin(
            lambda: dist.all_to_all_single(came, data, [n] * self.size, list(lengths), async_op=True),
            lambda: sum_in_order(as_rows(came, whole), self.size),
        )

    def all_reduce(self, value: Tensor, operation: Operation = "sum") -> Pending:
        """Add up every rank's tensor, or take the largest entries."""
        total, how = value.clone(), dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
        return self._begin(lambda: dist.all_reduce(total, how, async_op=True), lambda: total)

    def broadcast(self, value: Any) -> Any:
        """Give rank 0's value to all, by way of the store."""
        return json.loads(self._vigil.meet(json.dumps(value if self.rank == 0 else None))[0])

    def barrier(self) -> None:
        """Wait until every rank is here, as long as all give signs of life."""
        self._vigil.meet()

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        self._vigil.fail(error)

    def close(self) -> None:
        """Leave the others."""
        self._vigil.end()
        dist.destroy_process_group()

    def _begin(self, send: Callable[[], Any], result: Callable[[], Tensor]) -> Pending:
        self._vigil.n_begun += 1
        try:
            work = send()
        except RuntimeError as error:
            raise self._vigil.accuse(error) from error

        def end() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._vigil.accuse(error) from error
            return result()

        return Begun(end)


class HorovodComm:
    """Horovod among the processes that horovodrun started; which one is lost, horovodrun says.

    Raises: MissingExtra.
    """

    def __init__(self) -> None:
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise MissingExtra("training under horovodrun", "horovod") from error
        self._hvd: Any = hvd
        hvd.init()
        self.rank, self.size = int(hvd.rank()), int(hvd.size())

    def all_gather(self, part: Tensor, lengths: Sequence[int]) -> Pending:
        """Join every rank's part."""
        handle = self._hvd.allgather_async(as_bytes(part))
        return Begun(lambda: as_rows(self._end(handle), part))

    def reduce_scatter(self, whole: Tensor, lengths: Sequence[int]) -> Pending:
        """Send every rank its rows, and add up those that come."""
        handle = self._hvd.alltoall_async(as_bytes(whole), splits=torch.tensor(list(lengths), dtype=torch.int32))
        return Begun(lambda: sum_in_order(as_rows(self._end(handle)[0], whole), self.size))

    def all_reduce(self, value: Tensor, operation: Operation = "sum") -> Pending:
        """Add up every rank's tensor, or take the largest entries."""
        handle = self._hvd.allreduce_async(value, op=self._hvd.Sum if operation == "sum" else self._hvd.Max)
        return Begun(lambda: self._end(handle))

    def broadcast(self, value: Any) -> Any:
        """Give rank 0's value to all, as the bytes of its JSON: what the others gather has no rows."""
        text = json.dumps(value).encode() if self.rank == 0 else b""
        return json.loads(bytes(self._end(self._hvd.allgather_async(torch.tensor(list(text), dtype=torch.uint8))).tolist()))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._end(self._hvd.allreduce_async(torch.zeros(1), op=self._hvd.Sum))

    def fail(self, error: BaseException) -> None:
        """Leave it to horovodrun, which ends the others."""

    def close(self) -> None:
        """Leave the others."""
        self._hvd.shutdown()

    def _end(self, handle: Any) -> Any:
        try:
            return self._hvd.synchronize(handle)
        except RuntimeError as error:
            raise RankLost(f"another of the {self.size} processes is gone ({short(error)}); horovodrun says which") from error


@dataclass(slots=True)
class CountingComm:
    """Another way, and how many bytes this rank sent on it: `sent`, by operation.

    A gathering sends the longest part to each, a reduce-scatter each row to whose it is, a sum over all goes round a ring; what
    a message adds at its ends is not counted, nor are the few bytes of a broadcast or a barrier.
    """

    comm: Comm
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def rank(self) -> int:
        """Give this rank's number."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Give the number of ranks."""
        return self.comm.size

    def all_gather(self, part: Tensor, lengths: Sequence[int]) -> Pending:
        """Count and do it."""
        row = as_bytes(part).shape[1]
        self.sent["all_gather"] += gathered_bytes(list(lengths), row)
        return self.comm.all_gather(part, lengths)

    def reduce_scatter(self, whole: Tensor, lengths: Sequence[int]) -> Pending:
        """Count and do it."""
        row = as_bytes(whole).shape[1]
        self.sent["reduce_scatter"] += scattered_bytes(list(lengths), self.rank, row)
        return self.comm.reduce_scatter(whole, lengths)

    def all_reduce(self, value: Tensor, operation: Operation = "sum") -> Pending:
        """Count and do it."""
        self.sent["all_reduce"] += reduced_bytes(value.numel(), self.size, value.element_size())
        return self.comm.all_reduce(value, operation)

    def broadcast(self, value: Any) -> Any:
        """Do it."""
        return self.comm.broadcast(value)

    def barrier(self) -> None:
        """Do it."""
        self.comm.barrier()

    def fail(self, error: BaseException) -> None:
        """Do it."""
        self.comm.fail(error)

    def close(self) -> None:
        """Do it."""
        self.comm.close()
