"""The pruned search for sums, with torch's own functions: read every bucket once, then only the labels of the best buckets.

A repetition's m best buckets are opened; t_r is the score of the best one left. A label scores at most the sum T of all t_r and,
of each opened bucket that it is in, what that is above t_r. These excesses are added up in cells, to which labels are hashed: a
cell holds at least the excess of each of its labels, as nothing that is added is below zero. A label of each of the fullest cells
is scored exactly, and theta is the k-th best such score. If theta is above T, no label of unopened buckets alone is among the k
best, and of the others only those whose cell holds theta - T: few, and they are scored exactly, to the bits of the scan. If it is
not, as many buckets are opened as bring T below theta, or the sample is left to the scan.

All of it within the rounding of float32, for which `_slack` leaves room.

Axes: N samples, R repetitions, B buckets, K labels, D buckets ordered of each repetition, m of them opened, W labels of a bucket,
T labels touched of a sample, C cells, P pairs of a sample and a label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mach.decoding.device.labels import Without, k_best, score_labels
from mach.decoding.scan import SUM
from mach.hashing.device import DeviceTable

FIRST_DEPTH = 8  # buckets opened at first
MOST_DEPTH = 256
SHARE = 64  # of the buckets of a repetition, at most one in so many is opened: a label touched costs as much as many looked up
TOUCHED = 1 << 25  # labels touched at once: 256 MiB of them, several times
MOST_CELLS = 1 << 22  # for a sample
MOST_CANDIDATES = 1 << 16  # for a sample
GUESSES = 4  # cells whose labels are scored to get theta, for each of the k best


def depth_for(table: DeviceTable) -> int:
    """Give how many buckets of a repetition may be opened before a scan is quicker, or memory is short."""
    n_held = TOUCHED // (len(table.families) * _bucket_width(table))
    return min(table.n_buckets // SHARE, MOST_DEPTH, table.n_buckets - 1, n_held)


def may_pay(table: DeviceTable, kind: int) -> bool:
    """Tell whether there is a search for this table and way to aggregate, and opening some buckets beats a scan."""
    return kind == SUM and table.has_progressions and depth_for(table) >= FIRST_DEPTH


def search_pruned(scores_NRB: Tensor, table: DeviceTable, k: int, without: Without | None) -> tuple[Tensor, Tensor, Tensor]:
    """Give the k best labels of each sample, int64 (N, k), their scores, float32, and whether they are proven, bool (N,).

    What is not proven is not filled in.
    """
    N, R, _ = scores_NRB.shape
    labels_Nk = torch.zeros(N, k, dtype=torch.int64, device=scores_NRB.device)
    scores_Nk, proven_N = scores_NRB.new_zeros(N, k), torch.zeros(N, dtype=torch.bool, device=scores_NRB.device)
    limit, depth = depth_for(table), FIRST_DEPTH
    top = scores_NRB.topk(limit + 1, dim=2)
    tails_ND = top.values.double().sum(1)  # T, if so many buckets are opened
    slack_N = _slack(scores_NRB)
    left_n = torch.arange(N, device=scores_NRB.device)
    while len(left_n):
        needed = []
        for rows_n in torch.split(left_n, max(1, TOUCHED // (R * depth * _bucket_width(table)))):
            found = _try(scores_NRB, table, k, depth, rows_n, top.values[rows_n], top.indices[rows_n], slack_N[rows_n], without)
            labels_nk, best_nk, theta_n, is_proven_n = found
            good_n = rows_n[is_proven_n]
            labels_Nk[good_n], scores_Nk[good_n], proven_N[good_n] = labels_nk[is_proven_n], best_nk[is_proven_n], True
            enough_nD = tails_ND[rows_n] + slack_N[rows_n].unsqueeze(1) < theta_n.unsqueeze(1)
            needed_n = limit + 1 - enough_nD.sum(1)  # T falls as more are opened
            needed.append(torch.where(is_proven_n | (needed_n <= depth), limit + 1, needed_n))
        needed_n = torch.cat(needed)
        left_n = left_n[needed_n <= limit]
        depth = int(needed_n[needed_n <= limit].max()) if len(left_n) else limit
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


def _try(
    scores_NRB: Tensor, table: DeviceTable, k: int, depth: int, rows_n: Tensor, values_nRD: Tensor, buckets_nRD: Tensor,
    slack_n: Tensor, without: Without | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Open so many buckets: give labels (n, k), scores (n, k), theta (n,) and whether the labels are proven (n,)."""
    n = len(rows_n)
    labels_nT, exists_nT = _labels_of(table, buckets_nRD[:, :, :depth])
    excess_nRm = values_nRD[:, :, :depth] - values_nRD[:, :, depth : depth + 1]
    excess_nT = excess_nRm.unsqueeze(3).expand(*excess_nRm.shape, _bucket_width(table)).flatten(1)
    n_cells = min(1 << max(12, labels_nT.shape[1].bit_length()), MOST_CELLS)
    cells_nT = torch.where(exists_nT, labels_nT & (n_cells - 1), n_cells)  # the last cell is for what is no label
    cells_nC = excess_nRm.new_zeros(n, n_cells + 1).scatter_add_(1, cells_nT, excess_nT)
    theta_n = _theta(scores_NRB, table, k, rows_n, labels_nT, cells_nT, cells_nC, without)
    tail_n = values_nRD[:, :, depth].double().sum(1)
    is_proven_n = tail_n + slack_n < theta_n
    least_n1 = (theta_n - tail_n - slack_n).float().unsqueeze(1)
    is_candidate_nT = (cells_nC.gather(1, cells_nT) >= least_n1) & exists_nT
    is_proven_n &= is_candidate_nT.sum(1) <= MOST_CANDIDATES
    row_P, touch_P = (is_candidate_nT & is_proven_n.unsqueeze(1)).nonzero(as_tuple=True)
    pairs_P = torch.unique(row_P * table.n_labels + labels_nT[row_P, touch_P])  # sorted
    labels_nk, scores_nk = _best_of_pairs(scores_NRB, table, k, rows_n, pairs_P, without)
    return labels_nk, scores_nk, theta_n, is_proven_n


