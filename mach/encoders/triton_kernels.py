# mypy: ignore-errors
"""The encoder's passes over memory on a GPU, one kernel each: sums of rows, and the first stage of `mlp.py` forth and back.

Sums are float32 and in a fixed order. Axes: N samples, R repetitions, D hidden width, X numbers of a row (R D, or D where
features are hashed).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mach.gpu import launching_on
from mach.gpu.triton_rounding import nearest_of

WIDEST = 2048  # numbers of a row that a program holds
STRIPES = 1024  # of samples, times repetitions, whose sums a program takes


def sum_rows(rows_FX: Tensor, offsets_N: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Give the sums of each sample's rows (float32 or bfloat16) times its values, float32 (N, X)."""
    N, X = len(offsets_N), rows_FX.shape[1]
    out = torch.empty(N, X, dtype=torch.float32, device=rows_FX.device)
    if N:
        block = min(WIDEST, triton.next_power_of_2(X))
        with launching_on(rows_FX):
            _sum_rows[(N, triton.cdiv(X, block))](
                rows_FX, offsets_N, indices, values, out, N, len(indices), X, BLOCK=block, num_warps=_warps(block)
            )
    return out


def first(z_NRD: Tensor, bias_RD: Tensor, random_RND: Tensor | None, kept: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Give relu(z + b) (R, N, D) in a type, times a scale where a random byte is below `kept`, else zero."""
    N, R, D = z_NRD.shape
    out = torch.empty(R, N, D, dtype=dtype, device=z_NRD.device)
    if N:
        drops, block = random_RND is not None, triton.next_power_of_2(D)
        random = random_RND if drops else out  # the latter is not read
        with launching_on(z_NRD):
            _first[(N, R)](
                z_NRD, bias_RD, random, out, *z_NRD.stride()[:2], random.stride(0), N, D, kept, scale,
                BLOCK=block, DROPS=drops, num_warps=_warps(D),
            )  # fmt: skip
    return out


def first_backward(hidden_RND: Tensor, grad_RND: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turn the gradient of what `first` gave into that of z + b, of a type (R, N, D), and its sum over samples (R, D)."""
    R, N, D = grad_RND.shape
    n_stripes = max(1, min(N, STRIPES // R))
    out, parts = torch.empty_like(grad_RND, dtype=dtype), grad_RND.new_empty(n_stripes, R, D)
    with launching_on(grad_RND):
        _first_backward[(n_stripes, R)](
            hidden_RND, grad_RND.contiguous(), out, parts, N, D, scale, BLOCK=triton.next_power_of_2(D), num_warps=_warps(D)
        )  # fmt: skip
    return out, parts.sum(0)


def _warps(width: int) -> int:
    return min(8, max(1, width // 256))  # 16 bytes of bfloat16 a thread


@triton.jit
def _sum_rows(rows, offsets, indices, values, out, n_samples, n_entries, X, BLOCK: tl.constexpr):
    n, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + n)
    end = tl.load(offsets + n + 1, mask=n + 1 < n_samples, other=n_entries)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(begin, end):
        row = tl.load(rows + tl.load(indices + i).to(tl.int64) * X + columns, mask=columns < X, other=0.0)
        total += tl.load(values + i) * row.to(tl.float32)
    tl.store(out + n * X + columns, total, mask=columns < X)


@triton.jit
def _first(z, bias, random, out, z_n, z_r, random_r, N, D, kept, scale, BLOCK: tl.constexpr, DROPS: tl.constexpr):
    n, r, columns = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < D
    place = (r * N + n) * D + columns
    h = tl.load(z + n * z_n + r * z_r + columns, mask=inside, other=0.0) + tl.load(bias + r * D + columns, mask=inside, other=0.0)
    h = tl.where(h > 0, h, h * 0) * scale  # a NaN stays one
    if DROPS:
        h = tl.where(tl.load(random + r * random_r + n * D + columns, mask=inside, other=0).to(tl.int32) < kept, h, h * 0)
    tl.store(out + place, nearest_of(h, out.dtype.element_ty), mask=inside)


@triton.jit
def _first_backward(hidden, grad, out, parts, N, D, scale, BLOCK: tl.constexpr):
    stripe, r, columns = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(stripe, N, tl.num_programs(0)):
        place = (r * N + n) * D + columns
        passes = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32) > 0
        g = tl.where(passes, tl.load(grad + place, mask=inside, other=0.0) * scale, 0.0)
        tl.store(out + place, nearest_of(g, out.dtype.element_ty), mask=inside)
        total += g
    tl.store(parts + (stripe * tl.num_programs(1) + r) * D + columns, total, mask=inside)
