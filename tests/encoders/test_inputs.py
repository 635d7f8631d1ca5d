"""The input layer against float64 matrices: values, gradients, blocks, normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.data import CSR, take_rows
from mach.encoders import DenseInput, SparseInput, input_for, inputs, make_batch

CPU = torch.device("cpu")


@st.composite
def problems(draw):
    """Give features (N, F) as CSR and as a float64 matrix, a weight (F, R, D) and a gradient (N, R, D), all float64."""
    N, F, R, D = (draw(st.integers(1, high)) for high in (6, 9, 3, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen_NF = rng.random((N, F)) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    X = np.where(chosen_NF, rng.normal(size=(N, F)).astype(np.float32), 0)
    indptr = np.concatenate([[0], chosen_NF.sum(1).cumsum()])
    csr = CSR(
        indptr, np.nonzero(chosen_NF)[1].astype(np.int32), X[chosen_NF], F
    )  # normal values may be zero: stored all the same
    return csr, X.astype(np.float64), torch.from_numpy(rng.normal(size=(F, R, D))), torch.from_numpy(rng.normal(size=(N, R, D)))


def gathered(layer, batch, grad):
    """Add a gradient's blocks up to one of the weight's shape; no row may come twice."""
    total, seen = torch.zeros_like(layer.weight), []
    for rows, part in layer.gradient(batch, grad):
        total[slice(None) if rows is None else rows] += part
        seen += list(range(len(total))) if rows is None else rows.tolist()
    assert seen == sorted(set(seen))
    return total, seen


@settings(max_examples=60)
@given(problems(), st.booleans(), st.sampled_from([1, 100, 1 << 24]))
def test_both_inputs_equal_a_float64_product(problem, normalize, gradient_bytes):
    csr, X, weight, grad = problem
    norms = np.sqrt((X**2).sum(1, keepdims=True))
    truth = torch.from_numpy(X / np.where(norms > 0, norms, 1) if normalize else X)
    for features, kind in ((csr, SparseInput), (X.astype(np.float32), DenseInput)):
        batch = make_batch(features, normalize=normalize, device=CPU, dtype=torch.float64)
        layer = kind(weight)
        assert len(batch) == len(X)
        torch.testing.assert_close(layer.forward(batch), torch.einsum("nf,frd->nrd", truth, weight), rtol=1e-12, atol=1e-12)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(inputs.GRADIENT_BYTES, "cpu", gradient_bytes)
            found, seen = gathered(layer, batch, grad)
        torch.testing.assert_close(found, torch.einsum("nf,nrd->frd", truth, grad), rtol=1e-12, atol=1e-12)
        if kind is SparseInput:
            assert seen == sorted(set(csr.indices.tolist()))  # rows that no sample touches get no gradient, not a zero one


@settings(max_examples=30)
@given(problems())
def test_blocks_do_not_change_a_bit(problem):
    csr, _, weight, grad = problem
    layer, batch = SparseInput(weight.float()), make_batch(csr, normalize=True, device=CPU)
    whole = gathered(layer, batch, grad.float())[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inputs.GRADIENT_BYTES, "cpu", 1)
        assert torch.equal(gathered(layer, batch, grad.float())[0], whole)


@settings(max_examples=30)
@given(problems())
def test_float32_errs_by_rounding_only(problem):
    csr, X, weight, _ = problem
    found = SparseInput(weight.float()).forward(make_batch(csr, normalize=False, device=CPU)).double()
    bound = torch.einsum("nf,frd->nrd", torch.from_numpy(abs(X)), weight.abs()) * (len(X[0]) + 2) * 2.0**-23
    assert ((found - torch.einsum("nf,frd->nrd", torch.from_numpy(X), weight)).abs() <= bound).all()


def test_a_sample_without_features_is_zero_and_a_batch_without_any_too():
    csr = CSR(np.zeros(4, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), 5)
    layer, batch = SparseInput(torch.ones(5, 2, 3)), make_batch(csr, normalize=True, device=CPU)
    assert layer.forward(batch).tolist() == torch.zeros(3, 2, 3).tolist()
    assert list(layer.gradient(batch, torch.ones(3, 2, 3))) == []


@pytest.mark.parametrize("features", [CSR(np.zeros(1, np.int64), np.empty(0, np.int32), None, 4), np.empty((0, 4), np.float32)])
def test_no_samples_at_all(features):
    kind = "sparse" if isinstance(features, CSR) else "dense"
    batch = make_batch(features, normalize=True, device=CPU)
    assert input_for(kind, torch.ones(4, 2, 3)).forward(batch).shape == (0, 2, 3)


def test_entries_without_values_are_ones():
    csr = CSR(np.array([0, 2, 3]), np.array([0, 2, 1], np.int32), None, 3)
    weight = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    assert SparseInput(weight).forward(make_batch(csr, normalize=False, device=CPU)).flatten().tolist() == [101.0, 10.0]
    found = SparseInput(weight).forward(make_batch(csr, normalize=True, device=CPU)).flatten()
    torch.testing.assert_close(found, torch.tensor([101 / 2**0.5, 10.0]))


def test_rows_taken_twice_count_twice():
    csr = take_rows(CSR(np.array([0, 1, 3]), np.array([1, 0, 1], np.int32), np.array([2, 3, 4], np.float32), 2), [1, 1, 0])
    grad = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    found, _ = gathered(SparseInput(torch.zeros(2, 1, 1)), make_batch(csr, normalize=False, device=CPU), grad)
    assert found.flatten().tolist() == [33.0, 244.0]


def test_normalising_keeps_zeros_and_does_not_overflow():
    big = np.array([[3e38, 3e38], [0, 0], [1e-30, 0]], np.float32)
    csr = CSR(np.array([0, 2, 4, 6]), np.array([0, 1] * 3, np.int32), big.ravel(), 2)
    batch = make_batch(csr, normalize=True, device=CPU)
    torch.testing.assert_close(batch.values.view(3, 2), torch.tensor([[0.5**0.5, 0.5**0.5], [0, 0], [1, 0]]))


def test_the_features_given_are_left_as_they_are():
    dense = np.array([[3.0, 4.0]], np.float32)
    csr = CSR(np.array([0, 2]), np.array([0, 1], np.int32), dense.ravel(), 2)
    for array in (dense, csr.values, csr.indices):
        array.flags.writeable = False
    assert make_batch(dense, normalize=True, device=CPU).values.tolist() == pytest.approx(np.array([[0.6, 0.8]]))
    assert make_batch(csr, normalize=True, device=CPU).values.tolist() == pytest.approx([0.6, 0.8])
    assert dense.tolist() == [[3.0, 4.0]]


def test_no_tensor_of_the_size_of_the_table_is_made(largest):
    F, R, D, N = 2000, 2, 8, 4
    csr = CSR(np.arange(N + 1) * 3, np.arange(3 * N, dtype=np.int32) * 100, np.ones(3 * N, np.float32), F)
    layer = SparseInput(torch.ones(F, R, D))
    with largest:
        batch = make_batch(csr, normalize=True, device=CPU)
        layer.forward(batch)
        list(layer.gradient(batch, torch.ones(N, R, D)))
    assert largest.n_elements == 3 * N * R * D  # the rows touched; the table has F R D


@settings(max_examples=40)
@given(problems(), st.booleans())
def test_rows_in_bfloat16_are_summed_in_float32(problem, hashed):
    csr, _, weight, grad = problem
    low, F = weight.bfloat16(), weight.shape[0]
    buckets_RF = np.stack([np.roll(np.arange(F), r) for r in range(weight.shape[1])]) if hashed else None
    batch = make_batch(csr, normalize=False, device=CPU, buckets_RF=buckets_RF)
    layers = [SparseInput(w, is_hashed=hashed) for w in (low, low.float())]
    found, truth = (layer.forward(batch) for layer in layers)
    assert found.dtype == torch.float32 and found.shape == truth.shape
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    for one, other in zip(*(layer.gradient(batch, grad.float()) for layer in layers), strict=True):
        assert torch.equal(one[1], other[1])
