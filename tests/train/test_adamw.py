"""The CPU's AdamW in one pass: the bits of bfloat16 against torch's, gradients and copies in it against float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.kernels import bits_of, float_of
from mach.train import adamw
from mach.train.adamw import adamw_

NUMBERS = {"step": 3, "rate": 0.1, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.1}


def test_every_bfloat16_is_read_right():
    bits = np.arange(1 << 16, dtype=np.uint16)
    truth = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    found = np.array([float_of(b) for b in bits], np.float32)
    np.testing.assert_array_equal(found, truth)  # NaN equals NaN here


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_rounding_to_bfloat16_is_torchs(bits):
    x = np.array([bits], np.uint32).view(np.float32)
    truth = torch.from_numpy(x).bfloat16().float().item()
    found = float(float_of(bits_of(x[0])))
    assert found == truth or (np.isnan(found) and np.isnan(truth))


@pytest.mark.parametrize("bits", [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0x00000001])
def test_ties_infinities_and_nan_are_rounded_as_torch_does(bits):
    test_rounding_to_bfloat16_is_torchs.hypothesis.inner_test(bits)


def tensors(rng, dtype=torch.float32):
    return [torch.from_numpy(x).to(dtype) for x in (*rng.normal(size=(2, 3, 5, 4)), rng.random((3, 5, 4)))]


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 25))
def test_a_gradient_and_a_copy_in_bfloat16(seed, with_copy, least):
    rng = np.random.default_rng(seed)
    start, gradient = tensors(rng), torch.from_numpy(rng.normal(size=(3, 5, 4))).bfloat16()
    low, wide = [x.clone() for x in start], [x.double() for x in start]
    copy = torch.zeros(3, 5, 4, dtype=torch.bfloat16) if with_copy else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "LEAST", least)
        adamw_(*low, gradient, copy, **NUMBERS)
    adamw_(*wide, gradient.double(), None, **NUMBERS)
    for one, truth in zip(low, wide, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-6)
    assert copy is None or torch.equal(copy, low[0].bfloat16())


def test_a_float32_gradient_renews_the_copy_too():
    start = tensors(np.random.default_rng(0))
    copy = torch.zeros(3, 5, 4, dtype=torch.bfloat16)
    adamw_(*start, torch.ones(3, 5, 4), copy, **NUMBERS)
    assert torch.equal(copy, start[0].bfloat16())


def test_the_bits_do_not_depend_on_the_threads(monkeypatch):
    monkeypatch.setattr(adamw, "LEAST", 3)
    found, n_threads = [], torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            start = tensors(np.random.default_rng(0))
            adamw_(*start, torch.ones(3, 5, 4).bfloat16(), None, **NUMBERS)
            found.append(start)
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_nan_in_the_gradient_reaches_weight_and_copy():
    start, copy = tensors(np.random.default_rng(0)), torch.zeros(3, 5, 4, dtype=torch.bfloat16)
    gradient = torch.zeros(3, 5, 4, dtype=torch.bfloat16)
    gradient[1, 2, 3] = float("nan")
    adamw_(*start, gradient, copy, **NUMBERS)
    assert torch.isnan(start[0]).sum() == 1 and torch.isnan(start[0][1, 2, 3]) and torch.isnan(copy[1, 2, 3])
