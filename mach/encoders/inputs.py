"""The input layer: features -> z (N, R, D), the widest and most memory-hungry part of an encoder.

N samples of the batch, F features, R repetitions packed side by side, D hidden width, U distinct features of the batch.

Repetitions lie next to each other in a feature's row, so one gather serves them all. For sparse features forward is a
bag of rows, and backward is the same bag of the transposed batch: only rows that the batch touches are read or written,
and no gradient of the size of the table exists. On a CPU the optimiser goes further and makes a row's gradient and updates
the row in one visit (`train/rows.py`). Features may be hashed into fewer rows, differently in each repetition: then a row
holds one repetition, and a sample has a bag for each repetition.

The rows may be kept in bfloat16: the layer is bound by memory, so half the bytes count twice. Sums are taken in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mach.data import CSR
from mach.gpu import send, takes_kernels
from mach.kernels import array_of, in_threads, jit, jit_sums, read

GRADIENT_BYTES = {"cpu": 2 << 20, "cuda": 1 << 30}  # of one block of row gradients; on a CPU it stays in a core's cache
TASKS = 8  # a thread, so that none waits long for the last


@dataclass(frozen=True, slots=True)
class SparseBatch:
    """N samples of sparse features, by sample and transposed (by feature), on one device.

    With hashed features the samples are R N bags, repetition by repetition, and the features are rows: F R of them, row f R + r
    for bucket f of repetition r.
    """

    edges: np.ndarray  # feature_offsets, in host memory
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
    features: CSR | np.ndarray, *, normalize: bool, device: torch.device, dtype: torch.dtype = torch.float32,
    buckets_RF: np.ndarray | None = None,
) -> SparseBatch | DenseBatch:  # fmt: skip
    """Move N samples to a device, each scaled to Euclidean length 1 if asked (a sample of zeros stays zeros).

    Args: buckets_RF, the row of each feature in each repetition, where sparse features are hashed; below 2**31 / R.
    """
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
    offsets, indices = features.indptr[:-1].astype(np.int32), np.array(features.indices, dtype=np.int32)
    values = values.astype(np.float64 if dtype == torch.float64 else np.float32)
    n_rows = features.n_columns
    if buckets_RF is not None:
        R, n_rows = len(buckets_RF), (int(buckets_RF.max()) + 1) * len(buckets_RF)
        each = np.arange(R, dtype=np.int32)[:, None]
        indices = (buckets_RF[:, indices].astype(np.int32) * np.int32(R) + each).ravel()
        samples, offsets = (samples + each * len(lengths)).ravel(), (offsets + each * len(values)).ravel()
        values = np.tile(values, R)
    by_feature = _transpose(indices, samples, values, n_rows)
    tensors = [send(array, device) for array in (offsets, indices, values, *by_feature)]
    return SparseBatch(by_feature[1], *tensors)


def _transpose(
    indices: np.ndarray, samples: np.ndarray, values: np.ndarray, n_features: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Order a batch's entries by feature, and by sample within one: features (U,), offsets (U + 1,), samples, values (nnz,)."""
    place = np.zeros(n_features, np.int32)  # the system hands out zeros a page at a time, as they are touched
    found = np.empty(len(indices), np.int32)
    features = np.sort(found[: _distinct(indices, place, found)])
    offsets = np.zeros(len(features) + 1, np.int32)
    by_samples, by_values = np.empty_like(samples), np.empty_like(values)
    _by_feature(indices, samples, values, features, place, offsets, by_samples, by_values)
    return features.astype(np.int64), offsets, by_samples, by_values


@jit
def _distinct(indices: np.ndarray, counts: np.ndarray, found: np.ndarray) -> int:
    """Count each feature's entries, and note the features in the order in which they come; give how many there are."""
    n = 0
    for f in indices:
        if counts[f] == 0:
            found[n] = f
            n += 1
        counts[f] += 1
    return n


@jit
def _by_feature(
    indices: np.ndarray, samples: np.ndarray, values: np.ndarray, features: np.ndarray,
    counts: np.ndarray, offsets: np.ndarray, by_samples: np.ndarray, by_values: np.ndarray,
) -> None:  # fmt: skip
    """Turn counts into offsets, then each feature's count into its next free place."""
    for u, f in enumerate(features):
        offsets[u + 1] = offsets[u] + counts[f]
        counts[f] = offsets[u]
    for i, f in enumerate(indices):
        by_samples[counts[f]], by_values[counts[f]] = samples[i], values[i]
        counts[f] += 1


