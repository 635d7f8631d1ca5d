"""The scan in Triton: on a GPU, or else in Triton's interpreter. Its answer is the CPU scan's, bit for bit.

Programs of the interpreter take milliseconds to seconds: the problems are small, but have several blocks, tiles and groups.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mach.decoding.exact import exact_topk
from mach.decoding.only import check_exclude
from mach.decoding.scan import AGGREGATES
from mach.errors import ConfigError
from mach.hashing.device import DeviceTable
from mach.hashing.table import LabelTable

triton = pytest.importorskip("triton", reason="no Triton here: pip install 'mach[gpu]'")
tl = pytest.importorskip("triton.language")

from mach.decoding.device import topk_on_device, triton_scan  # noqa: E402
from mach.decoding.device.labels import Without  # noqa: E402
from mach.decoding.device.search import search_blocks  # noqa: E402
from mach.decoding.device.torch_scan import TorchScan  # noqa: E402
from mach.decoding.device.triton_kernels import CARTER_WEGMAN, buckets_of  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # tests/conftest.py asks for the interpreter there
FAMILIES = ["carter-wegman", "multiply-shift", "xxhash"]


def table_of(family, n_labels, n_buckets, n_repetitions):
    names = [f"name {i}" for i in range(n_labels)] if family == "xxhash" else None
    return LabelTable.hashed(n_labels, n_buckets, n_repetitions, seed=5, family=family, label_names=names)


def check(table, n_samples, k, estimator, *, restrict=None, exclude=None, group=2, tile=8, width=16):
    rng = np.random.default_rng(k)
    scores_NRB = rng.normal(0, 2, (n_samples, table.n_repetitions, table.n_buckets)).round(1).astype(np.float32)
    expected = exact_topk(scores_NRB, table, k, estimator=estimator, restrict=restrict, exclude=exclude, n_threads=1)[0]
    subset = None if restrict is None else torch.tensor(sorted(restrict), device=DEVICE)
    there, kind = DeviceTable.of(table, DEVICE), AGGREGATES[estimator]
    scores = torch.from_numpy(scores_NRB).to(DEVICE)
    scan = triton_scan.TritonScan(scores, there, kind, subset, width, group=group, tile=tile)
    assert torch.equal(scan.maxima(), TorchScan(scores, there, kind, subset, width).maxima())
    numbers = None if restrict is None else np.array(sorted(restrict))
    without = None
    if exclude is not None:
        without = Without.of(check_exclude(exclude, n_samples, table.n_labels, numbers, k), table.n_labels, DEVICE)
    labels, found = search_blocks(scan, k, without)
    assert np.array_equal(labels.cpu().numpy(), expected.labels)
    assert np.array_equal(found.cpu().numpy(), expected.scores)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("estimator", ["mean", "logits", "log-probs", "min"])
def test_sums_and_minima_are_the_scans(family, estimator):
    check(table_of(family, 53, 30, 5), 3, 4, estimator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_repetitions", [1, 4, 5])
def test_medians_are_the_scans(family, n_repetitions):
    check(table_of(family, 13, 9, n_repetitions), 2, 3, "median", tile=8, width=8)


@pytest.mark.parametrize("k", [1, 7, 61])
def test_any_k_and_one_repetition(k):
    check(table_of("carter-wegman", 61, 20, 1), 3, k, "logits")


@pytest.mark.parametrize("group", [1, 4, 8])
def test_groups_and_tiles_do_not_change_a_bit(group):
    check(table_of("carter-wegman", 50, 20, 3), 5, 4, "logits", group=group, tile=32, width=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_restrict_and_exclude(family):
    table = table_of(family, 120, 30, 4)
    check(table, 2, 4, "logits", restrict=range(5, 120, 3), exclude=[list(range(5, 60)), []])
    check(table, 2, 4, "min", exclude=[[0, 1, 119], list(range(110))])


@triton.jit
def write_buckets(labels, row, words, held, out, n_labels, N: tl.constexpr):
    at = tl.arange(0, N)
    found = buckets_of(tl.load(labels + at), row, words, held, 255, n_labels, CARTER_WEGMAN)
    tl.store(out + at, found.to(tl.int64))


@pytest.mark.parametrize("n_buckets", [2, 3, 10_007, 2**24, 2**28])
def test_the_hash_is_right_up_to_the_largest_prime_of_31_bits(n_buckets):
    table = LabelTable.hashed(2**31 - 1, n_buckets, 2, seed=1)
    labels = np.random.default_rng(0).integers(table.n_labels, size=256)
    labels[:2] = 0, table.n_labels - 1
    there, on_device = DeviceTable.of(table, DEVICE), torch.from_numpy(labels).to(DEVICE)
    out = torch.empty(len(labels), dtype=torch.int64, device=DEVICE)
    for row in range(2):
        write_buckets[(1,)](on_device, row, there.words, there.held_RK, out, there.n_labels, len(labels))
        assert np.array_equal(out.cpu().numpy(), table.buckets(labels, row))


def test_the_identity():
    table = LabelTable.identity(70)
    scores = torch.randn(3, 1, 70, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    found = topk_on_device(scores.to(DEVICE), table, 9, estimator="min", how="triton")
    assert torch.equal(found.labels.cpu(), torch.sort(-scores[:, 0], dim=1, stable=True).indices[:, :9])


def test_the_whole_call_with_its_own_sizes():
    table = table_of("carter-wegman", 300, 40, 3)
    scores = torch.randn(9, 3, 40, generator=torch.Generator().manual_seed(0))
    found = topk_on_device(scores.to(DEVICE), table, 5, estimator="logits", how="triton")
    expected = exact_topk(scores.numpy(), table, 5, estimator="logits")[0]
    assert np.array_equal(found.labels.cpu().numpy(), expected.labels)
    assert np.array_equal(found.scores.cpu().numpy(), expected.scores)


def test_too_many_labels_are_named():
    with pytest.raises(
        ConfigError, match=r"takes scores on a GPU and fewer than 2\*\*31 labels, got .* and 2147483648; use how='torch'"
    ):
        topk_on_device(
            torch.zeros(1, 2, 10, device=DEVICE), LabelTable.hashed(2**31, 10, 2), 1, estimator="min", restrict=[1], how="triton"
        )
