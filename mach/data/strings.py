"""A list of strings in two arrays: UTF-8 bytes end to end, and where each begins. Decoded only when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import numpy as np
import numpy.typing as npt


class Strings(Sequence[str]):
    """Read-only sequence of N strings over `offsets` int64 (N + 1,) and `blob` uint8 (bytes,), both perhaps in files."""

    __slots__ = ("_blob", "_offsets")

    def __init__(self, offsets: npt.NDArray[np.int64], blob: npt.NDArray[np.uint8]):
        self._offsets, self._blob = offsets, blob

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            rows = range(*index.indices(len(self)))
            return self._run(rows.start, rows.stop) if rows.step == 1 else [self[i] for i in rows]
        if not -len(self) <= index < len(self):
            raise IndexError(f"string {index} is outside [0, {len(self)})")
        i = int(index) % len(self)
        return self._blob[self._offsets[i] : self._offsets[i + 1]].tobytes().decode("utf-8")

    def _run(self, low: int, high: int) -> list[str]:
        """Give strings [low, high), their bytes read at once."""
        if low >= high:
            return []
        bounds = (self._offsets[low : high + 1] - self._offsets[low]).tolist()
        raw = self._blob[self._offsets[low] : self._offsets[high]].tobytes()
        return [raw[begin:end].decode("utf-8") for begin, end in pairwise(bounds)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # Python's way to say: compares, so has no hash
