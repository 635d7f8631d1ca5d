"""TorchScan: the scores of all labels with torch's own functions, block by block, on any device; needs nothing but torch.

Axes: N samples, R repetitions, B buckets, K labels, A labels that may be found, J labels of a block, G blocks, M blocks chosen, C
labels of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mach.decoding.device.labels import aggregate, score_labels
from mach.decoding.scan import MEDIAN
from mach.hashing.device import DeviceTable

SCORES = 1 << 22  # held at once: the scores of a chunk, what is gathered for it and its buckets, some 64 MiB, stay in an L2 cache


class TorchScan:
    """All labels, or a sorted subset, in blocks of J; the last may be shorter."""

    pruned_from = 0  # look-ups of a sample from which a pruned search is the quicker way

    def __init__(self, scores_NRB: Tensor, table: DeviceTable, kind: int, subset: Tensor | None, width: int):
        self.scores_NRB, self.table, self.kind, self.subset, self.width = scores_NRB, table, kind, subset, width
        self.n_allowed = table.n_labels if subset is None else len(subset)  # A
        self.n_blocks = -(-self.n_allowed // width)  # G
        self.n_held = SCORES // (scores_NRB.shape[1] if kind == MEDIAN else 1)

    def maxima(self) -> Tensor:
        """Give the best score of each block, (N, G).

        The samples' scores of a bucket lie side by side, so that one bucket of the table answers all of them with one read.
        """
        N, R, _ = self.scores_NRB.shape
        packed_RBN = self.scores_NRB.permute(1, 2, 0).contiguous()
        maxima_GN = packed_RBN.new_empty(self.n_blocks, N)
        n_blocks = max(1, self.n_held // (self.width * max(1, N)))
        for first in range(0, self.n_blocks, n_blocks):
            start, stop = first * self.width, min((first + n_blocks) * self.width, self.n_allowed)
            labels_C = self.labels_at(torch.arange(start, stop, device=packed_RBN.device))

            def values(r: int, labels_C: Tensor = labels_C) -> Tensor:
                return packed_RBN[r].index_select(0, self.table.buckets(labels_C, r))

            scores_CN = aggregate(values, R, self.kind)
            n_whole = len(labels_C) // self.width
            whole_CN, rest_CN = scores_CN[: n_whole * self.width], scores_CN[n_whole * self.width :]
            maxima_GN[first : first + n_whole] = whole_CN.view(n_whole, self.width, N).amax(1)
            if len(rest_CN):
                maxima_GN[first + n_whole] = rest_CN.amax(0)
        return maxima_GN.T.contiguous()

    def block_scores(self, rows_N: Tensor, blocks_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Give the labels of some blocks, other ones for each of some samples, and their scores, both (N, M J).

        What is beyond the last label has the score -inf.
        """
        labels_NM, beyond_NM = self.labels_of(blocks_NM)
        scores_NM = score_labels(self.scores_NRB, self.table, rows_N, labels_NM, self.kind)
        return labels_NM, scores_NM.masked_fill_(beyond_NM, -torch.inf)

    def labels_of(self, blocks_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Give the labels of blocks, (N, M J), and whether they are beyond the last one."""
        in_block = torch.arange(self.width, device=blocks_NM.device)
        positions = (blocks_NM.unsqueeze(2) * self.width + in_block).flatten(1)
        return self.labels_at(positions.clamp(max=self.n_allowed - 1)), positions >= self.n_allowed

    def labels_at(self, positions: Tensor) -> Tensor:
        """Give the labels at some places of the sorted list of those that may be found."""
        return positions if self.subset is None else self.subset[positions]
