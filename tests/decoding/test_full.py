"""The full head's decode by chunks: the answer of all outputs at once, bit for bit, and nothing of samples times labels held."""

from __future__ import annotations

import math
import tracemalloc
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import Config, Estimator, Loss
from mach.decoding import decode_topk, full, reference
from mach.decoding.estimators import LOG_SIGMOID, LOG_SOFTMAX, RAW, SIGMOID, SOFTMAX
from mach.decoding.full import full_topk
from mach.encoders import make_batch
from mach.errors import ConfigError
from mach.hashing.table import LabelTable
from mach.model import Packed

LOSSES, ESTIMATORS = get_args(Loss), get_args(Estimator)
CPU = torch.device("cpu")
KINDS = (RAW, SIGMOID, LOG_SIGMOID, SOFTMAX, LOG_SOFTMAX)


def by_chunks(z_NK, k, *, width, asked=None, **how):
    """Decode a matrix of outputs, handed over in a memory that the next chunk overwrites; note which labels were asked for."""
    room = np.full(len(z_NK) * width, np.nan, dtype=np.float32)

    def outputs(labels):
        found = z_NK[:, labels]
        assert found.shape[1] <= width
        if asked is not None:
            asked.append(np.arange(z_NK.shape[1])[labels])
        out = room[: found.size].reshape(found.shape)
        out[:] = found
        return torch.from_numpy(out)

    return full_topk(outputs, *z_NK.shape, k, width=width, **how)


def at_once(z_NK, k, **how):
    return decode_topk(z_NK[:, None].copy(), LabelTable.identity(z_NK.shape[1]), k, **how)


def assert_equal_bits(found, truth):
    np.testing.assert_array_equal(found.labels, truth.labels)
    np.testing.assert_array_equal(found.scores.view(np.int32), truth.scores.view(np.int32))


