from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from mach.cli.datasets import twins_of
from mach.data import CSR, Split, Twins, count_twins, twins, write_dataset


def split_of(rows: list[tuple[dict[int, float], set[int]]]) -> Split:
    X, Y = np.zeros((len(rows), 5), np.float32), np.zeros((len(rows), 5), np.float32)
    for n, (features, labels) in enumerate(rows):
        X[n, list(features)], Y[n, list(labels)] = list(features.values()), 1
    return Split("test", CSR.from_scipy(sp.csr_array(X)), CSR.from_scipy(sp.csr_array(Y), with_values=False), None)


samples = st.tuples(st.dictionaries(st.integers(0, 4), st.sampled_from([1.0, 0.5, -0.5]), max_size=2), st.sets(st.integers(0, 4)))


@given(st.lists(samples, max_size=12), st.lists(samples, max_size=8))
def test_twins_are_counted_as_a_search_of_all_rows_does(train, other):
    alike = [[labels for features, labels in train if features == ours] if ours else [] for ours, _ in other]
    strange = sum(
        bool(found) and not any(labels & ours for labels in found) for found, (_, ours) in zip(alike, other, strict=True)
    )
    assert count_twins(split_of(train), split_of(other)) == Twins(sum(map(bool, alike)), strange)


def test_so_many_of_a_samples_twins_are_looked_at_and_no_more():
    train = split_of([({0: 1.0}, {1})] * twins.MOST + [({0: 1.0}, {2})])
    assert count_twins(train, split_of([({0: 1.0}, {1}), ({0: 1.0}, {2})])) == Twins(2, 1)


def test_values_that_are_not_there_are_ones_and_dense_rows_have_no_twins():
    rows = [({0: 1.0, 3: 1.0}, {1})]
    split = split_of(rows)
    assert isinstance(split.features, CSR)
    plain = Split("test", CSR(split.features.indptr, split.features.indices, None, 5), split.labels, None)
    assert count_twins(split_of(rows), plain) == Twins(1, 0)
    dense = Split("test", np.ones((1, 5), np.float32), split.labels, None)
    assert count_twins(dense, dense) == Twins(0, 0)


def test_a_split_is_told_of_when_one_in_a_hundred_has_a_twin_and_advised_when_one_in_ten_is_strange(tmp_path):
    rng = np.random.default_rng(0)
    X, Y = rng.random((200, 30), np.float32), (rng.random((200, 6)) < 0.5).astype(np.float32)

    def told(name: str, n_twins: int, n_strange: int) -> list[str]:
        X_test, Y_test = np.concatenate([X[:n_twins], rng.random((100 - n_twins, 30), np.float32)]), Y[:100].copy()
        Y_test[:n_strange] = 1 - Y_test[:n_strange]
        train, test = ((sp.csr_array(a), sp.csr_array(b)) for a, b in ((X, Y), (X_test, Y_test)))
        return twins_of(write_dataset(tmp_path / name, {"train": train, "test": test}))

    one, ten = "test: 1 of 100 samples (1%) have", "test: 20 of 100 samples (20%) have"
    rest = "the very features of one in train; {} of these share no label with it"
    assert told("none", 0, 0) == []
    assert told("one", 1, 0) == [f"{one} {rest.format(0)}"]
    assert told("strange", 20, 9) == [f"{ten} {rest.format(9)}"]
    advice = "; if known answers were left out, leave them out: mach predict --exclude"
    assert told("stranger", 20, 10) == [f"{ten} {rest.format(10)}{advice}"]
