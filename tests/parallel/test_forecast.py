"""The forecast of a step: its arithmetic with given rates, how it scales, and rates that are measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mach.config import Config
from mach.model import Sizes
from mach.parallel.forecast import Rates, forecast, measure_rates, step_seconds
from mach.parallel.memory import group_bytes

CPU = torch.device("cpu")
SIZES = Sizes(n_features=1000, n_labels=500, n_buckets=64, hidden=32, features="sparse", labels_a_sample=2.0)
CONFIG = Config(hidden=32, batch_size=10, layers=1, repetitions=3)
AT_ONCE = Rates(flops=1e30, bytes=1.0)  # only bytes count, one a second


def test_the_arithmetic_of_a_step_is_counted_by_hand():
    found = step_seconds(CONFIG, SIZES, 3, Rates(flops=1.0, bytes=1e30), products=torch.float32)
    outputs = 3 * 10 * 64 * 32
    expected = {"encoder": 3 * 3 * 2 * 10 * 32 * 32, "head forward": 2 * outputs, "head backward": 4 * outputs, "update": 0}
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_bytes_of_a_step_are_counted_by_hand():
    found = step_seconds(CONFIG, SIZES, 3, AT_ONCE, products=torch.bfloat16, active_features=7)
    rows = 3 * (10 * 7 * 32 * 2 * 2 + 70 * 32 * 2 * 2)  # read forward, gradients back; 70 rows read and written
    layer, head, outputs = 3 * 32 * 32, 3 * 64 * 32, 3 * 10 * 64
    assert found == pytest.approx(
        {
            "encoder": rows + 3 * 2 * layer,
            "head forward": 2 * head + 3 * 2 * outputs,  # written, read, written
            "head backward": 2 * 2 * head + 2 * 2 * outputs,
            "update": (24 + 2 + 2) * head + (24 + 2) * layer,
        }
    )
    in_float32 = step_seconds(CONFIG, SIZES, 3, AT_ONCE, products=torch.float32, active_features=7)
    assert in_float32["update"] == pytest.approx(28 * (head + layer))  # gradients twice as wide, and no copy


def test_the_head_s_rule_and_storage_decide_what_its_update_moves():
    full = CONFIG.replace(table="identity", bottleneck=8, layers=0, head_batch_size=5)
    found = step_seconds(full, SIZES, 1, AT_ONCE, products=torch.bfloat16)
    head = 64 * 8
    assert found["update"] == pytest.approx(
        2 * (2 * 2 + 2) * head + (24 + 2) * 32 * 8
    )  # twice: weights read and written, gradient
    adamw = step_seconds(
        full.replace(head_optimizer="adamw", head_precision="float8"), SIZES, 1, AT_ONCE, products=torch.bfloat16
    )
    assert adamw["update"] == pytest.approx(2 * (2 * (1 + 8) + 2) * head + (24 + 2) * 32 * 8)
    assert found["head backward"] == pytest.approx(2 * 2 * 2 * head + 2 * 2 * 10 * 64)


def test_rows_are_touched_once_at_most():
    every, more = (step_seconds(CONFIG, SIZES, 1, AT_ONCE, products=torch.float32, active_features=n) for n in (1000, 5000))
    assert every == more  # no sample has more features than there are
    hashed = step_seconds(CONFIG.replace(feature_buckets=100), SIZES, 1, AT_ONCE, products=torch.float32)
    assert every["encoder"] > hashed["encoder"]


@given(st.integers(1, 9), st.floats(1e6, 1e15), st.floats(1e6, 1e15), st.sampled_from([torch.float32, torch.bfloat16]))
def test_repetitions_add_up_and_rates_divide(n, flops, n_bytes, products):
    rates = Rates(flops=flops, bytes=n_bytes)
    one, several = (step_seconds(CONFIG, SIZES, m, rates, products=products) for m in (1, n))
    twice = step_seconds(CONFIG, SIZES, 1, Rates(flops=2 * flops, bytes=2 * n_bytes), products=products)
    assert several == pytest.approx({part: n * seconds for part, seconds in one.items()})
    assert twice == pytest.approx({part: seconds / 2 for part, seconds in one.items()})


def test_a_forecast_is_of_all_repetitions():
    rates = Rates(flops=1e9, bytes=1e9)
    config = CONFIG.replace(precision="float32")
    found = forecast(config, SIZES, rates=rates, device=CPU)
    assert found.peak_bytes == group_bytes(config, SIZES, 3, device=CPU)
    assert found.parts_s == step_seconds(config, SIZES, 3, rates, products=torch.float32)


def test_rates_are_of_this_machine():
    rates = measure_rates(CPU, torch.float32)
    assert rates.flops > 1e8 and rates.bytes > 1e8
