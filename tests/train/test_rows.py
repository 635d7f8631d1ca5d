"""The fused visit of a row against the gradient of all rows and the optimiser's update of them, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.data import CSR
from mach.encoders import DenseInput, SparseInput, make_batch
from mach.train import rows
from mach.train.optim import Optimizer

CPU = torch.device("cpu")


@st.composite
def problems(draw):
    """Give features (N, F) as CSR, a weight (F, R, D), and the seed of the gradients."""
    N, F, R, D = (draw(st.integers(1, high)) for high in (9, 7, 3, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen_NF = rng.random((N, F)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    values = rng.normal(size=int(chosen_NF.sum())).astype(np.float32)
    csr = CSR(np.concatenate([[0], chosen_NF.sum(1).cumsum()]), np.nonzero(chosen_NF)[1].astype(np.int32), values, F)
    return csr, torch.from_numpy(rng.normal(size=(F, R, D))), rng


def steps_of(csr, weight, rng, dtype, *, fused, n=3):
    """Take a few steps with one gradient after the other; give the weight and its moments."""
    weight = weight.to(dtype).clone()
    optimizer = Optimizer({"input.weight": weight}, weight_decay=0.0, row_wise="input.weight")
    layer, batch = SparseInput(weight), make_batch(csr, normalize=False, device=CPU, dtype=dtype)
    for step in range(n):
        optimizer.begin_step(rate=9.9, row_rate=0.1 / (step + 1))
        grad = torch.from_numpy(rng.normal(size=(len(csr), *weight.shape[1:])) * 10.0 ** rng.integers(-6, 3)).to(dtype)
        if fused:
            optimizer.update_input(layer, batch, grad)
        else:
            for touched, gradient in layer.gradient(batch, grad):
                optimizer.update_rows(touched, gradient)
    return weight, optimizer.state["input.weight.second"]


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from([1, 3]))
def test_a_visit_equals_gradient_and_update(problem, n_tasks):
    csr, weight, rng = problem
    state = rng.bit_generator.state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "TASKS", n_tasks)
        found = steps_of(csr, weight, rng, torch.float64, fused=True)
    rng.bit_generator.state = state
    for one, truth in zip(found, steps_of(csr, weight, rng, torch.float64, fused=False), strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-12, atol=1e-12)
    rest = np.setdiff1d(np.arange(csr.n_columns), csr.indices)
    assert torch.equal(found[0][rest], weight[rest])  # rows that no sample touches stay to the bit
    assert not found[1][rest].any()


@settings(max_examples=20, deadline=None)
@given(problems())
def test_float32_follows_float64_with_the_same_bits_for_any_number_of_threads(problem):
    csr, weight, rng = problem
    state, found = rng.bit_generator.state, []
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            rng.bit_generator.state = state
            torch.set_num_threads(n)
            found.append(steps_of(csr, weight, rng, torch.float32, fused=True))
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    rng.bit_generator.state = state
    truth = steps_of(csr, weight, rng, torch.float64, fused=False)
    torch.testing.assert_close(found[0][0].double(), truth[0], rtol=1e-4, atol=1e-4)


def test_a_gradient_in_another_order_of_memory_is_read_right():
    csr = CSR(np.array([0, 2, 3]), np.array([0, 2, 1], np.int32), None, 3)
    grad = torch.arange(2 * 2 * 5, dtype=torch.float32).view(2, 2, 5)
    found = []
    for g in (grad, grad.transpose(0, 1).contiguous().transpose(0, 1)):
        weight = torch.zeros(3, 2, 5)
        optimizer = Optimizer({"input.weight": weight}, weight_decay=0.0, row_wise="input.weight")
        optimizer.begin_step(rate=0.1, row_rate=0.1)
        optimizer.update_input(SparseInput(weight), make_batch(csr, normalize=False, device=CPU), g)
        found.append(weight)
    assert torch.equal(*found)
    assert found[0].any()


def test_dense_features_are_updated_by_the_same_formula():
    X = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]], np.float32)
    csr = CSR(np.array([0, 2, 3]), np.array([0, 2, 1], np.int32), np.array([1, 2, 3], np.float32), 3)
    found, grad = [], torch.arange(2 * 2 * 5, dtype=torch.float64).view(2, 2, 5) - 7
    for features, kind in ((csr, SparseInput), (X, DenseInput)):
        weight = torch.zeros(3, 2, 5, dtype=torch.float64)
        optimizer = Optimizer({"input.weight": weight}, weight_decay=0.0, row_wise="input.weight")
        optimizer.begin_step(rate=0.1, row_rate=0.1)
        optimizer.update_input(kind(weight), make_batch(features, normalize=False, device=CPU, dtype=torch.float64), grad)
        found.append(weight)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_a_gradient_in_bfloat16_is_taken_as_it_is(problem):
    csr, weight, rng = problem
    low = torch.from_numpy(rng.normal(size=(len(csr), *weight.shape[1:]))).bfloat16()
    found = []
    for grad in (low, low.float()):
        mine = weight.float().clone()
        optimizer = Optimizer({"input.weight": mine}, weight_decay=0.0, row_wise="input.weight")
        optimizer.begin_step(rate=9.9, row_rate=0.1)
        optimizer.update_input(SparseInput(mine), make_batch(csr, normalize=False, device=CPU), grad)
        found.append((mine, optimizer.state["input.weight.second"]))
    for one, truth in zip(*found, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-5, atol=1e-5)
