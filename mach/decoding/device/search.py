"""The exact top-k out of the best scores of blocks of labels: two looks at the scores, nothing of samples times labels held.

First the best score of every block of J labels in the order of their ids. The k best labels lie in the k blocks of the best such
scores, of equal ones the first: each of these blocks holds a label at least as good as any label of another block, and where they
tie, one of a smaller id. So those k blocks alone are scored again and their labels ordered.

Axes: N samples, K labels, A labels that may be found, J labels of a block, G blocks, M blocks chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mach.decoding.device.labels import Without, k_best
from mach.decoding.device.torch_scan import TorchScan

LEAST_WIDTH, MOST_WIDTH = 64, 1024


def width_for(n_allowed: int, k: int) -> int:
    """Give J, a power of 2, such that ordering A / J blocks and scoring k J labels once more take about as long."""
    at_best = math.sqrt(n_allowed / (8 * k))
    return min(max(1 << round(math.log2(max(at_best, 1))), LEAST_WIDTH), MOST_WIDTH)


def search_blocks(scan: TorchScan, k: int, without: Without | None) -> tuple[Tensor, Tensor]:
    """Give the k best labels of each sample, int64 (N, k), and their scores, float32, best first."""
    maxima_NG = scan.maxima()
    rows_N = torch.arange(len(maxima_NG), device=maxima_NG.device)
    if without is not None:
        _lower_maxima(maxima_NG, scan, without)
    blocks_NM = k_best(maxima_NG, min(k, scan.n_blocks)).sort(dim=1).values  # so that a row of labels rises
    parts = []
    for rows_n in torch.split(rows_N, max(1, scan.n_held // (blocks_NM.shape[1] * scan.width))):
        labels_nM, scores_nM = scan.block_scores(rows_n, blocks_NM[rows_n])
        if without is not None:
            without.drop(scores_nM, rows_n, labels_nM)
        best_nk = k_best(scores_nM, k)
        parts.append((labels_nM.gather(1, best_nk), scores_nM.gather(1, best_nk)))
    labels, scores = zip(*parts, strict=True)
    return torch.cat(labels), torch.cat(scores)


def _lower_maxima(maxima_NG: Tensor, scan: TorchScan, without: Without) -> None:
    """Put right, in place, the best scores of blocks that hold labels which the sample may not find."""
    positions = without.keys_L % without.n_labels
    if scan.subset is not None:
        positions = torch.searchsorted(scan.subset, positions)
    places = torch.unique_consecutive(without.keys_L // without.n_labels * scan.n_blocks + positions // scan.width)
    for places_P in torch.split(places, max(1, scan.n_held // scan.width)):
        rows_P, blocks_P = places_P // scan.n_blocks, places_P % scan.n_blocks
        labels_PJ, scores_PJ = scan.block_scores(rows_P, blocks_P.unsqueeze(1))
        maxima_NG[rows_P, blocks_P] = without.drop(scores_PJ, rows_P, labels_PJ).amax(1)
