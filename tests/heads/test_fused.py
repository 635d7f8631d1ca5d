"""The fused step in Triton, on a GPU or in Triton's interpreter, against autograd in float64 and against formulas of its rules.

Where products run in bfloat16, the truth is taken at the rounded hidden vectors and weights. A program of the interpreter takes
milliseconds: blocks are small here, problems of several blocks each way, with ragged ends.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import LOSSES, positives_of, reference

import mach
from mach.heads import LinearHead, Positives
from mach.heads.fused import can_fuse, fused_step
from mach.heads.rules import BETAS, EPSILON, Rule, Ruled, State
from mach.heads.scaled import Scaled, scaled

triton = pytest.importorskip("triton", reason="no Triton here: pip install 'mach[gpu]'")
tl = pytest.importorskip("triton.language")

from mach.gpu.triton_rounding import bfloat16_of, float8_of  # noqa: E402
from mach.heads.fused import triton_kernels, triton_step  # noqa: E402
from mach.heads.fused.triton_batch import LOW, Blocks  # noqa: E402
from mach.train.optim import Optimizer  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # tests/conftest.py asks for the interpreter there
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # beyond the last output
FLOAT8 = torch.float8_e4m3fn
STORAGES = [torch.float32, torch.bfloat16, FLOAT8]
OF_EIGHTH = 1e-4 if torch.cuda.is_available() else 2e-6  # of a loss: Hopper's own sums of products of float8 have some 14 bits
SMALL = Blocks(samples=16, outputs=(32, 32), update=(32, 32), n_warps=4, n_stages=2)
WIDE = Blocks(samples=64, outputs=(32, 16), update=(16, 32), n_warps=4, n_stages=2)  # all samples in a block


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch):
    monkeypatch.setattr("mach.heads.fused.ON_CPU", DEVICE.type == "cpu")


def rule_of(kind="sgd", rate=0.25, weight_decay=0.02, repetitions=(4, 0, 9), first=0):
    return Rule(
        kind=kind, rate=rate, weight_decay=weight_decay, step=3, seed=0x1234_5678_9ABC_DEF0, repetitions=repetitions, first=first
    )  # fmt: skip


@dataclass
class Problem:
    hidden: torch.Tensor
    stored: torch.Tensor
    bias: torch.Tensor
    is_positive: np.ndarray
    narrow: Scaled | None = None  # of which outputs are products of float8

    @classmethod
    def of(cls, R, N, B, D, storage, *, seed=0, share=0.02, low=None, in_float8=False):
        rng = np.random.default_rng(seed)
        hidden, weight, bias = (torch.from_numpy(rng.normal(size=s)).float() for s in ((R, N, D), (R, B, D), (R, B)))
        low = storage != torch.float32 if low is None else low
        weight /= D**0.5
        stored = (weight * 32).to(FLOAT8) if storage == FLOAT8 else weight.to(storage)
        hidden = hidden.bfloat16() if low else hidden
        if low and storage == torch.float32:
            stored = stored.bfloat16().float()  # what its products are taken of
        hidden, stored, bias = (x.to(DEVICE) for x in (hidden, stored, bias))
        return cls(hidden, stored, bias, rng.random((R, N, B)) < share, scaled(hidden) if in_float8 else None)

    def weight(self):
        return widened(self.stored)

    def truth(self, loss):
        """Give losses and gradients of hidden vectors, weights and biases."""
        where = (x.double().cpu() for x in (self.hidden, self.weight(), self.bias))
        seen = None if self.narrow is None else self.narrow.widened(torch.float64).cpu()
        return reference(*where, self.is_positive, loss, seen)

    def positives(self):
        found = positives_of(self.is_positive)
        return Positives(*(x.to(DEVICE) for x in (found.repetitions, found.samples, found.buckets, found.counts_RN)))

    def step(self, loss, *, rule, state=None, blocks=SMALL, chunk_bytes=1 << 20, want_loss=True):
        return triton_step.step(
            self.hidden, self.stored, self.bias, self.positives(), loss=loss, rule=rule, state=state or State(),
            want_loss=want_loss, chunk_bytes=chunk_bytes, blocks=blocks, narrow=self.narrow,
        )  # fmt: skip


def widened(stored):
    return stored.double() / 32 if stored.dtype == FLOAT8 else stored.double()


def noise_reference(rule, R, B, D):
    """Read like the specification: random bits of each weight, in Python's integers."""
    mask = 0xFFFFFFFF

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D & mask
        x ^= x >> 15
        x = x * 0x846CA68B & mask
        return x ^ x >> 16

    out = np.empty((R, B, D), np.uint64)
    for r, number in enumerate(rule.repetitions[:R]):
        key = mix((rule.seed & mask) ^ mix(((rule.seed >> 32) + rule.step * 0x9E3779B1) & mask))
        key = mix((key + number * 0x85EBCA6B) & mask)
        for b in range(B):
            row = mix(key ^ ((rule.first + b) * 0x9E3779B1 & mask))
            out[r, b] = [(row + d * 0x9E3779B1) & mask for d in range(D)]
    return out


