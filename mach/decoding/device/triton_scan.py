"""TritonScan: `TorchScan` with its two looks at the scores in kernels of Triton.

On a CPU the kernels run in Triton's interpreter, where the environment variable TRITON_INTERPRET=1 was set before they were
imported: for tests.

Axes: N samples, R repetitions, B buckets, J labels of a block, G blocks, M blocks chosen, Q samples of a group.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mach.decoding.device import triton_kernels
from mach.decoding.device.torch_scan import TorchScan
from mach.decoding.scan import MEDIAN
from mach.errors import ConfigError
from mach.gpu import launching_on
from mach.hashing.device import MAX_INT32_PRIME, DeviceTable

GROUPS = 8, 16  # samples that a bucket answers: one or two sectors of 32 bytes
TILE, MEDIAN_TILE = 128, 16  # labels whose scores are held in registers, of each sample
N_WARPS = 4
KINDS = {"identity": 0, "carter-wegman": 1, "multiply-shift": 2, "held": 3}


def can_scan(table: DeviceTable, device: torch.device) -> bool:
    """Tell whether the kernels can hash this table, with numbers of 32 bits, on this device."""
    return (device.type == "cuda" or is_interpreted()) and max(table.p, table.n_labels) < MAX_INT32_PRIME


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class TritonScan(TorchScan):
    """All labels, or a sorted subset, in blocks of J, a power of 2; the last may be shorter.

    Raises: ConfigError if the kernels cannot run there, or K is 2**31 or more.
    """

    pruned_from = 1 << 31  # as torch's operations, of which a pruned search is made, are slower beside this scan

    def __init__(
        self, scores_NRB: Tensor, table: DeviceTable, kind: int, subset: Tensor | None, width: int,
        *, group: int | None = None, tile: int | None = None, n_warps: int = N_WARPS,
    ):  # fmt: skip
        super().__init__(scores_NRB, table, kind, subset, width)
        if not can_scan(table, scores_NRB.device):
            raise ConfigError(
                f"the Triton scan takes scores on a GPU and fewer than 2**31 labels, got {scores_NRB.device} and "
                f"{table.n_labels}; use how='torch'"
            )
        N, R, B = scores_NRB.shape
        group = self.group = group or GROUPS[N > GROUPS[0]]
        n_groups = -(-N // group)
        padded = scores_NRB if N == n_groups * group else torch.nn.functional.pad(scores_NRB, (0, 0, 0, 0, 0, -N % group))
        self.packed = padded.view(n_groups, group, R, B).permute(0, 2, 3, 1).contiguous()
        tile = tile or (MEDIAN_TILE if kind == MEDIAN else TILE)
        self.meta: dict[str, Any] = {
            "KIND": KINDS[table.kind],
            "AGGREGATE": kind,
            "HAS_SUBSET": subset is not None,
            "ROWS": 1 << (R - 1).bit_length(),
            "J": width,
            "T": min(tile, width),
            "Q": group,
            "WIDE": B * group >= 2**31,
            "num_warps": n_warps,
        }

    def maxima(self) -> Tensor:
        """Give the best score of each block, (N, G)."""
        out_NG = self.packed.new_empty(len(self.packed) * self.group, self.n_blocks)
        grid = (self.n_blocks, len(self.packed))
        with launching_on(self.packed):
            triton_kernels.block_maxima[grid](self.packed, *self._held(), out_NG, *self._sizes(), self.n_blocks, **self.meta)
        return out_NG[: len(self.scores_NRB)]

    def block_scores(self, rows_N: Tensor, blocks_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Give the labels of some blocks, other ones for each of some samples, and their scores, both (N, M J)."""
        N, M = blocks_NM.shape
        out_NM = self.packed.new_empty(N, M * self.width)
        given = (rows_N.contiguous(), blocks_NM.contiguous(), out_NM)
        with launching_on(self.packed):
            triton_kernels.chosen_scores[(N * M,)](self.packed, *self._held(), *given, *self._sizes(), M, **self.meta)
        return self.labels_of(blocks_NM)[0], out_NM

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.table.words, self.table.held_RK, self.table.words if self.subset is None else self.subset

    def _sizes(self) -> tuple[int, ...]:
        _, R, B = self.scores_NRB.shape
        return self.table.held_mask, R, self.table.n_labels, B, self.n_allowed
