"""Decoding on a tensor's own device: the same answer as on the CPU, without a copy of R B scores a sample to it.

    head outputs (N, R, B) -> scores.device_bucket_scores -> topk_on_device: pruned; what that leaves, by search -> DeviceTopK
                                                                             out of torch_scan's or triton_scan's maxima

Equal bucket scores give equal labels and equal bits of scores, on every device and either way, but that a score of -0.0 comes
back as one of the two zeros. Bucket scores of another device differ by rounding (`scores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy.typing as npt
import torch
from torch import Tensor

from mach.config import Estimator
from mach.decoding.device.labels import Without
from mach.decoding.device.pruned import may_pay, search_pruned
from mach.decoding.device.scores import device_bucket_scores
from mach.decoding.device.search import search_blocks, width_for
from mach.decoding.device.torch_scan import TorchScan
from mach.decoding.only import check_exclude, check_restrict
from mach.decoding.scan import AGGREGATES
from mach.decoding.topk import check_k
from mach.errors import ConfigError, MissingExtra
from mach.gpu import has_triton, takes_kernels
from mach.hashing.device import DeviceTable
from mach.hashing.table import LabelTable

__all__ = ["DeviceTopK", "device_bucket_scores", "topk_on_device"]

How = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class DeviceTopK:
    """The k best labels of each sample, on the device of the scores: best first, ties by the smaller label id."""

    labels: Tensor  # int64 (N, k)
    scores: Tensor  # float32 (N, k)
    is_pruned: Tensor  # bool (N,): whether the pruned search proved it, so that no scan was needed


def topk_on_device(
    scores_NRB: Tensor,
    table: LabelTable,
    k: int,
    *,
    estimator: Estimator,
    restrict: npt.ArrayLike | None = None,
    exclude: Sequence[npt.ArrayLike] | None = None,
    how: How = "auto",
    prune: bool | None = None,
) -> DeviceTopK:
    """Give the k best labels of each sample, to the bits of `scan_topk`.

    Holds a copy of the scores, N K / 64 floats at most, and some 100 MiB; a pruned search 2 GiB at most.

    Args:    scores_NRB, float32 on any device, from `device_bucket_scores`: finite. restrict, labels to choose among, for all
             samples; exclude, N lists of labels that each sample may not find. how, the scan: "torch", "triton", or "auto",
             Triton on a GPU where it is installed. prune, whether to search the best buckets first, of tables and estimators for
             which there is such a search; None: where it is the quicker way.
    Raises:  ConfigError if k is outside [1, K], the scores are of another kind or do not fit the table; if a label is outside
             [0, K), or fewer than k labels are left to a sample. MissingExtra if Triton is asked for and absent.
    """
    R, B, K = table.n_repetitions, table.n_buckets, table.n_labels
    if scores_NRB.dtype != torch.float32 or scores_NRB.ndim != 3 or scores_NRB.shape[1:] != (R, B):
        raise ConfigError(
            f"scores must be a float32 tensor (N, {R}, {B}), as the table has {R} repetitions and {B} buckets, "
            f"got {scores_NRB.dtype} {tuple(scores_NRB.shape)}"
        )
    check_k(k, K)
    subset = None if restrict is None else check_restrict(restrict, K, k)
    lists = None if exclude is None else check_exclude(exclude, len(scores_NRB), K, subset, k)
    device = scores_NRB.device
    if not len(scores_NRB):
        nothing = torch.empty(0, k, dtype=torch.int64, device=device)
        return DeviceTopK(nothing, scores_NRB.new_empty(0, k), nothing.any(1))
    without = None if lists is None or not len(lists.labels) else Without.of(lists, K, device)
    allowed = None if subset is None else torch.from_numpy(subset).to(device)
    on_device = DeviceTable.of(table, device)
    scan_kind = _scan_kind(on_device, device, how)
    kind, n_allowed = AGGREGATES[estimator], K if subset is None else len(subset)
    with torch.no_grad():
        is_pruned = torch.zeros(len(scores_NRB), dtype=torch.bool, device=device)
        pays = R * n_allowed >= scan_kind.pruned_from if prune is None else prune
        if pays and allowed is None and may_pay(on_device, kind):
            labels, scores, is_pruned = search_pruned(scores_NRB, on_device, k, without)
            if bool(is_pruned.all()):
                return DeviceTopK(labels, scores, is_pruned)
        left = (~is_pruned).nonzero().squeeze(1)
        whole = len(left) == len(scores_NRB)
        scan = scan_kind(scores_NRB if whole else scores_NRB[left], on_device, kind, allowed, width_for(n_allowed, k))
        found = search_blocks(scan, k, without if whole or without is None else without.of_rows(left))
        if whole:
            return DeviceTopK(*found, is_pruned)
        labels[left], scores[left] = found
        return DeviceTopK(labels, scores, is_pruned)


def _scan_kind(table: DeviceTable, device: torch.device, how: How) -> type[TorchScan]:
    if how == "torch" or (how == "auto" and not takes_kernels(device)):
        return TorchScan
    if not has_triton():
        raise MissingExtra("the scan in Triton", "gpu")
    from mach.decoding.device.triton_scan import TritonScan, can_scan

    return TorchScan if how == "auto" and not can_scan(table, device) else TritonScan
