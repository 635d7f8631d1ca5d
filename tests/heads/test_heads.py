"""The head's step against autograd over a dense float64 head: loss, gradients, chunks, memory."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import Loss
from mach.heads import LinearHead, Positives, linear
from mach.heads.linear import SUMS, _sum_over_samples, bucket_bytes
from mach.heads.rounding import narrow, widen

CPU = torch.device("cpu")
LOSSES = get_args(Loss)


def positives_of(is_positive_RNB):
    """Turn a boolean array (R, N, B) into Positives by way of one CSR a repetition."""
    csr = []
    for is_positive in is_positive_RNB:
        csr.append((np.concatenate([[0], is_positive.sum(1).cumsum()]), np.nonzero(is_positive)[1].astype(np.int32)))
    return Positives.of(csr, CPU)


def bytes_for(width, hidden, products=None):
    """Give the bytes of a chunk so many buckets wide."""
    R, N, D = hidden.shape
    return width * R * bucket_bytes(N, D, products=hidden.dtype)


def loss_reference(z_NB, is_positive_NB, loss):
    """Read like the formulas: the loss summed over a sample's outputs, mean over samples, with y given densely."""
    y = is_positive_NB.to(z_NB.dtype)
    if loss == "logistic":
        return (torch.log1p(torch.exp(-z_NB.abs())) + z_NB.clamp(min=0) - y * z_NB).sum() / len(z_NB)
    if loss == "squared-hinge":
        return ((1 - (2 * y - 1) * z_NB).clamp(min=0) ** 2).sum() / len(z_NB)
    shares = y / y.sum(1, keepdim=True).clamp(min=1)
    return -(shares * torch.log_softmax(z_NB, 1)).sum() / len(z_NB)


def reference(hidden, weight, bias, is_positive, loss, seen=None):
    """Give by autograd the losses (R,) and the gradients of hidden, weight and bias, with dense float64 targets.

    Of outputs at the hidden vectors `seen`, if given: the gradient goes straight through what makes these.
    """
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    outputs = [h @ w.T + b for h, w, b in zip(*leaves, strict=True)]
    if seen is not None:
        outputs = [z + (s @ w.T + b - z).detach() for z, s, w, b in zip(outputs, seen, weight, bias, strict=True)]
    values = [loss_reference(z, y, loss) for z, y in zip(outputs, torch.from_numpy(is_positive), strict=True)]
    torch.stack(values).sum().backward()
    return torch.stack(values).detach(), *(x.grad for x in leaves)


def step(hidden, weight, bias, positives, loss, *, want_loss=True, **settings):
    """Take the head's step; give what `reference` gives, each bucket's gradients put together from the chunks."""
    found = {name: torch.full(x.shape, math.nan, dtype=bias.dtype) for name, x in (("head.weight", weight), ("head.bias", bias))}
    seen = []

    def update(name, buckets, gradient, copy):
        found[name][:, buckets] = gradient
        seen.append((name, buckets))
        {"head.weight": weight, "head.bias": bias}[name][:, buckets] = 1e30  # what comes after must not look at old chunks

    head = LinearHead(weight, bias, **settings)
    grad_hidden, value = head.step(hidden, positives, loss=loss, update=update, want_loss=want_loss)
    for name in found:
        visited = [b for n, buckets in seen if n == name for b in range(buckets.start, buckets.stop)]
        assert visited == list(range(weight.shape[1]))
    return value, grad_hidden, found["head.weight"], found["head.bias"]


@st.composite
def problems(draw):
    R, N, B, D = (draw(st.integers(1, high)) for high in (3, 5, 23, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    is_positive = rng.random((R, N, B)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=shape)) for shape in ((R, N, D), (R, B, D), (R, B)))
    return hidden, weight * draw(st.sampled_from([1.0, 10.0])), bias, is_positive