@st.composite
def problems(draw):
    """Outputs of every kind that tells implementations apart: ties, sure ones whose sigmoids are all 1, the least there are."""
    N, K = draw(st.integers(1, 5)), draw(st.integers(2, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    z_NK = rng.normal(draw(st.sampled_from([-90.0, -20.0, 0.0, 18.0])), draw(st.sampled_from([1e-3, 1.0, 9.0, 60.0])), (N, K))
    z_NK = z_NK.round() if draw(st.booleans()) else z_NK
    subset = np.unique(rng.integers(0, K, draw(st.integers(1, K)))) if draw(st.booleans()) else None
    allowed = np.arange(K) if subset is None else subset
    lists = [rng.choice(K, rng.integers(0, len(allowed)), replace=False) for _ in range(N)] if draw(st.booleans()) else None
    k = draw(st.integers(1, len(allowed) - max((np.isin(row, allowed).sum() for row in lists or []), default=0)))
    return z_NK.astype(np.float32), k, {"restrict": subset, "exclude": lists}


@settings(max_examples=200)
@given(problems(), st.sampled_from(LOSSES), st.sampled_from(ESTIMATORS), st.integers(1, 450), st.integers(1, 3))
def test_chunks_give_the_bits_of_all_at_once(problem, loss, estimator, width, n_threads):
    z_NK, k, only = problem
    how = {"loss": loss, "estimator": estimator, "n_threads": n_threads, **only}
    assert_equal_bits(by_chunks(z_NK, k, width=width, **how), at_once(z_NK, k, **how))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_is_that_of_the_reference(loss, estimator):
    z_NK = np.random.default_rng(5).normal(0, 3, (1, 300)).astype(np.float32)
    found = by_chunks(z_NK, 300, width=70, loss=loss, estimator=estimator)
    truth = reference.label_scores(z_NK.tolist(), [list(range(300))], loss=loss, estimator=estimator, is_identity=True)
    np.testing.assert_allclose(found.scores[0], np.array(truth)[found.labels[0]], rtol=1e-5)
    assert found.labels[0].tolist() == reference.topk(truth, 300)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_of_equal_scores_the_smaller_label_is_first(estimator):
    """Outputs of 20 to 40 rise, but their sigmoids are all 1."""
    z_NK = np.tile(np.linspace(20, 40, 5000, dtype=np.float32), (3, 1))
    found = by_chunks(z_NK, 7, width=900, loss="logistic", estimator=estimator)
    assert_equal_bits(found, at_once(z_NK, 7, loss="logistic", estimator=estimator))
    saturates = estimator in ("mean", "min", "median")
    assert found.labels.tolist() == [list(range(7)) if saturates else list(range(4999, 4992, -1))] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_lets_nothing_better_be_rejected(kind):
    """For scores of outputs, everywhere and next to each other: no output up to the gate scores more than the score it is for."""
    rng = np.random.default_rng(kind)
    spread = np.concatenate([rng.normal(0, scale, 3000) for scale in (0.1, 3.0, 20.0, 60.0)] + [np.linspace(-95, 95, 4000)])
    z_M = np.sort(np.concatenate([spread.astype(np.float32), 5 + np.arange(-2000, 2000, dtype=np.float32) * 5e-7]))
    for total in (1.0, 7.5, 3e6):
        most = z_M[-1]
        score_M = np.array([full._score_of(kind, z, most, total) for z in z_M])
        best_M = np.maximum.accumulate(score_M)
        gate_M = np.array([full._gate_of(kind, score, most, total) for score in score_M])
        n_below_M = np.searchsorted(z_M, gate_M, side="right")  # outputs up to the gate
        assert all(n == 0 or best_M[n - 1] <= score for n, score in zip(n_below_M, score_M, strict=True))
        middle = (z_M > -50) & (z_M < 10) & (abs(score_M) > 1e-30)
        assert (gate_M[middle] > z_M[middle] - 0.1).all()  # and it rejects what is clearly worse
    assert full._gate_of(kind, np.float32(-np.inf), np.float32(0), 1.0) == -np.inf  # nothing found yet


@pytest.mark.parametrize("estimator", ["logits", "min"])
def test_nothing_of_samples_times_labels_is_held(estimator):
    N, K, width = 64, 100_000, 512
    rng = np.random.default_rng(0)
    hidden_ND, weight_KD = (torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32)) for n in (N, K))
    room = torch.empty(N * width)

    def outputs(labels):
        part = weight_KD[labels]
        return torch.mm(hidden_ND, part.T, out=room[: N * len(part)].view(N, -1))

    def find():
        return full_topk(outputs, N, K, 5, width=width, loss="logistic", estimator=estimator, n_threads=2)

    find()  # compiled
    tracemalloc.start()
    try:
        found = find()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_equal_bits(found, at_once((hidden_ND @ weight_KD.T).numpy(), 5, loss="logistic", estimator=estimator))
    assert peak_bytes < 200_000  # beside the room of 131 kB; N K would be 26 MB


def test_a_restricted_decode_asks_for_its_own_labels_only():
    z_NK, asked = np.random.default_rng(1).normal(size=(3, 1000)).astype(np.float32), []
    subset = np.arange(7, 1000, 13)
    found = by_chunks(z_NK, 4, width=20, asked=asked, loss="softmax", estimator="logits", restrict=subset)
    assert np.array_equal(np.concatenate(asked), subset)
    assert_equal_bits(found, at_once(z_NK, 4, loss="softmax", estimator="logits", restrict=subset))