def rounded_reference(weight, u, storage):
    """Round float32 numbers (X) by random bits (X) to what a storage holds, as float64, one by one as the specification says."""
    out = np.empty(len(weight))
    for i, (w, bits) in enumerate(zip(weight.astype(np.float32), u, strict=True)):
        if np.isnan(w) or (np.isinf(w) and storage == torch.bfloat16):
            out[i] = w
        elif storage == torch.bfloat16:
            magnitude = int(np.abs(w).view(np.uint32)) + (int(bits) >> 16) >> 16
            out[i] = np.copysign(np.uint32(min(magnitude, 0x7F7F) << 16).view(np.float32), w)
        else:
            m = min(abs(float(w)) * 32, 448.0)
            quantum = 2.0 ** (max(int(np.floor(np.log2(m))) if m else -9, -6) - 3)
            out[i] = np.copysign(np.floor(m / quantum + float(bits) / 2.0**32) * quantum / 32, w)
    return out


def check_gradients(problem, loss, blocks, chunk_bytes=1 << 20):
    """Compare losses and gradients with the truth, to the rounding of the output gradients to the type of the products."""
    R = len(problem.stored)
    is_exact = problem.hidden.dtype == problem.stored.dtype == torch.float32
    truth, old = problem.truth(loss), problem.weight().cpu()
    rule = rule_of(rate=0.25, weight_decay=0.0, repetitions=tuple(range(R)))
    hidden, bias, value = problem.step(loss, rule=rule, blocks=blocks, chunk_bytes=chunk_bytes)
    is_large = not is_exact and problem.hidden.shape[1] > (blocks or LOW).samples  # outputs and sums of products are rounded, too
    share = 2e-6 if is_exact else 1e-2 if is_large else 4e-3
    of_value = 4e-3 if is_large else 2e-6 if problem.narrow is None else OF_EIGHTH
    for ours, theirs, allowed in (
        (value, truth[0], of_value),
        (hidden, truth[1], share),
        (bias, truth[3], share),
    ):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=0, atol=allowed * float(theirs.abs().max()) + 1e-9)
    asked, storage = old - rule.rate * truth[2], problem.stored.dtype
    asked = asked.clamp(-14, 14) if storage == FLOAT8 else asked
    allowed = rule.rate * share * float(truth[2].abs().max())
    digits, least = {torch.bfloat16: (7, 1e-9), FLOAT8: (3, 2.0**-14)}.get(storage, (22, 1e-9))
    step = (asked.abs() * 2.0**-digits).clamp(min=least)  # of the storage, at most
    assert bool(((problem.weight().cpu() - asked).abs() <= 1.1 * allowed + step).all())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("R", "blocks"), [(1, WIDE), (3, SMALL)])
def test_losses_and_gradients_are_autograds(storage, loss, R, blocks):
    check_gradients(Problem.of(R, 18, 70, 33, storage), loss, blocks, chunk_bytes=2 * 64 * 2 * R * 32)


@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_their_own_sizes_and_bfloat16_products_of_float32_weights(loss):
    check_gradients(Problem.of(1, 20, 140, 70, torch.float32, low=True), loss, None)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("R", "blocks"), [(1, WIDE), (2, SMALL), (1, None)])
def test_outputs_in_float8_are_of_the_rounded_hidden_vectors_and_gradients_of_the_others(loss, R, blocks):
    """Samples of very different sizes, so that each needs its own scale."""
    problem = Problem.of(R, 18, 70, 33, FLOAT8)
    problem.hidden *= 2.0 ** torch.arange(-9, 9, device=DEVICE)[:, None] / 2**6
    problem.hidden[0, 3] = 0
    problem.narrow = scaled(problem.hidden)
    check_gradients(problem, loss, blocks, chunk_bytes=2 * 64 * 2 * R * 32)