@settings(max_examples=150)
@given(problems(), st.sampled_from(LOSSES), st.integers(1, 26))
def test_a_step_equals_autograd_for_any_chunk(problem, loss, width):
    hidden, weight, bias, is_positive = problem
    truth = reference(hidden, weight, bias, is_positive, loss)
    found = step(hidden, weight.clone(), bias.clone(), positives_of(is_positive), loss, chunk_bytes=bytes_for(width, hidden))
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("width", [1, 7, 1000])
def test_float32_errs_by_rounding_only(loss, width):
    rng = np.random.default_rng(3)
    is_positive = rng.random((2, 16, 50)) < 0.05
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=s)).float() for s in ((2, 16, 8), (2, 50, 8), (2, 50)))
    truth = reference(hidden.double(), weight.double(), bias.double(), is_positive, loss)
    found = step(hidden, weight.clone(), bias.clone(), positives_of(is_positive), loss, chunk_bytes=bytes_for(width, hidden))
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_optional_and_changes_nothing(loss):
    rng = np.random.default_rng(4)
    is_positive = rng.random((2, 3, 9)) < 0.3
    tensors = [torch.from_numpy(rng.normal(size=s)) for s in ((2, 3, 4), (2, 9, 4), (2, 9))]
    chunk = bytes_for(5, tensors[0])
    with_loss, without = (
        step(tensors[0], *(x.clone() for x in tensors[1:]), positives_of(is_positive), loss, chunk_bytes=chunk, want_loss=want)
        for want in (True, False)
    )
    assert without[0] is None
    for a, b in zip(with_loss[1:], without[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", LOSSES)
def test_large_outputs_stay_finite(loss):
    hidden, weight, bias = torch.ones(1, 2, 1), torch.tensor([[[500.0], [-500.0], [0.0]]]), torch.zeros(1, 3)
    is_positive = np.array([[[False, True, False], [True, False, False]]])
    value, *gradients = step(hidden, weight, bias, positives_of(is_positive), loss, chunk_bytes=1)
    expected = {"logistic": (1000 + 2 * math.log(2)) / 2, "softmax": 500.0, "squared-hinge": (501**2 * 2 + 2) / 2}[loss]
    assert value.item() == pytest.approx(expected)
    assert all(g.isfinite().all() for g in gradients)


def test_softmax_leaves_samples_without_positives_alone():
    hidden, weight, bias = torch.ones(1, 3, 2), torch.ones(1, 5, 2), torch.zeros(1, 5)
    value, grad_hidden, grad_weight, grad_bias = step(
        hidden, weight, bias, positives_of(np.zeros((1, 3, 5), bool)), "softmax", chunk_bytes=1
    )
    assert value.tolist() == [0.0] and not grad_hidden.any() and not grad_weight.any() and not grad_bias.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_of_samples_times_buckets_or_buckets_times_width_is_made(largest, loss):
    R, N, B, D, C = 2, 32, 1000, 16, 20
    rng = np.random.default_rng(0)
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=s)) for s in ((R, N, D), (R, B, D), (R, B)))
    positives = positives_of(rng.random((R, N, B)) < 0.002)
    head = LinearHead(weight, bias, chunk_bytes=bytes_for(C, hidden))
    with largest:
        head.step(hidden, positives, loss=loss, update=lambda *_: None, want_loss=True)
    of_log_sums = B // C * R * N if loss == "softmax" else 0  # one number a chunk, sample and repetition
    assert R * N * C <= largest.n_elements <= max(R * N * C, of_log_sums)
    assert largest.n_elements < min(R * N * B, R * B * D) / 5


