"""Who of some processes is gone or stuck: signs of life in a store that all can reach, and one verdict for all.

Each process tells the store once a second that it lives and how many exchanges it has begun. When an exchange fails, whoever no
longer tells is gone; where all do, who began the fewest is stuck. The first to find out leaves the verdict, so that all name the
same rank, also those that look when the finder has ended, too.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from mach.errors import RankLost

BEAT_S = 1.0  # between signs of life
SILENT_S = 8.0  # after which who gave none is gone
LOOK_S = 0.02  # between looks into the store
TEXT = 300  # characters of an error that are passed on
GONE = "is gone: it gives no more signs of life"
VERDICT = "mach/verdict"

_Found = TypeVar("_Found")


class Vigil:
    """One rank's signs of life, and its look at those of the others, in a torch.distributed store."""

    def __init__(self, store: Any, rank: int, size: int):
        self.n_begun = 0  # exchanges
        self._store, self._rank, self._size = store, rank, size
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._n_meetings = 0
        self._ended = threading.Event()
        self._beat(store, 0)
        threading.Thread(target=self._live, args=(getattr(store, "clone", lambda: store)(),), daemon=True).start()

    def end(self) -> None:
        """Give no more signs of life."""
        self._ended.set()

    def meet(self, word: str = "here") -> list[str]:
        """Wait until every rank has said a word, however long one takes, as long as all give signs of life; give the words.

        Raises: RankLost.
        """
        self._n_meetings += 1
        keys = [f"mach/meeting/{self._n_meetings}/{rank}" for rank in range(self._size)]

        def wait() -> list[str]:
            self._store.set(keys[self._rank], word)
            while not self._store.check(keys):
                self._refuse()
                for rank in self._silent():
                    raise self._judge(rank, GONE)
                time.sleep(LOOK_S)
            return [self._store.get(key).decode() for key in keys]

        return self._reached(wait)

    def accuse(self, error: BaseException) -> RankLost:
        """Find out who is to blame for an exchange that failed; takes some ten seconds where nobody knows yet."""

        def find() -> RankLost:
            deadline = time.monotonic() + SILENT_S + 2 * BEAT_S
            while time.monotonic() < deadline:
                self._refuse()
                for rank in self._silent():
                    return self._judge(rank, GONE)
                time.sleep(LOOK_S)
            begun = [self._begun(rank) for rank in range(self._size)]
            if min(begun) < max(begun):
                return self._judge(begun.index(min(begun)), f"is stuck before exchange {min(begun) + 1:,}, others are further")
            return RankLost(f"an exchange between the {self._size} processes failed: {short(error)}")

        try:
            return self._reached(find)
        except RankLost as lost:
            return lost

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        with suppress(RuntimeError):  # then nobody can be told
            self._judge(self._rank, f"failed with {type(error).__name__}: {short(error)}")

    def _reached(self, look: Callable[[], _Found]) -> _Found:
        try:
            return look()
        except RuntimeError as error:
            raise RankLost(f"the process that holds the others together cannot be reached ({short(error)})") from error

    def _live(self, store: Any) -> None:
        n = 0
        with suppress(RuntimeError):  # the store is gone: who needs it will say so
            while not self._ended.wait(BEAT_S):
                n += 1
                self._beat(store, n)

    def _beat(self, store: Any, n: int) -> None:
        store.set(f"mach/life/{self._rank}", f"{n} {self.n_begun}")

    def _silent(self) -> list[int]:
        """Give the ranks whose last sign of life was seen SILENT_S ago, as far back as this process has looked."""
        now = time.monotonic()
        for rank in range(self._size):
            sign = self._sign(rank)
            if rank not in self._seen or self._seen[rank][0] != sign:
                self._seen[rank] = (sign, now)
        return [r for r, (_, since) in self._seen.items() if now - since >= SILENT_S and r != self._rank]

    def _sign(self, rank: int) -> bytes:
        key = f"mach/life/{rank}"
        return bytes(self._store.get(key)) if self._store.check([key]) else b"0 0"

    def _begun(self, rank: int) -> int:
        return self.n_begun if rank == self._rank else int(self._sign(rank).split()[1])

    def _judge(self, rank: int, text: str) -> RankLost:
        """Leave a verdict, unless there is one; give what stands."""
        verdict = json.dumps({"rank": rank, "text": text})
        return self._lost(self._store.compare_set(VERDICT, "", verdict))

    def _refuse(self) -> None:
        if self._store.check([VERDICT]):
            raise self._lost(self._store.get(VERDICT))

    def _lost(self, verdict: bytes) -> RankLost:
        found = json.loads(verdict)
        return RankLost(f"rank {found['rank']} of {self._size} {found['text']}")


def short(error: BaseException) -> str:
    """Give the first line of an error's text, cut where it is long."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:TEXT]