class SparseInput:
    """Weight (F, R, D); z = x W for each repetition, as a sum of rows."""

    def __init__(self, weight_FRD: Tensor, *, is_hashed: bool = False):
        self.weight, self.is_hashed = weight_FRD, is_hashed

    def forward(self, batch: SparseBatch) -> Tensor:
        """Give z, shape (N, R, D); a sample without features gives zeros."""
        _, R, D = self.weight.shape
        rows = self.weight.view(-1, D) if self.is_hashed else self.weight.flatten(1)
        if rows.device.type == "cpu":
            z = _sum_rows(rows, batch)
        elif takes_kernels(rows.device) and batch.values.dtype == torch.float32:
            from mach.encoders import triton_kernels

            z = triton_kernels.sum_rows(rows, batch.offsets, batch.indices, batch.values)
        else:
            values = batch.values.to(rows.dtype)
            z = embedding_bag(batch.indices, rows, batch.offsets, mode="sum", per_sample_weights=values).to(batch.values.dtype)
        return z.view(R, -1, D).transpose(0, 1) if self.is_hashed else z.view(-1, R, D)

    def by_bag(self, grad_NRD: Tensor) -> Tensor:
        """Give a gradient of z as the batch's bags have it: (N, R, D), or (R N, 1, D) where features are hashed."""
        return grad_NRD.transpose(0, 1).reshape(-1, 1, grad_NRD.shape[2]) if self.is_hashed else grad_NRD

    def gradient(self, batch: SparseBatch, grad_NRD: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield (rows (u,), their gradient (u, R, D)) in blocks that together hold each touched row once.

        Where features are hashed, rows are those of the weight seen as (F R, 1, D).
        """
        grad = self.by_bag(grad_NRD.to(batch.values.dtype))
        shape, grad = grad.shape[1:], grad.flatten(1)
        block = max(1, GRADIENT_BYTES[grad.device.type] // (grad.shape[1] * grad.element_size()))
        for u in range(0, len(batch.features), block):
            rows = batch.features[u : u + block]
            first, last = int(batch.edges[u]), int(batch.edges[u + len(rows)])
            samples, values = batch.feature_samples[first:last], batch.feature_values[first:last]
            offsets = batch.feature_offsets[u : u + len(rows)] - first
            yield rows, embedding_bag(samples, grad, offsets, mode="sum", per_sample_weights=values).view(-1, *shape)


def _sum_rows(rows_FX: Tensor, batch: SparseBatch) -> Tensor:
    """Give the sums of each sample's rows, times its values, (N, X), on the CPU: of bfloat16 rows, in float32."""
    N, n_threads = len(batch), torch.get_num_threads()
    out = torch.empty(N, rows_FX.shape[1], dtype=batch.values.dtype)
    offsets = np.append(batch.offsets.numpy(), np.int32(len(batch.indices)))
    shared = array_of(rows_FX), offsets, batch.indices.numpy(), batch.values.numpy(), out.numpy()
    cuts = [N * i // (TASKS * n_threads) for i in range(TASKS * n_threads + 1)]
    in_threads(_sum, [(*shared, first, last) for first, last in itertools.pairwise(cuts) if first < last], n_threads)
    return out


@jit_sums
def _sum(
    rows_FX: np.ndarray, offsets: np.ndarray, indices: np.ndarray, values: np.ndarray, out_NX: np.ndarray, first: int, last: int
) -> None:
    """Sum up the rows of the samples [first, last); eight or four rows a pass, to read and write the sum less often."""
    X = rows_FX.shape[1]
    for n in range(first, last):
        i, end, out = offsets[n], offsets[n + 1], out_NX[n]
        out[:] = 0
        while i + 8 <= end:
            a, b, c, d = values[i], values[i + 1], values[i + 2], values[i + 3]
            e, f, g, h = values[i + 4], values[i + 5], values[i + 6], values[i + 7]
            one, two = rows_FX[indices[i]], rows_FX[indices[i + 1]]
            three, four = rows_FX[indices[i + 2]], rows_FX[indices[i + 3]]
            five, six = rows_FX[indices[i + 4]], rows_FX[indices[i + 5]]
            seven, eight = rows_FX[indices[i + 6]], rows_FX[indices[i + 7]]
            for j in range(X):
                out[j] += (
                    a * read(one[j]) + b * read(two[j]) + c * read(three[j]) + d * read(four[j])
                    + e * read(five[j]) + f * read(six[j]) + g * read(seven[j]) + h * read(eight[j])
                )  # fmt: skip
            i += 8
        while i + 4 <= end:
            a, b, c, d = values[i], values[i + 1], values[i + 2], values[i + 3]
            one, two = rows_FX[indices[i]], rows_FX[indices[i + 1]]
            three, four = rows_FX[indices[i + 2]], rows_FX[indices[i + 3]]
            for j in range(X):
                out[j] += a * read(one[j]) + b * read(two[j]) + c * read(three[j]) + d * read(four[j])
            i += 4
        while i < end:
            a, one = values[i], rows_FX[indices[i]]
            for j in range(X):
                out[j] += a * read(one[j])
            i += 1


class DenseInput:
    """Weight (F, R, D); z = x W for each repetition, as one matrix product."""

    def __init__(self, weight_FRD: Tensor):
        self.weight = weight_FRD

    def forward(self, batch: DenseBatch) -> Tensor:
        """Give z, shape (N, R, D)."""
        return (batch.values @ self.weight.flatten(1)).view(len(batch), *self.weight.shape[1:])

    def gradient(self, batch: DenseBatch, grad_NRD: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield (None: every row, the gradient (F, R, D)) once."""
        yield None, (batch.values.T @ grad_NRD.to(self.weight.dtype).flatten(1)).view_as(self.weight)


Input = SparseInput | DenseInput


def input_for(features: str, weight_FRD: Tensor, *, is_hashed: bool = False) -> Input:
    """Give the input layer for `sparse` or `dense` features over a weight of shape (F, R, D)."""
    return SparseInput(weight_FRD, is_hashed=is_hashed) if features == "sparse" else DenseInput(weight_FRD)
