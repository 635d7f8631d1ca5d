"""The optimiser against hand-written float64 updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_reference import adamw_reference, row_adam_reference

from mach.train.optim import Optimizer

R, B, D, F = 2, 7, 3, 5


def optimizer(weight_decay=0.0, dtype=torch.float64):
    rng = np.random.default_rng(0)
    shapes = {"input.weight": (F, R, D), "head.weight": (R, B, D), "head.bias": (R, B)}
    parameters = {name: torch.from_numpy(rng.normal(size=shape)).to(dtype) for name, shape in shapes.items()}
    return Optimizer(parameters, weight_decay=weight_decay, row_wise="input.weight")


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, B), st.sampled_from([0.0, 0.1]), st.sampled_from(["head.weight", "head.bias"]))
def test_adamw_in_parts_equals_the_formula(seed, width, weight_decay, name):
    ours, rng = optimizer(weight_decay), np.random.default_rng(seed)
    weight = ours.parameters[name].numpy().copy()
    first, second, largest = np.zeros_like(weight), np.zeros_like(weight), 0.0
    for step in range(1, 5):
        rate = 0.1 / step
        gradient = rng.normal(size=weight.shape) * 10.0 ** rng.integers(-6, 3)
        largest = max(largest, np.abs(gradient).max())
        ours.begin_step(rate=rate, row_rate=9.9)
        for b in range(0, B, width):
            ours.update(name, slice(b, min(b + width, B)), torch.from_numpy(gradient[:, b : b + width].copy()))
        adamw_reference(weight, first, second, gradient, step=step, rate=rate, weight_decay=weight_decay)
    np.testing.assert_allclose(ours.parameters[name].numpy(), weight, rtol=1e-12, atol=1e-12)
    cancelled = 1e-15 * largest  # where gradients of opposite signs meet, of whose size the rounding is
    np.testing.assert_allclose(ours.state[f"{name}.first"].numpy(), first, rtol=1e-12, atol=cancelled)
    np.testing.assert_allclose(ours.state[f"{name}.second"].numpy(), second, rtol=1e-12)


def test_a_gradient_that_is_not_contiguous_is_read_right():
    gradient = torch.arange(R * B * D, dtype=torch.float64).view(R, D, B).transpose(1, 2)
    straight, turned = optimizer(), optimizer()
    for ours, g in ((straight, gradient.contiguous()), (turned, gradient)):
        ours.begin_step(rate=0.1, row_rate=0.1)
        ours.update("head.weight", slice(None), g)
    assert torch.equal(straight.parameters["head.weight"], turned.parameters["head.weight"])
    assert torch.equal(straight.state["head.weight.first"], turned.state["head.weight.first"])


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.booleans())
def test_rows_equal_the_formula_and_others_stay(seed, all_rows):
    ours, rng = optimizer(), np.random.default_rng(seed)
    weight, second = ours.parameters["input.weight"].numpy().copy(), np.zeros((R, F))
    for step in range(1, 5):
        ours.begin_step(rate=9.9, row_rate=0.1 / step)
        rows = np.arange(F) if all_rows else np.flatnonzero(rng.random(F) < 0.4)
        before = ours.parameters["input.weight"].clone()
        gradient = rng.normal(size=(F, R, D)) * 10.0 ** rng.integers(-6, 3)
        for part in [rows] if all_rows else np.array_split(rows, 2):
            ours.update_rows(None if all_rows else torch.from_numpy(part), torch.from_numpy(gradient[part]))
        for r in range(R):
            row_adam_reference(weight[:, r], second[r], gradient[:, r], rows, step=step, rate=0.1 / step)
        rest = np.setdiff1d(np.arange(F), rows)
        assert torch.equal(ours.parameters["input.weight"][rest], before[rest])
    np.testing.assert_allclose(ours.parameters["input.weight"].numpy(), weight, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.state["input.weight.second"].numpy(), second.T, rtol=1e-12)


def test_a_gradient_of_zeros_moves_nothing_and_gives_no_nan():
    ours = optimizer()
    before = {name: value.clone() for name, value in ours.parameters.items()}
    ours.begin_step(rate=0.1, row_rate=0.1)
    ours.update("head.weight", slice(None), torch.zeros(R, B, D, dtype=torch.float64))
    ours.update_rows(None, torch.zeros(F, R, D, dtype=torch.float64))
    for name, value in ours.parameters.items():
        assert torch.equal(value, before[name])


def test_the_state_is_one_moment_a_row_and_two_a_weight():
    """What a checkpoint holds: the names are frozen, since old checkpoints must be read."""
    sizes = {name: tuple(value.shape) for name, value in optimizer().state.items()}
    assert sizes == {
        "input.weight.second": (F, R),
        "head.weight.first": (R, B, D),
        "head.weight.second": (R, B, D),
        "head.bias.first": (R, B),
        "head.bias.second": (R, B),
    }


@pytest.mark.parametrize("step", [1, 2, 10**6])
def test_float32_follows_float64(step):
    ours, truth = optimizer(dtype=torch.float32), optimizer()
    gradient = torch.from_numpy(np.random.default_rng(1).normal(size=(R, B, D)))
    rows = torch.from_numpy(np.random.default_rng(2).normal(size=(F, R, D)))
    for one, dtype in ((ours, torch.float32), (truth, torch.float64)):
        one.step = step - 1
        one.begin_step(rate=0.01, row_rate=0.01)
        one.update("head.weight", slice(None), gradient.to(dtype))
        one.update_rows(None, rows.to(dtype))
    for name in ("head.weight", "input.weight"):
        torch.testing.assert_close(ours.parameters[name].double(), truth.parameters[name], rtol=1e-6, atol=1e-6)
