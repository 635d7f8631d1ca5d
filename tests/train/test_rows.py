"""The fused visit of a row against the gradient of all rows and the optimiser's update of them, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.data import CSR
from mach.encoders import DenseInput, SparseInput, make_batch
from mach.heads.rounding import key_of, narrow_rows
from mach.train import rows
from mach.train.optim import Optimizer, RowRounding

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


@settings(max_examples=80)
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


@settings(max_examples=20)
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


@settings(max_examples=40)
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


@settings(max_examples=60)
@given(problems(), st.sampled_from([(0, 1, 2), (7,)]), st.sampled_from([1, 3]))
def test_rows_in_bfloat16_are_those_of_float32_rounded_by_the_numbers_of_their_place(problem, repetitions, n_tasks):
    csr, weight, rng = problem
    weight = weight[:, :1].expand(-1, 3, -1).contiguous() if len(repetitions) == 3 else weight[:, :1].contiguous()
    low = weight.bfloat16()
    grad = torch.from_numpy(rng.normal(size=(len(csr), *weight.shape[1:]))).float()
    batch, found = make_batch(csr, normalize=False, device=CPU), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "TASKS", n_tasks)
        for stored in (low.clone(), low.float()):
            optimizer = Optimizer(
                {"input.weight": stored}, weight_decay=0.0, row_wise="input.weight", rounding=RowRounding(5, repetitions)
            )
            optimizer.begin_step(rate=9.9, row_rate=0.1)
            optimizer.update_input(SparseInput(stored), batch, grad)
            found.append((stored, optimizer.state["input.weight.second"]))
    assert found[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=0)
    keys = [key_of(5, 1, r) for r in repetitions]
    touched = batch.features
    assert torch.equal(found[0][0][touched], narrow_rows(found[1][0][touched], torch.bfloat16, keys, touched))


def test_a_row_is_rounded_alike_whoever_is_packed_beside_it():
    csr = CSR(np.array([0, 2, 4]), np.array([0, 2, 1, 2], np.int32), None, 3)
    weight, grad = torch.randn(3, 2, 64).bfloat16(), torch.randn(2, 2, 64)
    batch, found = make_batch(csr, normalize=False, device=CPU), []
    for repetitions, part in (((3, 9), slice(None)), ((9,), slice(1, 2))):
        mine = weight[:, part].clone(memory_format=torch.contiguous_format)
        optimizer = Optimizer(
            {"input.weight": mine}, weight_decay=0.0, row_wise="input.weight", rounding=RowRounding(5, repetitions)
        )
        optimizer.begin_step(rate=9.9, row_rate=0.1)
        optimizer.update_input(SparseInput(mine), batch, grad[:, part].contiguous())
        found.append(mine[:, -1])
    assert torch.equal(*found)
    assert not torch.equal(found[0], weight[:, 1])


def test_hashed_rows_in_bfloat16_are_rounded_by_repetition_and_bucket():
    rng, buckets_RF = np.random.default_rng(3), np.array([[0, 1, 1, 2], [2, 0, 1, 0]])
    csr = CSR(np.array([0, 2, 4]), np.array([0, 2, 1, 3], np.int32), None, 4)
    weight, grad = torch.from_numpy(rng.normal(size=(3, 2, 8))).bfloat16(), torch.from_numpy(rng.normal(size=(2, 2, 8))).float()
    found = []
    for numbers, part in (((3, 9), slice(None)), ((9,), slice(1, 2))):
        mine = weight[:, part].clone(memory_format=torch.contiguous_format)
        batch = make_batch(csr, normalize=False, device=CPU, buckets_RF=buckets_RF[part])
        optimizer = Optimizer({"input.weight": mine}, weight_decay=0.0, row_wise="input.weight", rounding=RowRounding(5, numbers))
        optimizer.begin_step(rate=9.9, row_rate=0.1)
        optimizer.update_input(SparseInput(mine, is_hashed=True), batch, grad[:, part].contiguous())
        found.append(mine[:, -1])
    assert torch.equal(*found)
    assert not torch.equal(found[0], weight[:, 1])


@settings(max_examples=40)
@given(problems())
def test_without_a_visit_rows_in_bfloat16_get_the_same_step(problem):
    csr, weight, rng = problem
    low, batch = weight.bfloat16(), make_batch(csr, normalize=False, device=CPU)
    grad = torch.from_numpy(rng.normal(size=(len(csr), *weight.shape[1:]))).float()
    repetitions, found = tuple(range(weight.shape[1])), []
    for fused in (True, False):
        mine = low.clone()
        optimizer = Optimizer(
            {"input.weight": mine}, weight_decay=0.0, row_wise="input.weight", rounding=RowRounding(5, repetitions)
        )
        optimizer.begin_step(rate=9.9, row_rate=0.1)
        if fused:
            optimizer.update_input(SparseInput(mine), batch, grad)
        else:
            for touched, gradient in SparseInput(mine).gradient(batch, grad):
                optimizer.update_rows(touched, gradient)
        found.append(mine.float())
    torch.testing.assert_close(*found, rtol=2.0**-7, atol=1e-6)  # sums in another order may fall on another side of u
