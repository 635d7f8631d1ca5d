"""A feature's row: its gradient is summed up and its Adam step taken in one visit, so no gradient row is ever written to memory.

A row kept in bfloat16 is rounded stochastically (`mach.heads.rounding`), in the same visit.

U distinct features of the batch, N samples, F features, R repetitions packed side by side, D hidden width.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from mach.encoders import SparseBatch
from mach.heads.rounding import row_key, subtract_row
from mach.kernels import array_of, in_threads, jit_sums, read

TASKS = 8  # a thread, so that none waits long for the last


def update_rows_of(
    weight_FRD: Tensor, second_FR: Tensor, batch: SparseBatch, grad_NRD: Tensor, keys: list[int], *, rate: float, beta: float,
    correction: float, epsilon: float,
) -> None:  # fmt: skip
    """Update the rows that a batch touches, in place, from the gradient of z (float or bfloat16), on the CPU.

    g = sum over the feature's samples of value times gradient;  v <- beta v + (1 - beta) mean_d g^2;
    w <- w - rate g / (sqrt(v / correction) + epsilon), rounded to its storage.  The same bits for any number of threads.

    Args: keys, of the rounding, one a repetition of the model: where each row holds one (hashed features), R is 1 here, and row f
          is repetition f mod their number.
    """
    U, n_threads = len(batch.features), torch.get_num_threads()
    n_parts = min(U, TASKS * n_threads)
    cuts = np.searchsorted(batch.edges, batch.edges[-1] * np.arange(n_parts + 1) // max(1, n_parts))
    cuts[-1:] = U
    dtype = second_FR.numpy().dtype.type
    numbers = dtype(rate), dtype(1 - beta), dtype(1 / correction), dtype(epsilon), np.array(keys, np.uint32)
    arrays = (batch.features, batch.feature_offsets, batch.feature_samples, batch.feature_values, grad_NRD.transpose(0, 1))
    shared = array_of(weight_FRD), second_FR.numpy(), *(array_of(x.contiguous()) for x in arrays)
    in_threads(_update, [(*shared, *numbers, int(a), int(b)) for a, b in itertools.pairwise(cuts)], n_threads)


@jit_sums
def _adam(
    stored_D: np.ndarray, second_FR: np.ndarray, f: int, r: int, gradient_D: np.ndarray,
    rate: float, share: float, inverse: float, epsilon: float, keys: np.ndarray,
) -> None:  # fmt: skip
    """Take one row's step, all its weights by one size."""
    square = gradient_D.dtype.type(0)
    for j in range(len(gradient_D)):
        square += gradient_D[j] * gradient_D[j]
    second_FR[f, r] += share * (square / len(gradient_D) - second_FR[f, r])
    scale = rate / (np.sqrt(second_FR[f, r] * inverse) + epsilon)  # read back: of its own type, not float64, which is slow below
    place = f * second_FR.shape[1] + r
    subtract_row(stored_D, gradient_D, scale, row_key(keys[place % len(keys)], place // len(keys)))


@jit_sums
def _update(
    weight_FRD: np.ndarray, second_FR: np.ndarray,
    features: np.ndarray, offsets: np.ndarray, samples: np.ndarray, values: np.ndarray, grad_RND: np.ndarray,
    rate: float, share: float, inverse: float, epsilon: float, keys: np.ndarray, first: int, last: int,
) -> None:  # fmt: skip
    """Visit the features [first, last) of the batch; four samples a pass, to read and write the sum less often."""
    _, R, D = weight_FRD.shape
    sums = np.empty(D, second_FR.dtype)
    for u in range(first, last):
        f, begin, end = features[u], offsets[u], offsets[u + 1]
        for r in range(R):
            sums[:] = 0
            i = begin
            while i + 4 <= end:
                a, b, c, d = values[i], values[i + 1], values[i + 2], values[i + 3]
                one, two = grad_RND[r, samples[i]], grad_RND[r, samples[i + 1]]
                three, four = grad_RND[r, samples[i + 2]], grad_RND[r, samples[i + 3]]
                for j in range(D):
                    sums[j] += a * read(one[j]) + b * read(two[j]) + c * read(three[j]) + d * read(four[j])
                i += 4
            while i < end:
                a, one = values[i], grad_RND[r, samples[i]]
                for j in range(D):
                    sums[j] += a * read(one[j])
                i += 1
            _adam(weight_FRD[f, r], second_FR, f, r, sums, rate, share, inverse, epsilon, keys)