@settings(max_examples=8)
@given(
    st.tuples(*(st.integers(1, high) for high in (2, 33, 50, 40))), st.sampled_from(STORAGES), st.sampled_from(LOSSES),
    st.sampled_from([SMALL, WIDE]), st.sampled_from([0.0, 0.03, 0.3]), st.integers(1, 1 << 15), st.booleans(),
)  # fmt: skip
def test_any_sizes(sizes, storage, loss, blocks, share, chunk_bytes, in_float8):
    in_float8 = in_float8 and storage == FLOAT8
    check_gradients(Problem.of(*sizes, storage, seed=sum(sizes), share=share, in_float8=in_float8), loss, blocks, chunk_bytes)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rowwise-adam"])
def test_a_copy_of_the_weights_for_products_is_renewed_and_changes_nothing(kind):
    R, N, B, D = 2, 20, 72, 24
    found = []
    for has_copy in (False, True):
        problem, state = Problem.of(R, N, B, D, torch.float32, low=True), state_for(kind, R, B, D)
        low = problem.stored.bfloat16() if has_copy else None
        for _ in range(2):
            out = triton_step.step(
                problem.hidden, problem.stored, problem.bias, problem.positives(), loss="logistic", rule=rule_of(kind=kind),
                state=state, want_loss=True, chunk_bytes=1, blocks=SMALL, low=low,
            )  # fmt: skip
        found.append([*out, problem.stored])
        assert low is None or torch.equal(low, problem.stored.bfloat16())
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_head_keeps_such_a_copy_for_large_batches_alone(monkeypatch):
    problem, seen = Problem.of(1, 130, 8, 4, torch.float32, low=True), []
    monkeypatch.setattr("mach.heads.linear.fused_step", lambda *given, low, **how: seen.append(low) or (given[0], given[2], None))
    head = LinearHead(problem.stored, problem.bias)
    update = Ruled(lambda *what: None, rule_of(repetitions=(0,)), State())
    for n in (130, 128, 129):
        hidden, positives = problem.hidden[:, :n], problem.positives().of_samples(slice(0, n))
        head.step(hidden, positives, loss="logistic", update=update, want_loss=False)
    assert seen[1] is None and all(torch.equal(low, problem.stored.bfloat16()) for low in seen[::2])


def test_a_large_batch_holds_the_sums_of_a_chunk_alone(monkeypatch):
    """The samples go in two stripes, each with sums of its own."""
    shapes, slopes = [], triton_kernels.slopes

    class Noting:
        def __getitem__(self, grid):
            def launch(*given, **how):
                shapes.append((given[2].shape, given[7].shape))
                slopes[grid](*given, **how)

            return launch

    monkeypatch.setattr(triton_kernels, "slopes", Noting())
    check_gradients(Problem.of(1, 40, 84, 4, torch.bfloat16), "logistic", SMALL, chunk_bytes=1)
    assert shapes == [((2, 1, 32), (2, 1, 1))] * 3


def test_a_positive_surely_found_keeps_its_small_gradient():
    """sigmoid(z) - 1 in bfloat16 would be 0 for z = 12."""
    hidden, weight = torch.ones(1, 1, 16).bfloat16().to(DEVICE), torch.full((1, 32, 16), 0.75).to(DEVICE)
    problem = Problem(hidden, weight, torch.zeros(1, 32).to(DEVICE), np.eye(1, 32, 5, dtype=bool)[None])
    _, bias, _ = problem.step("logistic", rule=rule_of(repetitions=(0,)))
    assert float(bias[0, 5]) == pytest.approx(-1 / (1 + np.exp(12)), rel=4e-3)


@pytest.mark.parametrize("blocks", [SMALL, WIDE])
def test_the_same_bits_every_time_and_for_any_chunk_but_in_the_hidden_gradient(blocks):
    found = []
    for chunk_bytes in (1 << 20, 1 << 20, 1):
        problem = Problem.of(1, 20, 70, 20, torch.bfloat16)
        hidden, bias, value = problem.step("softmax", rule=rule_of(), blocks=blocks, chunk_bytes=chunk_bytes)
        found.append((hidden, bias, value, problem.stored))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[2][1:], strict=True))