def _labels_of(table: DeviceTable, buckets_nRm: Tensor) -> tuple[Tensor, Tensor]:
    """Give the labels of buckets, int64 (n, R m W), and which of them exist."""
    step_i = torch.arange(_bucket_width(table), device=buckets_nRm.device)
    step_RW = table.steps_R.unsqueeze(1) * step_i % table.p
    labels = table.first_labels(buckets_nRm).unsqueeze(3) + step_RW.unsqueeze(1)
    labels = torch.where(labels >= table.p, labels - table.p, labels)
    exists = (buckets_nRm.unsqueeze(3) + step_i * table.n_buckets < table.p) & (labels < table.n_labels)
    return labels.flatten(1), exists.flatten(1)


def _theta(
    scores_NRB: Tensor, table: DeviceTable, k: int, rows_n: Tensor, labels_nT: Tensor, cells_nT: Tensor, cells_nC: Tensor,
    without: Without | None,
) -> Tensor:  # fmt: skip
    """Give a score that k labels reach: the k-th best of a label of each of the fullest cells; float64 (n,), -inf if fewer."""
    owner_nC = torch.full_like(cells_nC, -1, dtype=torch.int64).scatter_(1, cells_nT, labels_nT)  # of several labels, any one
    fullest = cells_nC[:, :-1].topk(min(GUESSES * k + 32, cells_nC.shape[1] - 1), dim=1).indices
    labels_nG = owner_nC.gather(1, fullest)
    scores_nG = score_labels(scores_NRB, table, rows_n, labels_nG.clamp(min=0), SUM).masked_fill_(labels_nG < 0, -torch.inf)
    if without is not None:
        without.drop(scores_nG, rows_n, labels_nG)
    if scores_nG.shape[1] < k:
        return torch.full_like(rows_n, -torch.inf, dtype=torch.float64)
    return scores_nG.topk(k, dim=1).values[:, -1].double()


def _best_of_pairs(
    scores_NRB: Tensor, table: DeviceTable, k: int, rows_n: Tensor, pairs_P: Tensor, without: Without | None
) -> tuple[Tensor, Tensor]:
    """Score pairs n K + k, sorted, and give the k best labels of each sample and their scores, (n, k)."""
    row_P, label_P1 = pairs_P // table.n_labels, (pairs_P % table.n_labels).unsqueeze(1)
    scores_P1 = score_labels(scores_NRB, table, rows_n[row_P], label_P1, SUM)
    if without is not None:
        without.drop(scores_P1, rows_n[row_P], label_P1)
    counts_n = torch.bincount(row_P, minlength=len(rows_n))
    at_P = torch.arange(len(pairs_P), device=pairs_P.device) - (counts_n.cumsum(0) - counts_n)[row_P]
    width = max(int(counts_n.max()), k)
    scores_nM = scores_P1.new_full((len(rows_n), width), -torch.inf)
    labels_nM = pairs_P.new_zeros(len(rows_n), width)
    scores_nM[row_P, at_P], labels_nM[row_P, at_P] = scores_P1[:, 0], label_P1[:, 0]  # a row of labels rises
    best_nk = k_best(scores_nM, k)
    return labels_nM.gather(1, best_nk), scores_nM.gather(1, best_nk)
