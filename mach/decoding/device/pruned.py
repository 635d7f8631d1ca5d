"""The pruned search for sums, with torch's own functions: read every bucket once, then only the labels of the best buckets.

A repetition's m best buckets are opened; t_r is the score of the best one left. A label scores at most the sum T of all t_r and,
of each opened bucket that it is in, what that is above t_r. These excesses are added up in cells, to which labels are hashed: a
cell holds at least the excess of each of its labels, as nothing that is added is below zero. If k labels are known to score theta
or more, and theta is above T, no label of unopened buckets alone is among the k best, and of the others only those whose cell
holds theta - T: few, and they are scored exactly, to the bits of the scan.

For theta, a few repetitions are opened, and cells count in how many of them a label is (by excess, all labels of a single
outstanding bucket would come first): a label of each of the fullest is scored exactly. Theta tells how many buckets bring T below
it. Twice as many are opened, in all repetitions; where that is more than pays, the sample is left to the scan. `_slack` leaves
room for the rounding of float32.

Axes: N samples, R repetitions, B buckets, K labels, D buckets ordered of each repetition, m of them opened, W labels of a bucket,
T labels touched of a sample, C cells, P pairs of a sample and a label.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mach.decoding.device.labels import Without, k_best, score_labels
from mach.decoding.scan import SUM
from mach.hashing.device import DeviceTable

LEAST_DEPTH, MOST_DEPTH = 8, 256  # buckets of a repetition that are opened
GUESS_ROWS = 8  # repetitions opened for the first theta
SHARE = 64  # of the buckets of a repetition, at most one in so many is opened: a label touched costs as much as many looked up
TOUCHED = 1 << 25  # labels touched at once: 256 MiB of them, several times
MOST_CELLS = 1 << 22  # for a sample
CELLS = 8  # for each label, where labels are counted
MOST_CANDIDATES = 1 << 16  # for a sample
GUESSES = 4  # cells whose labels are scored to get theta, for each of the k best


def depth_for(table: DeviceTable) -> int:
    """Give how many buckets of a repetition may be opened before a scan is quicker, or memory is short."""
    n_held = TOUCHED // (len(table.families) * _bucket_width(table))
    return min(table.n_buckets // SHARE, MOST_DEPTH, table.n_buckets - 1, n_held)


def may_pay(table: DeviceTable, kind: int) -> bool:
    """Tell whether there is a search for this table and way to aggregate, and opening some buckets beats a scan."""
    return kind == SUM and table.has_progressions and depth_for(table) >= LEAST_DEPTH


def search_pruned(scores_NRB: Tensor, table: DeviceTable, k: int, without: Without | None) -> tuple[Tensor, Tensor, Tensor]:
    """Give the k best labels of each sample, int64 (N, k), their scores, float32, and whether they are proven, bool (N,).

    What is not proven is not filled in.
    """
    limit = depth_for(table)
    top = scores_NRB.topk(limit + 1, dim=2)
    search = _Search(scores_NRB, table, k, top.values, top.indices, without)
    slack_N, tails_ND = _slack(scores_NRB), top.values.double().sum(1)  # T, if 0, 1, 2 ... buckets are opened
    every_N = torch.arange(len(scores_NRB), device=scores_NRB.device)
    depth = min(LEAST_DEPTH + 3 * k // 2, limit)
    theta_N = torch.cat([search.count(rows_n, depth).theta() for rows_n in search.chunks(every_N, CELLS * depth, GUESS_ROWS)])
    needed_N = (tails_ND + slack_N.unsqueeze(1) >= theta_N.unsqueeze(1)).sum(1)  # T falls as more are opened
    depth_N = torch.where(needed_N > limit, 0, (2 * needed_N).clamp(max=limit))
    labels_Nk, scores_Nk = every_N.new_zeros(len(every_N), k), scores_NRB.new_zeros(len(every_N), k)
    proven_N = torch.zeros_like(every_N, dtype=torch.bool)
    for power in range(limit.bit_length()):
        rows_m = every_N[(depth_N >= 1 << power) & (depth_N < 2 << power)]
        depth = min(2 << power, limit)
        for rows_n in search.chunks(rows_m, depth, len(table.families)):
            found = search.touch(rows_n, depth).best(theta_N[rows_n], tails_ND[rows_n, depth] + slack_N[rows_n])
            labels_nk, best_nk, is_proven_n = found
            good_n = rows_n[is_proven_n]
            labels_Nk[good_n], scores_Nk[good_n], proven_N[good_n] = labels_nk[is_proven_n], best_nk[is_proven_n], True
    return labels_Nk, scores_Nk, proven_N


def _bucket_width(table: DeviceTable) -> int:
    return -(-table.p // table.n_buckets)


def _slack(scores_NRB: Tensor) -> Tensor:
    """Bound what rounding may add to a bound or take from a score, with room to spare: float64 (N,).

    With u = 2**-24 and A the sum over r of the greatest magnitude, a sum of R terms errs by at most R u A, the differences by
    2 u A in all, and the cells, whose other labels only add, by 2 R u A; a GPU may take numbers below 2**-126 for zero.
    """
    R = scores_NRB.shape[1]
    return scores_NRB.abs().amax(2).double().sum(1) * (R + 4) * 2.0**-20 + 1e-30


@dataclass(frozen=True)
class _Search:
    """What all tries of a search share."""

    scores_NRB: Tensor
    table: DeviceTable
    k: int
    values_NRD: Tensor  # the best buckets' scores, falling
    buckets_NRD: Tensor
    without: Without | None

    def chunks(self, rows_N: Tensor, depth: int, n_rows: int) -> Iterable[Tensor]:
        """Cut samples into runs of which as many labels are touched at once as memory allows."""
        each = max(1, TOUCHED // (min(n_rows, self.scores_NRB.shape[1]) * depth * _bucket_width(self.table)))
        return torch.split(rows_N, each) if len(rows_N) else ()

    def count(self, rows_n: Tensor, depth: int) -> _Touched:
        """Open some repetitions: cells hold how many of them a label is in, the better buckets counting up to twice as much."""
        values_nRD = self.values_NRD[rows_n, :GUESS_ROWS]
        excess_nRm = values_nRD[:, :, :depth] - values_nRD[:, :, depth : depth + 1]
        return self._add_up(rows_n, depth, 1 + excess_nRm / excess_nRm[:, :, :1].clamp(min=1e-30), CELLS)

    def touch(self, rows_n: Tensor, depth: int) -> _Touched:
        """Open so many buckets of every repetition: cells hold excesses."""
        values_nRD = self.values_NRD[rows_n]
        return self._add_up(rows_n, depth, values_nRD[:, :, :depth] - values_nRD[:, :, depth : depth + 1], 1)

    def _add_up(self, rows_n: Tensor, depth: int, weights_nRm: Tensor, cells_a_label: int) -> _Touched:
        n_rows = weights_nRm.shape[1]
        labels_nT, exists_nT = _labels_of(self.table, self.buckets_NRD[rows_n, :n_rows, :depth])
        weights_nT = weights_nRm.unsqueeze(3).expand(*weights_nRm.shape, _bucket_width(self.table)).flatten(1)
        n_cells = min(1 << max(12, (cells_a_label * labels_nT.shape[1]).bit_length()), MOST_CELLS)
        cells_nT = torch.where(exists_nT, labels_nT & (n_cells - 1), n_cells)  # the last cell is for what is no label
        cells_nC = weights_nRm.new_zeros(len(rows_n), n_cells + 1).scatter_add_(1, cells_nT, weights_nT)
        return _Touched(self, rows_n, labels_nT, exists_nT, cells_nT, cells_nC)

    def score(self, rows_n: Tensor, labels_nM: Tensor) -> Tensor:
        """Give exact scores, -inf for what a sample may not find."""
        scores_nM = score_labels(self.scores_NRB, self.table, rows_n, labels_nM, SUM)
        return scores_nM if self.without is None else self.without.drop(scores_nM, rows_n, labels_nM)


@dataclass(frozen=True)
class _Touched:
    """The labels of opened buckets, and what was added up in cells, for some samples."""

    search: _Search
    rows_n: Tensor
    labels_nT: Tensor
    exists_nT: Tensor
    cells_nT: Tensor
    cells_nC: Tensor

    def theta(self) -> Tensor:
        """Give a score that k labels reach: the k-th best of a label of each of the fullest cells; float64 (n,), or -inf."""
        owner_nC = torch.full_like(self.cells_nC, -1, dtype=torch.int64)
        owner_nC.scatter_(1, self.cells_nT, self.labels_nT)  # of several labels, any one
        n_cells, k = self.cells_nC.shape[1] - 1, self.search.k
        if n_cells < k:
            return torch.full_like(self.rows_n, -torch.inf, dtype=torch.float64)
        fullest_nG = self.cells_nC[:, :-1].topk(min(GUESSES * k + 32, n_cells), dim=1).indices
        labels_nG = owner_nC.gather(1, fullest_nG)
        scores_nG = self.search.score(self.rows_n, labels_nG.clamp(min=0)).masked_fill_(labels_nG < 0, -torch.inf)
        return scores_nG.topk(k, dim=1).values[:, -1].double()

    def best(self, theta_n: Tensor, others_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the k best labels, (n, k), their scores and whether they are proven, (n,).

        No label of unopened buckets alone scores more than others_n, and k labels reach theta_n, which is more.
        """
        table, n = self.search.table, len(self.rows_n)
        least_n1 = (theta_n - others_n).float().unsqueeze(1)
        is_candidate_nT = (self.cells_nC.gather(1, self.cells_nT) >= least_n1) & self.exists_nT
        is_proven_n = is_candidate_nT.sum(1) <= MOST_CANDIDATES
        row_P, touch_P = (is_candidate_nT & is_proven_n.unsqueeze(1)).nonzero(as_tuple=True)
        pairs_P = torch.unique(row_P * table.n_labels + self.labels_nT[row_P, touch_P])  # sorted
        row_P, label_P = pairs_P // table.n_labels, pairs_P % table.n_labels
        counts_n = torch.bincount(row_P, minlength=n)
        at_P = torch.arange(len(pairs_P), device=pairs_P.device) - (counts_n.cumsum(0) - counts_n)[row_P]
        width = max(int(counts_n.max()), self.search.k)
        scores_nM, labels_nM = self.cells_nC.new_full((n, width), -torch.inf), pairs_P.new_zeros(n, width)
        scores_nM[row_P, at_P] = self.search.score(self.rows_n[row_P], label_P.unsqueeze(1))[:, 0]
        labels_nM[row_P, at_P] = label_P  # a row of labels rises
        best_nk = k_best(scores_nM, self.search.k)
        return labels_nM.gather(1, best_nk), scores_nM.gather(1, best_nk), is_proven_n


def _labels_of(table: DeviceTable, buckets_nRm: Tensor) -> tuple[Tensor, Tensor]:
    """Give the labels of buckets of the first rows, int64 (n, R m W), and which of them exist."""
    step_i = torch.arange(_bucket_width(table), device=buckets_nRm.device)
    step_RW = table.steps_R[: buckets_nRm.shape[1], None] * step_i % table.p
    labels = table.first_labels(buckets_nRm).unsqueeze(3) + step_RW.unsqueeze(1)
    labels = torch.where(labels >= table.p, labels - table.p, labels)
    exists = (buckets_nRm.unsqueeze(3) + step_i * table.n_buckets < table.p) & (labels < table.n_labels)
    return labels.flatten(1), exists.flatten(1)