@triton.jit
def round_kernel(values, bits, out, KIND: tl.constexpr, N: tl.constexpr):
    x, u = tl.load(values + tl.arange(0, N)), tl.load(bits + tl.arange(0, N)).to(tl.uint32)
    new = bfloat16_of(x, u) if KIND == 1 else float8_of(x, u)
    tl.store(out + tl.arange(0, N), new)


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_rounding_is_the_specifications_bit_for_bit(storage):
    rng, N = np.random.default_rng(1), 4096
    x = (rng.normal(size=N) * 10.0 ** rng.uniform(-12, 3, N)).astype(np.float32)
    u = rng.integers(0, 1 << 32, N, dtype=np.uint64)
    u[:64:2], u[1:64:2] = 0, (1 << 32) - 1
    largest = float(np.finfo(np.float32).max)
    x[:24] = np.repeat([0.0, -0.0, np.inf, -np.inf, np.nan, largest, -largest, 3.39e38, 2.0**-15, -(2.0**-11), 14.0, -13.99], 2)
    out = torch.zeros(N, dtype=storage, device=DEVICE)
    bits = torch.from_numpy(u.astype(np.uint32).view(np.int32).copy()).to(DEVICE)
    round_kernel[(1,)](torch.from_numpy(x).to(DEVICE), bits, out, KIND=1 if storage == torch.bfloat16 else 2, N=N)
    expected, found = rounded_reference(x, u, storage), widened(out).cpu().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    there = ~np.isnan(x)
    assert np.array_equal(np.signbit(found[there]), np.signbit(x[there]))


def moved(problem, rule, state, loss="logistic"):
    """Take the step; give the weights in float64 that the rule asks for, before rounding, from the gradients of the truth."""
    _, _, gradient, _ = problem.truth(loss)
    w, keep = problem.weight().cpu(), 1 - rule.rate * rule.weight_decay
    first, second = (None if x is None else x.double().cpu() for x in (state.first, state.second))
    shrink = 1 - BETAS[1] ** rule.step
    if rule.kind == "adamw":
        first, second = (
            BETAS[0] * first + (1 - BETAS[0]) * gradient,
            BETAS[1] * second + (1 - BETAS[1]) * gradient**2,
        )
        change = first / (1 - BETAS[0] ** rule.step) / ((second / shrink).sqrt() + EPSILON)
    elif rule.kind == "rowwise-adam":
        second = BETAS[1] * second + (1 - BETAS[1]) * (gradient**2).mean(2)
        change = gradient / ((second / shrink).sqrt() + EPSILON)[..., None]
    elif rule.kind == "rowwise-adagrad":
        second = second + (gradient**2).mean(2)
        change = gradient / (second.sqrt() + EPSILON)[..., None]
    else:
        change = gradient
    problem.step(loss, rule=rule, state=state)
    return keep * w - rule.rate * change, first, second


