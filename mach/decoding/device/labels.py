"""Labels scored, ordered and left out with torch's own functions, on any device.

Axes: N samples, R repetitions, B buckets, K labels, M labels of a sample, L labels excluded in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mach.decoding.only import Lists
from mach.decoding.scan import MEDIAN, SUM
from mach.hashing.device import DeviceTable


def k_best(scores_NM: Tensor, k: int) -> Tensor:
    """Give the positions of the k greatest of each row, greatest first; of equal ones the smaller position: int64 (N, k).

    A float32 and its position become one int64 that is ordered as both: no two are equal, so that any top-k is the right one.
    Adding 0.0 makes -0.0 and 0.0 equal bits.
    """
    bits = (scores_NM + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the bits of a negative number fall as it grows
    keys = (ordered.long() << 32) - torch.arange(scores_NM.shape[1], device=scores_NM.device)
    return keys.topk(k, dim=1).indices


def aggregate(values: Callable[[int], Tensor], n_repetitions: int, kind: int) -> Tensor:
    """Make a label's score of its R bucket scores, `values(r)`, in the order of the scan, so that bits agree with it."""
    if kind == MEDIAN:
        sorted_R = torch.stack([values(r) for r in range(n_repetitions)]).sort(dim=0).values
        return (sorted_R[(n_repetitions - 1) // 2] + sorted_R[n_repetitions // 2]) * 0.5
    total = values(0)
    for r in range(1, n_repetitions):
        total = total.add_(values(r)) if kind == SUM else torch.minimum(total, values(r), out=total)
    return total


def score_labels(scores_NRB: Tensor, table: DeviceTable, rows_N: Tensor, labels_NM: Tensor, kind: int) -> Tensor:
    """Score the labels given for each of some samples, whose numbers are rows_N: float32 (N, M), to the bits of the scan."""

    def values(r: int) -> Tensor:
        return scores_NRB[rows_N.unsqueeze(1), r, table.buckets(labels_NM, r)]

    return aggregate(values, scores_NRB.shape[1], kind)


class Without(NamedTuple):
    """What each sample may not find, as sorted numbers n K + k."""

    n_labels: int
    keys_L: Tensor

    @classmethod
    def of(cls, lists: Lists, n_labels: int, device: torch.device) -> Without:
        """Take the checked lists of `mach.decoding.only`."""
        starts, labels = torch.from_numpy(lists.starts), torch.from_numpy(lists.labels)
        rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        return cls(n_labels, (rows * n_labels + labels).to(device))

    def of_rows(self, rows_n: Tensor) -> Without:
        """Give what some samples, of rising numbers, may not find, as they are numbered anew."""
        row_L = self.keys_L // self.n_labels
        at_L = torch.searchsorted(rows_n, row_L).clamp_(max=len(rows_n) - 1)
        keys_L = at_L * self.n_labels + self.keys_L % self.n_labels
        return Without(self.n_labels, keys_L[rows_n[at_L] == row_L])

    def drop(self, scores_NM: Tensor, rows_N: Tensor, labels_NM: Tensor) -> Tensor:
        """Put -inf, in place, where a sample may not find the label."""
        if len(self.keys_L):
            keys = rows_N.unsqueeze(1) * self.n_labels + labels_NM
            at = torch.searchsorted(self.keys_L, keys).clamp_(max=len(self.keys_L) - 1)
            scores_NM.masked_fill_(self.keys_L[at] == keys, -torch.inf)
        return scores_NM