@settings(max_examples=60)
@given(problems(), st.sampled_from(LOSSES), st.integers(1, 26), st.sampled_from(["bfloat16", "float8"]))
def test_a_step_from_narrow_storage_equals_autograd_over_the_stored_numbers(problem, loss, width, precision):
    """In float64, so that only wrong numbers could differ; there is no second copy to renew."""
    hidden, weight, bias, is_positive = problem
    stored = narrow(weight, precision)
    truth = reference(hidden, widen(stored, torch.empty_like(weight)), bias, is_positive, loss)
    chunk_bytes = bytes_for(width, hidden)
    found = step(hidden, stored.clone(), bias.clone(), positives_of(is_positive), loss, chunk_bytes=chunk_bytes)
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_stay_wide_whatever_the_storage_and_no_copy_is_handed_out(loss, precision, products):
    rng = np.random.default_rng(6)
    is_positive = rng.random((3, 16, 40)) < 0.05
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=s)).float() for s in ((3, 16, 8), (3, 40, 8), (3, 40)))
    hidden, stored, copies = hidden.to(products), narrow(weight, precision), []
    exact = widen(stored, torch.empty(weight.shape, dtype=torch.float64))
    head = LinearHead(stored, bias, chunk_bytes=bytes_for(7, hidden))
    positives = positives_of(is_positive)
    gradient, value = head.step(
        hidden, positives, loss=loss, update=lambda name, part, g, copy: copies.append(copy), want_loss=True
    )
    assert gradient.dtype == value.dtype == torch.float32 and copies == [None] * 12
    truth = reference(hidden.double(), exact, bias.double(), is_positive, loss)
    allowed = 2e-5 if products == torch.float32 else 0.02
    for ours, theirs in ((value, truth[0]), (gradient, truth[1])):
        torch.testing.assert_close(ours.double(), theirs, rtol=allowed, atol=allowed * float(theirs.abs().max()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("R", [1, 3])
def test_logits_of_every_storage_are_taken_in_the_type_asked_for(precision, R):
    rng = np.random.default_rng(8)
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=s)).float() for s in ((R, 4, 5), (R, 23, 5), (R, 23)))
    stored = narrow(weight, precision)
    exact = widen(stored, torch.empty(weight.shape, dtype=torch.float64))
    truth = torch.einsum("rnd,rbd->nrb", hidden.double(), exact) + bias.double()
    for width in (1, 4, 100):
        head = LinearHead(stored, bias, chunk_bytes=bytes_for(width, hidden))
        found = head.logits(hidden)
        assert found.shape == (4, R, 23) and found.is_contiguous() and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@given(problems(), st.data())
def test_positives_of_some_samples_are_theirs(problem, data):
    is_positive = problem[3]
    N = is_positive.shape[1]
    rows = slice(data.draw(st.integers(0, N - 1)), data.draw(st.integers(1, N + 3)))
    found, truth = positives_of(is_positive).of_samples(rows), positives_of(is_positive[:, rows])
    for name in ("repetitions", "samples", "buckets", "counts_RN"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name


def test_logits_equal_a_product():
    rng = np.random.default_rng(1)
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=s)) for s in ((3, 4, 5), (3, 6, 5), (3, 6)))
    found = LinearHead(weight, bias).logits(hidden)
    assert found.shape == (4, 3, 6) and found.is_contiguous()
    torch.testing.assert_close(found, torch.einsum("rnd,rbd->nrb", hidden, weight) + bias, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
def test_positives_equal_sets(R, N, B, seed, share):
    is_positive = np.random.default_rng(seed).random((R, N, B)) < share
    found = positives_of(is_positive)
    triples = list(zip(found.repetitions.tolist(), found.samples.tolist(), found.buckets.tolist(), strict=True))
    truth = {(r, n, b) for r in range(R) for n in range(N) for b in range(B) if is_positive[r, n, b]}
    assert triples == sorted(truth)
    assert found.counts_RN.tolist() == [[len({b for r, m, b in truth if (r, m) == (q, n)}) for n in range(N)] for q in range(R)]
    assert {x.dtype for x in (found.repetitions, found.samples, found.buckets, found.counts_RN)} == {torch.int64}


@settings(max_examples=60)
@given(problems(), st.sampled_from(LOSSES), st.integers(1, 26))
def test_products_in_bfloat16_err_by_its_rounding_only(problem, loss, width):
    """Against float64 on the same rounded hidden vectors and weights, in units of the largest gradient."""
    hidden, weight, bias, is_positive = problem
    low, weight = hidden.bfloat16(), weight.bfloat16().float()
    truth = reference(low.double(), weight.double(), bias.float().double(), is_positive, loss)
    chunk_bytes = bytes_for(width, low)
    found = step(low, weight.clone(), bias.float(), positives_of(is_positive), loss, chunk_bytes=chunk_bytes)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.float32, torch.float32]
    outputs = float(torch.einsum("rnd,rbd->rnb", low.double(), weight.double()).abs().max()) + float(bias.abs().max())
    for ours, exact in zip(found, truth, strict=True):
        scale = float(exact.abs().max()) + (weight.shape[1] * outputs if ours is found[0] else outputs)
        torch.testing.assert_close(ours.double(), exact, rtol=0.02, atol=0.02 * scale)