def state_for(kind, R, B, D):
    shape = {"sgd": None, "adamw": (R, B, D)}.get(kind, (R, B))
    rng = np.random.default_rng(2)
    first = torch.from_numpy(rng.normal(size=(R, B, D))).float().to(DEVICE) if kind == "adamw" else None
    return State(first=first, second=None if shape is None else torch.from_numpy(rng.random(shape)).float().to(DEVICE))


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rowwise-adagrad", "rowwise-adam"])
@pytest.mark.parametrize("n_samples", [16, 20])
def test_rules_are_their_formulas(kind, n_samples):
    R, B, D = 2, 50, 37
    problem, state = Problem.of(R, n_samples, B, D, torch.float32), state_for(kind, R, B, D)
    weight, first, second = moved(problem, rule_of(kind=kind), state)
    for ours, theirs in ((problem.weight(), weight), (state.first, first), (state.second, second)):
        if theirs is not None:
            torch.testing.assert_close(ours.double().cpu(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_a_steps_weights_are_rounded_by_the_bits_of_their_place(storage):
    """Without a gradient weights only decay, to known numbers: rounding alone is seen."""
    R, B, D = 2, 40, 21
    rule = rule_of(rate=0.5, weight_decay=0.5, first=1000)  # decays to exactly 3/4
    problem = Problem.of(R, 4, B, D, storage, share=0.0)
    problem.bias.fill_(-1e4)  # no gradient: sigmoid is 0, and weights only decay
    exact = (problem.weight() * (1 - rule.rate * rule.weight_decay)).float().cpu().numpy()
    problem.step("logistic", rule=rule)
    expected = rounded_reference(exact.ravel(), noise_reference(rule, R, B, D).ravel(), storage)
    assert np.array_equal(problem.weight().cpu().numpy().ravel(), expected)
    assert 0.2 < np.mean(expected > exact.ravel()) < 0.8


@pytest.mark.parametrize("n_samples", [16, 20])
def test_compensated_rows_keep_what_rounding_loses(n_samples):
    R, B, D = 2, 50, 37
    problem, rng = Problem.of(R, n_samples, B, D, torch.bfloat16), np.random.default_rng(3)
    slots = np.full((R, B), -1, np.int32)
    chosen = [rng.choice(B, 7, replace=False) for _ in range(R)]
    for r in range(R):
        slots[r, chosen[r]] = rng.permutation(7)
    lost = torch.from_numpy(rng.normal(size=(R, 7, D)) * 1e-3).bfloat16().to(DEVICE)
    before, plain = lost.double().cpu(), Problem.of(R, n_samples, B, D, torch.bfloat16)
    rule = rule_of(rate=1e-3)
    plain.step("logistic", rule=rule)
    asked, _, _ = moved(problem, rule, State(lost=lost, slots=torch.from_numpy(slots).to(DEVICE)))
    keep = 1 - rule.rate * rule.weight_decay
    for r in range(R):
        places = slots[r, chosen[r]]
        found = problem.weight()[r, chosen[r]].cpu() + lost.double().cpu()[r, places]
        torch.testing.assert_close(found, asked[r, chosen[r]] + keep * before[r, places], rtol=2e-5, atol=2e-6)
        others = np.setdiff1d(np.arange(B), chosen[r])
        assert torch.equal(problem.stored[r, others], plain.stored[r, others])


def test_the_head_takes_the_fused_step_where_the_update_carries_a_rule_it_knows():
    problem, same = (Problem.of(1, 6, 40, 16, torch.float32) for _ in range(2))
    calls = []
    update = Ruled(lambda *what: calls.append(what), rule_of(repetitions=(0,)), State())
    told = []
    gradient, value = LinearHead(problem.stored, problem.bias).step(
        problem.hidden, problem.positives(), loss="logistic", update=update, want_loss=True, tell_gradient=told.append
    )
    how = {"loss": "logistic", "rule": update.rule, "state": State(), "want_loss": True, "chunk_bytes": 1 << 20}
    hidden, bias, loss = fused_step(same.hidden, same.stored, same.bias, same.positives(), **how)
    assert torch.equal(gradient, hidden) and torch.equal(value, loss) and torch.equal(problem.stored, same.stored)
    ((name, part, given_bias, copy),) = calls
    assert (name, part, copy) == ("head.bias", slice(0, 40), None) and torch.equal(given_bias, bias)
    assert told == [gradient]


@pytest.mark.parametrize("what", ["kind", "storage", "bias", "gaps"])
def test_what_the_kernels_do_not_know_is_left_to_torch(what):
    weight, bias = torch.zeros(1, 4, 6, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    assert can_fuse(weight, bias, rule_of())
    rule = rule_of(kind="lion" if what == "kind" else "sgd")
    weight = weight.double() if what == "storage" else weight[..., ::2] if what == "gaps" else weight
    assert not can_fuse(weight, bias.double() if what == "bias" else bias, rule)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rowwise-adagrad", "rowwise-adam"])
def test_an_optimizer_takes_the_steps_of_the_chunked_path(kind, monkeypatch):
    found = []
    for fuses in (True, False):
        monkeypatch.setattr("mach.heads.linear.can_fuse", can_fuse if fuses else lambda *_: False)
        problem = Problem.of(2, 6, 40, 16, torch.float32, share=0.2)
        parameters = {"head.weight": problem.stored, "head.bias": problem.bias, "input.weight": torch.zeros(1, 2, 1)}
        optimizer = Optimizer(
            parameters, weight_decay=0.0, row_wise="input.weight", head=rule_of(kind=kind, rate=0.0, repetitions=(0, 1))
        )
        head = LinearHead(problem.stored, problem.bias)
        for step in range(3):
            optimizer.begin_step(rate=9.9, row_rate=9.9, head_rate=0.05, head_steps=step)
            update = optimizer.begin_head(optimizer.update)
            gradient, _ = head.step(problem.hidden, problem.positives(), loss="logistic", update=update, want_loss=False)
        found.append((problem.stored, problem.bias, gradient))
    for fused, chunked in zip(*found, strict=True):
        torch.testing.assert_close(fused, chunked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rowwise-adagrad", "rowwise-adam"])
@pytest.mark.parametrize("loss", LOSSES)
def test_outputs_in_float8_are_those_of_the_chunked_path(loss, kind, monkeypatch):
    """That multiplies in float32 here, the kernels round the outputs' gradients to bfloat16: few weights round otherwise."""
    found = []
    for fuses, in_float8 in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr("mach.heads.linear.can_fuse", can_fuse if fuses else lambda *_: False)
        problem = Problem.of(2, 6, 40, 16, FLOAT8, share=0.2)
        parameters = {"head.weight": problem.stored, "head.bias": problem.bias, "input.weight": torch.zeros(1, 2, 1)}
        rule = rule_of(kind=kind, rate=0.0, weight_decay=0.0, repetitions=(0, 1))
        optimizer = Optimizer(parameters, weight_decay=0.0, row_wise="input.weight", head=rule)
        optimizer.begin_step(rate=9.9, row_rate=9.9, head_rate=2.0**-8, head_steps=0)
        head = LinearHead(problem.stored, problem.bias, in_float8=in_float8, chunk_bytes=12_000)
        gradient, value = head.step(
            problem.hidden.float(), problem.positives(), loss=loss, update=optimizer.begin_head(optimizer.update), want_loss=True
        )
        found.append((problem.weight(), gradient, value))
    (fused, *of_fused), (chunked, *of_chunked), (_, *of_others) = found
    assert bool(((fused - chunked).abs() <= (chunked.abs() / 8).clamp(min=2.0**-14)).all())
    assert float((fused != chunked).double().mean()) < 0.02
    for ours, theirs, others, allowed in zip(of_fused, of_chunked, of_others, (4e-3, OF_EIGHTH), strict=True):
        apart = allowed * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=apart)
        assert float((ours - others).abs().max()) > 2 * apart


def test_a_cpu_is_left_to_torch_whatever_the_environment(monkeypatch):
    monkeypatch.setattr("mach.heads.fused.ON_CPU", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not can_fuse(torch.zeros(1, 4, 6), torch.zeros(1, 4), rule_of())


def test_gpus_without_float8_are_left_to_torch(monkeypatch):
    bias, rule = torch.zeros(1, 4), rule_of()
    monkeypatch.setattr("mach.heads.fused.ON_CPU", False)
    for capability, knows in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        for storage in STORAGES:
            weight = FakeWeight(storage)
            assert can_fuse(weight, bias, rule) == (knows or storage != FLOAT8)


COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mach.heads.fused import triton_kernels as kernels

kernel = kernels.output_gradients
pointers = {"hidden": "*fp8e4nv", "weight": "*fp8e4nv", "out": "*bf16"}
pointers |= dict.fromkeys(("scales", "bias", "at_positives", "log_total", "share", "losses"), "*fp32")
pointers |= dict.fromkeys(("buckets", "samples_of", "offsets"), "*i32")
constants = dict(LOSS=0, WANT_LOSS=False, STORAGE=2, EVEN=True, C=128, N=128, D=128, P=32)
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in (*pointers, "width", "wide")}
source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
options = dict(num_warps=8, num_stages=3)
print(triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options).asm["ptx"])
"""


@pytest.mark.parametrize(
    ("capability", "instruction", "n_sums"),
    [
        pytest.param(89, r"mma\.sync.*\.f32\.e4m3\.e4m3\.f32", 64, marks=pytest.mark.slow),
        (90, r"wgmma.*\.f32\.e4m3\.e4m3", 2 * 64),
    ],
)
def test_outputs_in_float8_are_made_by_the_gpus_own_products_of_float8(capability, instruction, n_sums, tmp_path):
    """Compiled for a GPU that need not be there. Each of a thread's 64 sums gets its bias; on Hopper a slice's sum before."""
    (tmp_path / "compiled.py").write_text(COMPILED, encoding="utf-8")  # Triton reads the source of what it compiles
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": str(Path(mach.__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "compiled.py"), str(capability)]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(instruction, made) and len(re.findall(r"add\.[a-z.]*f32", made)) >= n_sums


class FakeWeight:
    """What is asked of weights on a GPU that is not there."""

    device = torch.device("cuda:0")

    def __init__(self, storage):
        self.dtype = storage

    def is_contiguous(self):
        return True