@pytest.mark.parametrize("decode", ["cpu", "device"])
@pytest.mark.parametrize("estimator", ["logits", "min"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_an_output_that_is_not_finite_is_named(decode, estimator, bad):
    z_NK = np.zeros((6, 50), np.float32)
    z_NK[4, 33] = bad
    for row in (4, 2):  # the first of several
        z_NK[row, 40] = bad
        call = by_chunks if decode == "cpu" else by_chunks_on_device
        with pytest.raises(ConfigError, match=rf"sample {100 + row}, repetition 0: the head gave an output that is not a finite"):
            call(z_NK, 3, width=20, loss="softmax", estimator=estimator, first_sample=100)


@pytest.mark.parametrize(
    ("k", "only", "message"),
    [
        (0, {}, r"k=0 must lie in \[1, 50\], the number of labels"),
        (3, {"restrict": [4, 4, 9]}, r"k=3 must lie in \[1, 2\], the number of different labels in restrict"),
        (50, {"exclude": [[1], []]}, r"k=50 is above the 49 labels that sample 0 is left with"),
        (1, {"restrict": [50]}, r"restrict: labels must lie in \[0, 50\)"),
    ],
)
def test_what_cannot_be_found_is_named(k, only, message):
    with pytest.raises(ConfigError, match=message):
        by_chunks(np.zeros((2, 50), np.float32), k, width=9, loss="logistic", estimator="logits", **only)


def test_no_samples_have_no_labels():
    found = by_chunks(np.zeros((0, 50), np.float32), 3, width=9, loss="softmax", estimator="mean")
    assert found.labels.shape == found.scores.shape == (0, 3)


# Another device's way, here on the CPU


def by_chunks_on_device(z_NK, k, *, width, **how):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full, "is_host", lambda device: False)

        def outputs(labels):
            return torch.from_numpy(z_NK[:, labels].copy())

        return full_topk(outputs, *z_NK.shape, k, width=width, device=CPU, **how)


@settings(max_examples=100)
@given(problems(), st.sampled_from(LOSSES), st.sampled_from(ESTIMATORS), st.integers(1, 450))
def test_a_device_gives_the_k_best_of_its_own_scores(problem, loss, estimator, width):
    """To the bits where there is nothing to round; else right to rounding, in order, and nothing clearly better left out."""
    z_NK, k, only = problem
    found = by_chunks_on_device(z_NK, k, width=width, loss=loss, estimator=estimator, **only)
    if estimator == "logits":
        return assert_equal_bits(found, at_once(z_NK, k, loss=loss, estimator=estimator, **only))
    every = at_once(z_NK, z_NK.shape[1], loss=loss, estimator=estimator)
    scores_NK = np.empty_like(z_NK)
    np.put_along_axis(scores_NK, every.labels, every.scores, 1)
    truth = at_once(z_NK, k, loss=loss, estimator=estimator, **only)
    near = {"rtol": 2e-5, "atol": 1e-6 if estimator == "log-probs" else 1e-35}
    np.testing.assert_allclose(found.scores, truth.scores, **near)
    np.testing.assert_allclose(np.take_along_axis(scores_NK, found.labels, 1), found.scores, **near)
    for n, (labels, scores) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True)):
        order = list(zip([-score for score in scores], labels, strict=True))
        assert order == sorted(order) and len(set(labels)) == k
        assert set(labels) <= set(range(z_NK.shape[1]) if only["restrict"] is None else only["restrict"].tolist())
        assert only["exclude"] is None or not set(labels) & set(only["exclude"][n].tolist())


# The model's head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restrict", [None, [3, 4, 8, 17, 18]])
def test_the_head_asks_itself_chunk_by_chunk(monkeypatch, dtype, restrict):
    rng = np.random.default_rng(2)
    shapes = {"input.weight": (9, 1, 8), "input.bias": (1, 8), "head.weight": (1, 30, 8), "head.bias": (1, 30)}
    parameters = {name: torch.from_numpy(rng.normal(size=shape)).to(dtype) for name, shape in shapes.items()}
    packed = Packed(parameters, config=Config(table="identity", normalize=False), features="dense")
    batch = make_batch(rng.normal(size=(5, 9)).astype(np.float32), normalize=False, device=CPU, dtype=dtype)
    monkeypatch.setattr("mach.packed.CHUNK_BYTES", {"cpu": 4 * 8 * 7})  # 7 outputs at a time
    laps = []
    found = packed.full_topk(batch, 4, estimator="logits", restrict=restrict, lap=laps.append)
    z_NK = packed.logits(batch)[:, 0].float().numpy()
    truth = at_once(z_NK, 4, loss="logistic", estimator="logits", restrict=restrict)
    np.testing.assert_array_equal(found.labels, truth.labels)
    np.testing.assert_allclose(found.scores, truth.scores, rtol=1e-5)
    assert laps == ["outputs"] + ["decode", "outputs"] * (5 if restrict is None else 1) + ["decode"]