def test_the_copy_for_the_products_is_the_callers_to_renew():
    """The head makes it once, hands it to `update` with each chunk, and multiplies by what it holds from then on."""
    weight, bias = torch.zeros(1, 6, 2), torch.zeros(1, 6)
    hidden, none = torch.ones(1, 1, 2).bfloat16(), positives_of(np.zeros((1, 1, 6), bool))
    head = LinearHead(weight, bias, chunk_bytes=bytes_for(2, hidden))
    copies = []

    def update(name, buckets, gradient, copy):
        if name == "head.weight":
            copies.append(copy)
            weight[:, buckets] = 1.0
            copy[:, buckets] = weight[:, buckets]

    head.step(hidden, none, loss="squared-hinge", update=update, want_loss=False)
    assert len(copies) == 3 and all(copy is copies[0] for copy in copies)
    gradient, _ = head.step(hidden, none, loss="squared-hinge", update=update, want_loss=False)
    assert gradient.flatten().tolist() == [6 * 2 * 3.0] * 2  # sum over buckets of 2 (1 + z) w with z = 2, w = 1


@pytest.mark.parametrize("loss", LOSSES)
def test_without_room_for_a_copy_each_chunk_is_rounded_anew_to_the_same_bits(loss, monkeypatch):
    rng, found = np.random.default_rng(0), []
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((2, 5, 4), (2, 9, 4), (2, 9)))
    positives = positives_of(rng.random((2, 5, 9)) < 0.3)
    for most in (1 << 20, 0):
        monkeypatch.setitem(linear.COPY_BYTES, "cpu", most)
        head, own = LinearHead(weight.clone(), bias.clone()), []

        def update(name, buckets, gradient, copy, head=head, own=own):
            parameter = head.weight if name == "head.weight" else head.bias
            parameter[:, buckets] -= 0.1 * gradient.float()
            if copy is not None:
                copy[:, buckets] = parameter[:, buckets]
            own.append(copy is not None)

        for _ in range(2):
            gradient, _ = head.step(hidden.bfloat16(), positives, loss=loss, update=update, want_loss=False)
        found.append((gradient, head.weight, head.bias))
        assert any(own) == (most > 0)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("N", "C"), [(1, 1), (300, SUMS + 5), (7, 3)])
def test_a_bias_gets_the_sum_over_all_samples(dtype, N, C):
    z = torch.randn(2, N, C, generator=torch.Generator().manual_seed(N)).to(dtype)
    found = _sum_over_samples(z, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, z.double().sum(1).float(), rtol=1e-5, atol=1e-4)


def test_chunks_are_even_and_their_weights_lie_together():
    """Products of parts that lie apart take twice as long on a CPU, and a small last chunk nearly as long as a large one."""
    weight, hidden = torch.randn(3, 20, 4), torch.randn(3, 5, 4)
    head = LinearHead(weight, torch.zeros(3, 20), chunk_bytes=bytes_for(9, hidden))
    chunks = list(head._chunks(5, torch.float32))
    assert [(c.start, c.stop) for c in chunks] == [(0, 7), (7, 14), (14, 20)]
    for chunk in chunks:
        part = head._widened(chunk, torch.float32)
        assert part.is_contiguous() and torch.equal(part, weight[:, chunk])
    assert head._widened(slice(0, 20), torch.float32).data_ptr() == weight.data_ptr()  # no copy of what is whole
