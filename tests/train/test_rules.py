"""The head's rules: each against its formula in float64, in every storage, on both paths; rounding, compensation, threads."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import HeadOptimizer
from mach.data import CSR
from mach.hashing import LabelTable
from mach.heads import Rule, Ruled, rule_of
from mach.heads.rounding import FLOAT8, narrow, narrow_randomly, widen
from mach.train import frequent, rules
from mach.train.frequent import slots_of
from mach.train.rules import Lost, apply_, state_of

KINDS = get_args(HeadOptimizer)
R, B, D = 2, 11, 5
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": FLOAT8}


def rule(kind, **changes):
    numbers = {"rate": 0.02, "weight_decay": 0.5, "step": 1, "seed": 2**40 + 3, "repetitions": (4, 7)}
    return Rule(kind=kind, **{**numbers, **changes})


def change_reference(kind, weight, state, g, *, rate, weight_decay, step):
    """Update float64 arrays (R, C, D) in place, as the formulas have it."""
    kept = (1 - rate * weight_decay) * weight
    if kind == "sgd":
        weight[...] = kept - rate * g
    elif kind == "adamw":
        state["first"][...] = 0.9 * state["first"] + 0.1 * g
        state["second"][...] = 0.999 * state["second"] + 0.001 * g**2
        mean, square = state["first"] / (1 - 0.9**step), state["second"] / (1 - 0.999**step)
        weight[...] = kept - rate * mean / (np.sqrt(square) + 1e-8)
    elif kind == "rowwise-adagrad":
        state["second"] += (g**2).mean(2)
        weight[...] = kept - rate * g / (np.sqrt(state["second"]) + 1e-8)[..., None]
    else:
        state["second"][...] = 0.999 * state["second"] + 0.001 * (g**2).mean(2)
        weight[...] = kept - rate * g / (np.sqrt(state["second"] / (1 - 0.999**step)) + 1e-8)[..., None]


def gradients(seed, n=4):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(R, B, D)) * 10.0 ** rng.integers(-6, 3, (1, B, 1)) for _ in range(n)]


def chunks(width):
    return [slice(b, min(b + width, B)) for b in range(0, B, width)]


def start_of(dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(5).normal(size=(R, B, D))).to(dtype)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, B), st.sampled_from(KINDS), st.booleans(), st.booleans())
def test_a_rule_is_its_formula_for_any_chunk_on_both_paths(seed, width, kind, by_torch, is_bias):
    weight = start_of()[..., 0].clone() if is_bias else start_of()
    state = state_of(kind, weight)
    truth, kept = weight.numpy().reshape(R, B, -1).copy(), {name: value.numpy().copy() for name, value in state.items()}
    if is_bias and kind == "adamw":
        kept = {name: value[..., None] for name, value in kept.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "BLOCK", R * D * 2)
        patch.setattr(rules, "_apply_here", rules._apply_in_blocks if by_torch else rules._apply_here)
        for step, g in enumerate(gradients(seed), 1):
            g = g[..., :1] if is_bias else g
            now = rule(kind, step=step, rate=0.1 / step)
            for part in chunks(width):
                given_ = torch.from_numpy(g[:, part].reshape(weight[:, part].shape).copy())
                before = given_.clone()
                apply_(now, weight, part, given_, list(state.values()))
                assert torch.equal(given_, before)
            change_reference(kind, truth, kept, g, rate=0.1 / step, weight_decay=0.5, step=step)
    np.testing.assert_allclose(weight.numpy().reshape(truth.shape), truth, rtol=1e-11, atol=1e-11)
    for name, value in state.items():
        np.testing.assert_allclose(value.numpy().reshape(kept[name].shape), kept[name], rtol=1e-11)


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_in_less_is_the_float32_update_rounded(kind, precision, by_torch, monkeypatch):
    """From the same stored weights, a float32 update and `narrow_randomly`: equal but where float32 rounds otherwise."""
    stored = narrow(start_of(torch.float32), precision)
    wide, states = widen(stored, torch.empty(R, B, D)), [state_of(kind, x) for x in (stored, start_of(torch.float32))]
    assert all(x.dtype == torch.float32 for state in states for x in state.values())
    g = torch.from_numpy(gradients(1)[0]).float()
    how = rule(kind, first=2**33 + 5)
    apply_(how, wide, slice(None), g, list(states[1].values()))
    if by_torch:
        monkeypatch.setattr(rules, "_apply_here", rules._apply_in_blocks)
        monkeypatch.setattr(rules, "BLOCK", R * D * 3)
    for part in chunks(4):
        apply_(how, stored, part, g[:, part], [x for x in states[0].values()])
    truth = narrow_randomly(wide, stored.dtype, how.keys, first=2**33 + 5)
    found, truth = stored.view(torch.uint8), truth.view(torch.uint8)
    if kind == "sgd" and not by_torch:
        assert torch.equal(found, truth)
    assert (found != truth).float().mean() <= 0.02
    for a, b in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_chunks_threads_or_companions(kind, precision, monkeypatch):
    g, found, n_threads = torch.from_numpy(gradients(2)[0]).float(), [], torch.get_num_threads()
    try:
        for width, threads, least, of in ((B, 1, 1 << 16, [0, 1]), (3, 3, 5, [0, 1]), (B, 2, 5, [1])):
            monkeypatch.setattr(rules, "LEAST", least)
            torch.set_num_threads(threads)
            weight = narrow(start_of(torch.float32), precision)[of].clone()
            state = state_of(kind, weight)
            for part in chunks(width):
                how = rule(kind, repetitions=tuple((4, 7)[r] for r in of))
                apply_(how, weight, part, g[of][:, part], list(state.values()))
            found.append([x.view(torch.uint8) for x in (weight, *state.values())])
    finally:
        torch.set_num_threads(n_threads)
    for a, b, c in zip(*found, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:], c)


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_updates_far_below_a_step_of_the_storage_arrive_on_average(precision):
    """Of 1/78 (bfloat16) and 1/1250 (float8) of the step between two numbers: to the nearest, none would arrive."""
    width, n_steps, size = 4000, 200, 1e-4
    weight, g = narrow(torch.full((1, 3, width), 1.3), precision), torch.full((1, 3, width), 1.0)
    before = widen(weight, torch.empty(1, 3, width)).double().mean()
    for step in range(1, n_steps + 1):
        apply_(rule("sgd", rate=size, weight_decay=0.0, step=step, repetitions=(0,)), weight, slice(None), g, [])
    after = widen(weight, torch.empty(1, 3, width)).double().mean()
    gap = {"bfloat16": 2.0**-7, "float8": 2.0**-3}[precision]
    sigma = (n_steps * size * gap / (3 * width)) ** 0.5  # a step up has chance size / gap and changes by gap
    assert abs(float(before - after) - n_steps * size) < 5 * sigma
    assert narrow(widen(weight, torch.empty(1, 3, width)) - size, precision).view(torch.uint8).equal(weight.view(torch.uint8))


@pytest.mark.parametrize("precision", STORED)
def test_weight_decay_alone_shrinks_what_has_no_gradient(precision):
    weight = narrow(torch.full((1, 2, 3000), 0.5), precision)
    for step in range(1, 101):
        g = torch.zeros(1, 2, 3000)
        apply_(rule("sgd", rate=0.1, weight_decay=0.01, step=step, repetitions=(1,)), weight, slice(None), g, [])
    mean = widen(weight, torch.empty(1, 2, 3000)).double().mean().item()
    assert mean == pytest.approx(0.5 * 0.999**100, abs=4e-3 if precision == "float8" else 4e-4)


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compensated_rows_follow_float64_and_the_others_are_rounded_as_ever(kind, by_torch, monkeypatch):
    if by_torch:
        monkeypatch.setattr(rules, "_apply_here", rules._apply_in_blocks)
        monkeypatch.setattr(rules, "BLOCK", R * D * 2)
    slots = torch.full((R, B), -1, dtype=torch.int32)
    slots[0, [1, 4, 10]], slots[1, [0, 9, 10]] = torch.arange(3).int(), torch.arange(3).int()
    plain, with_lost = start_of().bfloat16(), start_of().bfloat16()
    lost = Lost(torch.zeros(R, 3, D, dtype=torch.bfloat16), slots)
    states, exact = [state_of(kind, plain) for _ in range(2)], plain.double().numpy().copy()
    kept = {name: value.double().numpy() for name, value in state_of(kind, plain).items()}
    for step in range(1, 300):
        g = np.random.default_rng(step).normal(size=(R, B, D)) + 1
        how = rule(kind, rate=1e-5, weight_decay=0.1, step=step)
        for part in chunks(4):
            for weight, state, some in ((plain, states[0], None), (with_lost, states[1], lost)):
                apply_(how, weight, part, torch.from_numpy(g[:, part]).float(), list(state.values()), None, some)
        change_reference(kind, exact, kept, g, rate=1e-5, weight_decay=0.1, step=step)
    chosen = slots >= 0
    assert torch.equal(with_lost[~chosen], plain[~chosen])
    sums = with_lost.double()[chosen].numpy() + np.concatenate([lost.weight_RSD[r].double().numpy() for r in range(R)])
    np.testing.assert_allclose(sums, exact[chosen.numpy()], rtol=300 * 2.0**-17, atol=1e-6)
    off = abs(sums - exact[chosen.numpy()]).mean() / abs(plain.double().numpy() - exact)[chosen.numpy()].mean()
    assert off < 0.05  # what stochastic rounding strays in the same rows


def test_the_copy_for_products_is_renewed_with_the_weights():
    for kind in KINDS:
        weight, low = start_of(torch.float32), torch.zeros(R, B, D, dtype=torch.bfloat16)
        state = state_of(kind, weight)
        for part in chunks(3):
            apply_(rule(kind), weight, part, torch.ones(R, len(range(B)[part]), D).bfloat16(), list(state.values()), low)
        assert torch.equal(low, weight.bfloat16()), kind


def test_a_gradient_of_zeros_gives_no_nan():
    for kind in KINDS:
        for precision in STORED:
            weight = narrow(start_of(torch.float32), precision)
            apply_(rule(kind, weight_decay=0.0), weight, slice(None), torch.zeros(R, B, D), list(state_of(kind, weight).values()))
            assert torch.equal(weight.view(torch.uint8), narrow(start_of(torch.float32), precision).view(torch.uint8))


def test_a_nan_reaches_the_weights_in_every_storage():
    g = torch.zeros(R, B, D)
    g[1, 2, 3] = float("nan")
    for precision in STORED:
        weight = narrow(start_of(torch.float32), precision)
        apply_(rule("sgd"), weight, slice(None), g, [])
        assert torch.isnan(weight.float()).sum() == 1 and torch.isnan(weight.float()[1, 2, 3])


def test_an_update_may_carry_its_rule():
    seen, how = [], rule("sgd")
    update = Ruled(lambda *arguments: seen.append(arguments), how)
    update("head.weight", slice(2), torch.ones(1))
    assert rule_of(update) is how and rule_of(lambda *_: None) is None and seen[0][0] == "head.weight" and seen[0][3] is None
    assert len(set(how.keys)) == 2 and replace(how, step=2).keys != how.keys


@pytest.mark.parametrize("identity", [True, False])
def test_the_most_frequent_buckets_have_places_in_their_order(identity, monkeypatch):
    monkeypatch.setattr(frequent, "READ", 3)
    Y = sp.csr_array((np.random.default_rng(0).random((50, 30)) < np.linspace(0, 0.3, 30)).astype(np.float32))
    table = LabelTable.identity(30) if identity else LabelTable.hashed(30, 8, repetitions=(0, 3), seed=1)
    n_buckets, n = (30, 5) if identity else (8, 3)
    slots = slots_of(CSR.from_scipy(Y, with_values=False), table, n_buckets, n).numpy()
    for r in range(table.n_repetitions):
        counts = [0] * n_buckets
        for _, k in zip(*Y.nonzero(), strict=True):
            counts[int(table.buckets(k, r))] += 1
        best = sorted(sorted(range(n_buckets), key=lambda b: (-counts[b], b))[:n])
        assert [int(slots[r, b]) for b in best] == list(range(n)) and (slots[r] >= 0).sum() == n
