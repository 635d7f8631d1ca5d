"""The input layer: features -> z (N, R, D), the widest and most memory-hungry part of an encoder.

N samples of the batch, F features, R repetitions packed side by side, D hidden width, U distinct features of the batch.

Repetitions lie next to each other in a feature's row, so one gather serves them all. For sparse features forward is a
bag of rows, and backward is the same bag of the transposed batch: only rows that the batch touches are read or written,
and no gradient of the size of the table exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mach.data import CSR

GRADIENT_BYTES = 2 << 20  # of one block of row gradients: small enough to stay in a core's cache


@dataclass(frozen=True, slots=True)
class SparseBatch:
    """N samples of sparse features, by sample and transposed (by feature), on one device."""

    offsets: Tensor  # int32 (N,), where each sample begins
    indices: Tensor  # int32 (nnz,), features
    values: Tensor  # float (nnz,)
    features: Tensor  # int64 (U,), the distinct features, rising
    feature_offsets: Tensor  # int32 (U + 1,)
    feature_samples: Tensor  # int32 (nnz,), samples by feature
    feature_values: Tensor  # float (nnz,)

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, slots=True)
class DenseBatch:
    """N samples of dense features on one device."""

    values: Tensor  # float (N, F)

    def __len__(self) -> int:
        return len(self.values)


def make_batch(
    features: CSR | np.ndarray, *, normalize: bool, device: torch.device, dtype: torch.dtype = torch.float32
) -> SparseBatch | DenseBatch:
    """Move N samples to a device, each scaled to Euclidean length 1 if asked (a sample of zeros stays zeros)."""
    if isinstance(features, np.ndarray):
        dense = torch.tensor(features, dtype=dtype, device=device)
        if normalize:
            dense = torch.nn.functional.normalize(dense, dim=1)
        return DenseBatch(dense)
    lengths = np.diff(features.indptr)
    samples = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    values: np.ndarray = np.ones(len(samples), np.float32) if features.values is None else np.asarray(features.values)
    if normalize:
        norms = np.sqrt(np.bincount(samples, weights=np.square(values, dtype=np.float64), minlength=len(lengths)))
        values = values / np.where(norms > 0, norms, 1)[samples]
    indices = torch.from_numpy(np.array(features.indices, dtype=np.int32)).to(device)
    weights = torch.from_numpy(np.array(values)).to(device, dtype)
    offsets = torch.from_numpy(features.indptr[:-1].astype(np.int32)).to(device)
    order = torch.argsort(indices, stable=True)
    distinct, counts = torch.unique_consecutive(indices[order], return_counts=True)
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
    starts[1:] = counts.cumsum(0)
    by_feature = torch.from_numpy(samples).to(device)[order]
    return SparseBatch(offsets, indices, weights, distinct.long(), starts, by_feature, weights[order])


class SparseInput:
    """Weight (F, R, D); z = x W for each repetition, as a sum of rows."""

    def __init__(self, weight_FRD: Tensor):
        self.weight = weight_FRD

    def forward(self, batch: SparseBatch) -> Tensor:
        """Give z, shape (N, R, D); a sample without features gives zeros."""
        _, R, D = self.weight.shape
        z = embedding_bag(batch.indices, self.weight.flatten(1), batch.offsets, mode="sum", per_sample_weights=batch.values)
        return z.view(len(batch), R, D)

    def gradient(self, batch: SparseBatch, grad_NRD: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield (features (u,), their gradient (u, R, D)) in blocks that together hold each touched row once."""
        _, R, D = self.weight.shape
        grad = grad_NRD.flatten(1)
        block = max(1, GRADIENT_BYTES // (R * D * grad.element_size()))
        starts = batch.feature_offsets
        edges = starts[::block].tolist() + starts[-1:].tolist()
        for i, u in enumerate(range(0, len(batch.features), block)):
            first, last = edges[i], int(starts[min(u + block, len(batch.features))])
            rows = batch.features[u : u + block]
            samples, values = batch.feature_samples[first:last], batch.feature_values[first:last]
            offsets = starts[u : u + len(rows)] - first
            yield rows, embedding_bag(samples, grad, offsets, mode="sum", per_sample_weights=values).view(-1, R, D)


class DenseInput:
    """Weight (F, R, D); z = x W for each repetition, as one matrix product."""

    def __init__(self, weight_FRD: Tensor):
        self.weight = weight_FRD

    def forward(self, batch: DenseBatch) -> Tensor:
        """Give z, shape (N, R, D)."""
        return (batch.values @ self.weight.flatten(1)).view(len(batch), *self.weight.shape[1:])

    def gradient(self, batch: DenseBatch, grad_NRD: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield (None: every row, the gradient (F, R, D)) once."""
        yield None, (batch.values.T @ grad_NRD.flatten(1)).view_as(self.weight)


Input = SparseInput | DenseInput


def input_for(features: str, weight_FRD: Tensor) -> Input:
    """Give the input layer for `sparse` or `dense` features over a weight of shape (F, R, D)."""
    return SparseInput(weight_FRD) if features == "sparse" else DenseInput(weight_FRD)
