"""The visit of a row on a GPU: gradient summed in registers, Adam step taken, in one Triton kernel (`train/rows.py` on the CPU).

U distinct features of the batch, N samples, F features, R repetitions packed side by side, D hidden width.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mach.encoders import SparseBatch
from mach.gpu import launching_on, send
from mach.gpu.triton_rounding import GOLDEN, bfloat16_of, mixed
from mach.heads.rounding import signed


def update_rows_of(
    weight_FRD: Tensor, second_FR: Tensor, batch: SparseBatch, grad_NRD: Tensor, keys: list[int], *, rate: float, beta: float,
    correction: float, epsilon: float,
) -> None:  # fmt: skip
    """Update the rows that a batch touches, in place; see `mach.train.rows.update_rows_of`.

    One program a feature and repetition, the D weights of a row in its registers: D up to a few thousand.
    """
    _, R, D = weight_FRD.shape
    grad_RND = grad_NRD.transpose(0, 1).contiguous()
    if not len(batch.features):
        return
    key_R = send(np.array([signed(key) for key in keys], np.int32), weight_FRD.device)
    with launching_on(weight_FRD):
        _update[(len(batch.features), R)](
            weight_FRD, second_FR, batch.features, batch.feature_offsets, batch.feature_samples, batch.feature_values, grad_RND,
            key_R, len(keys), rate, 1 - beta, 1 / correction, epsilon, grad_RND.shape[1], R, D,
            BLOCK=triton.next_power_of_2(D), ROUNDS=weight_FRD.dtype == torch.bfloat16,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _update(  # type: ignore[no-untyped-def]  # Triton looks names in annotations up, and knows none but its own
    weight, second, features, offsets, samples, values, grad, keys, n_keys,
    rate, share, inverse, epsilon, N, R, D, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    u, r = tl.program_id(0), tl.program_id(1)
    f, begin, end = tl.load(features + u), tl.load(offsets + u), tl.load(offsets + u + 1)
    d = tl.arange(0, BLOCK)
    inside = d < D
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(begin, end):
        n = tl.load(samples + i).to(tl.int64)
        row = tl.load(grad + (r * N + n) * D + d, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(values + i) * row
    place = f * R + r
    old = tl.load(second + place)
    new = old + share * (tl.sum(total * total) / D - old)
    tl.store(second + place, new)
    scale = rate / (tl.sqrt(new * inverse) + epsilon)
    weights = weight + place * D + d
    row = tl.load(weights, mask=inside, other=0.0).to(tl.float32) - scale * total
    if ROUNDS:
        key = tl.load(keys + place % n_keys).to(tl.uint32, bitcast=True)
        key = mixed(key ^ ((place // n_keys).to(tl.uint32) * GOLDEN))
        tl.store(weights, bfloat16_of(row, key + d.to(tl.uint32) * GOLDEN), mask=inside)
    else:
        tl.store(weights, row, mask=inside)
