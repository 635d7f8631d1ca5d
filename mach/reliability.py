"""How far probabilities can be trusted: expected calibration error, Brier score, and what a reliability diagram draws.

Probabilities are counted in 2**16 cells of equal width, so memory does not grow with their number. Those of one cell are never
told apart: a bin is a run of whole cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mach.errors import ConfigError, DataError

CELLS = 1 << 16
BINS = 15


@dataclass(frozen=True, slots=True)
class Bin:
    """Probabilities that are close to each other, beside what became of them."""

    n: int
    probability: float  # their mean
    right: float  # the share that was right


class Reliability:
    """Adds up probabilities and whether what they spoke of was right."""

    def __init__(self) -> None:
        self.n, self._squares = 0, 0.0
        self._n, self._probabilities, self._right = np.zeros(CELLS, np.int64), np.zeros(CELLS), np.zeros(CELLS)

    def update(self, probabilities: npt.ArrayLike, right: npt.ArrayLike) -> None:
        """Add probabilities in [0, 1] and, of the same shape, whether each came true.

        Raises: ConfigError if a probability is none, or the shapes differ.
        """
        p, y = np.asarray(probabilities, np.float64), np.asarray(right, bool)
        if p.shape != y.shape:
            raise ConfigError(f"probabilities of shape {p.shape} beside outcomes of shape {y.shape}: give one each")
        if not ((p >= 0) & (p <= 1)).all():
            raise ConfigError("probabilities must lie in [0, 1]: are these scores?")
        p, y = p.ravel(), y.ravel()
        cells = np.minimum((p * CELLS).astype(np.int64), CELLS - 1)
        self._n += np.bincount(cells, minlength=CELLS)
        self._probabilities += np.bincount(cells, p, CELLS)
        self._right += np.bincount(cells, y, CELLS)
        self._squares += float(((p - y) ** 2).sum())
        self.n += len(p)

    def ece(self, n_bins: int = BINS) -> float:
        """Give the expected calibration error over bins of equal mass: sum over bins of |sum of p - number right| / n, in [0, 1].

        Sorted by probability, a cell belongs to the bin in which its middle falls.
        Raises: DataError if nothing was added.
        Source: Naeini et al., AAAI 2015; bins of equal mass as in Nixon et al. 2019, arXiv:1904.01685.
        """
        self._refuse_nothing()
        middle = np.cumsum(self._n) - self._n / 2
        bins = np.minimum((middle * n_bins / self.n).astype(np.int64), n_bins - 1)
        return float(np.abs(np.bincount(bins, self._probabilities - self._right, n_bins)).sum() / self.n)

    def brier(self) -> float:
        """Give the Brier score, the mean of (p - [right])**2, in [0, 1]; smaller is better.

        Raises: DataError if nothing was added.
        Source: Brier 1950, Monthly Weather Review 78.
        """
        self._refuse_nothing()
        return self._squares / self.n

    def table(self, n_bins: int = 10) -> list[Bin]:
        """Give bins of equal width, those that hold anything, from the least probable."""
        bins = np.arange(CELLS) * n_bins // CELLS
        n, p, right = (np.bincount(bins, x, n_bins) for x in (self._n, self._probabilities, self._right))
        return [Bin(int(n[i]), float(p[i] / n[i]), float(right[i] / n[i])) for i in np.flatnonzero(n)]

    def _refuse_nothing(self) -> None:
        if not self.n:
            raise DataError("there are no probabilities to measure: is the split empty?")
