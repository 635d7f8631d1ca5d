"""The encoder's kernels for GPUs, on one or in Triton's interpreter, against what the CPU does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mach.data import CSR
from mach.encoders import Dropout, make_batch
from mach.encoders.inputs import SparseInput
from mach.encoders.mlp import MLP

pytest.importorskip("triton", reason="no Triton here: pip install 'mach[gpu]'")

from mach.encoders import triton_kernels

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # tests/conftest.py asks for the interpreter there
R = 3


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape)).float()


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 16, 37, 70])
def test_sums_of_rows_are_the_cpus(rng, storage, width, monkeypatch):
    """The second sample has no features, nor has the last; a block holds 32 numbers."""
    monkeypatch.setattr(triton_kernels, "WIDEST", 32)
    csr = CSR(np.array([0, 3, 3, 12, 13, 13]), rng.integers(0, 7, 13).astype(np.int32), rng.random(13).astype(np.float32), 7)
    rows, batch = normal(rng, 7, width).to(storage), make_batch(csr, normalize=False, device=CPU)
    expected = SparseInput(rows.view(7, 1, width)).forward(batch)[:, 0]
    found = triton_kernels.sum_rows(*(x.to(DEVICE) for x in (rows, batch.offsets, batch.indices, batch.values)))
    torch.testing.assert_close(found.cpu(), expected)
    assert found.dtype == torch.float32 and not found[1].any() and not found[4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_hashed", [False, True])
@pytest.mark.parametrize(("share", "D"), [(0.0, 16), (0.4, 16), (0.4, 21)])
def test_the_first_stage_is_the_cpus_forth_and_back(rng, dtype, is_hashed, share, D):
    """Where features are hashed, z lies as (R, N, D)."""
    N = 5
    z, bias = normal(rng, R, N, D).transpose(0, 1) if is_hashed else normal(rng, N, R, D), normal(rng, R, D)
    drop = Dropout(share, [torch.Generator().manual_seed(r) for r in range(R)]) if share else None
    random = None if drop is None else Dropout(share, [torch.Generator().manual_seed(r) for r in range(R)]).bytes(N, D)
    kept, scale = (256, 1.0) if drop is None else (drop.kept, drop.scale)
    mlp = MLP({"input.bias": bias})
    expected = mlp._first(z, drop, dtype)
    given = [None if x is None else x.to(DEVICE) for x in (z, bias, random)]
    found = triton_kernels.first(*given, kept, scale, dtype)
    assert torch.equal(found.cpu(), expected) and found.is_contiguous() and (found == 0).any()
    grad = normal(rng, R, N, D)
    ours = triton_kernels.first_backward(found, grad.to(DEVICE), scale, dtype)
    for mine, theirs in zip(ours, mlp._first_backward(expected, grad.clone(), scale, dtype), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs)
        assert mine.dtype == theirs.dtype


def test_samples_are_summed_in_stripes_and_none_is_too_few(rng, monkeypatch):
    monkeypatch.setattr(triton_kernels, "STRIPES", 2 * R)
    hidden, grad = normal(rng, R, 7, 4).to(DEVICE), normal(rng, R, 7, 4).to(DEVICE)
    _, total = triton_kernels.first_backward(hidden, grad, 2.0, torch.float32)
    torch.testing.assert_close(total, (grad * (hidden > 0) * 2).sum(1))
    assert triton_kernels.first(normal(rng, 0, R, 4).to(DEVICE), grad[:, 0], None, 256, 1.0, torch.float32).shape == (R, 0, 4)
    assert triton_kernels.sum_rows(grad[0], *(torch.zeros(0, dtype=torch.int32, device=DEVICE),) * 3).shape == (0, 4)
