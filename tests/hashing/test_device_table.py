"""The table as torch computes it: the same buckets as numpy's, the same labels of a bucket."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.hashing.device import DeviceTable
from mach.hashing.families import MAX_LABELS
from mach.hashing.table import LabelTable

CPU = torch.device("cpu")


@settings(max_examples=200)
@given(
    st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32),
    st.sampled_from(["carter-wegman", "multiply-shift"]),
)  # fmt: skip
def test_buckets_are_those_of_numpy(n_bits, where_labels, where_buckets, seed, family):
    n_labels = min(2 + int(2**n_bits * where_labels), MAX_LABELS)
    n_buckets = 2 + int((min(n_labels, 2**24) - 2) * where_buckets)
    table = LabelTable.hashed(n_labels, n_buckets, 3, seed=seed, family=family)
    labels = np.random.default_rng(seed).integers(n_labels, size=50)
    labels[:2] = 0, n_labels - 1
    on_device = DeviceTable.of(table, CPU)
    for row in range(3):
        assert np.array_equal(on_device.buckets(torch.from_numpy(labels), row).numpy(), table.buckets(labels, row))


@pytest.mark.parametrize("n_buckets", [200, 300, 40_000, 70_000])  # held as uint8 and uint16, some above the signed range, uint32
def test_hashed_names_and_the_identity(n_buckets):
    names = [f"name {i}" for i in range(n_buckets)]
    table = LabelTable.hashed(n_buckets, n_buckets, 2, family="xxhash", label_names=names)
    found = DeviceTable.of(table, CPU).buckets(torch.arange(n_buckets), 1)
    assert np.array_equal(found.numpy(), table.array()[1])
    identity = DeviceTable.of(LabelTable.identity(n_buckets), CPU)
    assert torch.equal(identity.buckets(torch.arange(n_buckets), 0), torch.arange(n_buckets))


def test_buckets_given_are_held_and_no_progression():
    table = LabelTable.hashed(100, 10, 2).with_given({1: np.arange(100) // 10})
    on_device = DeviceTable.of(table, CPU)
    assert on_device.kind == "held" and not on_device.has_progressions
    for row in range(2):
        assert np.array_equal(on_device.buckets(torch.arange(100), row).numpy(), table.array()[row])


@pytest.mark.parametrize(("n_labels", "n_buckets"), [(1000, 37), (1009, 1009), (2**31 - 1, 2**24)])
def test_the_labels_of_a_bucket_are_a_progression(n_labels, n_buckets):
    table = LabelTable.hashed(n_labels, n_buckets, 3, seed=4)
    on_device = DeviceTable.of(table, CPU)
    p = on_device.p
    assert on_device.has_progressions
    buckets = torch.tensor([0, 5, n_buckets - 1])
    firsts = on_device.first_labels(buckets.expand(1, 3, 3))
    for row in range(3):
        for first, bucket in zip(firsts[0, row].tolist(), buckets.tolist(), strict=True):
            labels = [(first + i * on_device.steps_R[row].item()) % p for i in range(-(-(p - bucket) // n_buckets))]
            assert sorted(k for k in labels if k < n_labels) == table.labels_of(bucket, row).tolist()


def test_it_is_made_once_a_device():
    table = LabelTable.hashed(100, 10, 2)
    assert DeviceTable.of(table, CPU) is DeviceTable.of(table, CPU)
    assert not DeviceTable.of(LabelTable.hashed(2**31, 10, 2), CPU).has_progressions
    assert not DeviceTable.of(LabelTable.hashed(100, 10, 2, family="multiply-shift"), CPU).has_progressions
