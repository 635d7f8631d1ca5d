"""CSR rows and the strings beside them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mach.data import csr as csr_module
from mach.data.csr import CSR, take_rows, tidy_rows
from mach.data.strings import Strings


def random_csr(n_rows: int, n_columns: int, seed: int = 0, density: float = 0.3) -> CSR:
    return CSR.from_scipy(sp.random_array((n_rows, n_columns), density=density, rng=np.random.default_rng(seed), format="csr"))


def same(a: CSR, b: CSR) -> bool:
    values_agree = (a.values is None) == (b.values is None) and (a.values is None or np.array_equal(a.values, b.values))
    arrays_agree = np.array_equal(a.indptr, b.indptr) and np.array_equal(a.indices, b.indices)
    return arrays_agree and values_agree and a.n_columns == b.n_columns


@given(st.integers(1, 12), st.lists(st.integers(0, 10**6), max_size=30), st.integers(0, 99))
def test_take_rows_equals_scipy_indexing(n_rows, picks, seed):
    csr = random_csr(n_rows, 7, seed)
    rows = [pick % n_rows for pick in picks]
    taken = take_rows(csr, rows)
    expected = csr.to_scipy()[np.array(rows, np.int64)]
    assert np.array_equal(taken.to_scipy().toarray(), expected.toarray())
    assert (taken.indptr.dtype, taken.indices.dtype, taken.values.dtype) == (np.int64, np.int32, np.float32)


def test_take_rows_of_labels_and_of_read_only_arrays():
    csr = random_csr(20, 9)
    labels = CSR(csr.indptr, csr.indices, None, 9)
    for array in (labels.indptr, labels.indices):
        array.flags.writeable = False
    taken = take_rows(labels, np.array([3, 3, 0]))
    assert taken.values is None
    assert np.array_equal(taken.to_scipy().toarray(), (csr.to_scipy().toarray() > 0)[[3, 3, 0]])


def test_take_rows_in_threads_equals_one_thread(monkeypatch):
    csr = random_csr(300, 50)
    rows = np.random.default_rng(1).integers(300, size=1000)
    expected = take_rows(csr, rows)
    monkeypatch.setattr(csr_module, "_PARALLEL_FROM", 1)
    monkeypatch.setattr(csr_module, "n_threads", lambda: 3)
    assert same(take_rows(csr, rows), expected)


@pytest.mark.parametrize("rows", [[-1], [0, 20]])
def test_take_rows_names_a_row_outside(rows):
    with pytest.raises(IndexError, match=rf"row ids must lie in \[0, 20\), got {min(rows)}..{max(rows)}"):
        take_rows(random_csr(20, 9), rows)


def test_from_scipy_sums_sorts_and_drops_zeros_of_labels():
    matrix = sp.csr_array((np.array([1.0, 2.0, 4.0, 0.0]), np.array([5, 1, 5, 2]), np.array([0, 3, 4])), shape=(2, 6))
    assert same(CSR.from_scipy(matrix), CSR(np.array([0, 2, 3]), np.array([1, 5, 2]), np.array([2, 5, 0], np.float32), 6))
    labels = CSR.from_scipy(matrix, with_values=False)
    assert (labels.indptr.tolist(), labels.indices.tolist(), labels.values, len(labels), labels.nnz) == (
        [0, 2, 2],
        [1, 5],
        None,
        2,
        2,
    )
    assert matrix.indices.tolist() == [5, 1, 5, 2]  # the caller's matrix is not touched


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), max_size=8), max_size=6), st.booleans())
def test_tidy_rows_equals_dictionaries(rows, with_values):
    counts = np.array([len(row) for row in rows], np.int64)
    indices = np.array([i for row in rows for i, _ in row], np.int32)
    values = np.array([v for row in rows for _, v in row], np.float32) if with_values else None
    expected = []
    for row in rows:
        sums: dict[int, float] = {}
        for i, v in row:
            sums[i] = sums.get(i, 0) + v
        expected.append(sorted(sums.items()))
    indptr, ids, sums_ = tidy_rows(counts, indices, values)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(indptr)] == [[i for i, _ in row] for row in expected]
    if with_values:
        assert sums_.tolist() == [v for row in expected for _, v in row]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.data())
def test_strings_are_the_list_they_were_made_of(texts, data):
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *(len(part) for part in encoded)])
    strings = Strings(offsets, np.frombuffer(b"".join(encoded), np.uint8))
    assert len(strings) == len(texts) and list(strings) == texts and strings == texts
    cut = data.draw(st.slices(len(texts)))
    assert strings[cut] == texts[cut]
    if texts:
        assert strings[-1] == texts[-1]
    with pytest.raises(IndexError, match="is outside"):
        strings[len(texts)]


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(-1, 1, width=32)), st.data())
def test_check_finite_names_row_and_feature(matrix, data):
    row, feature = (data.draw(st.integers(0, n - 1)) for n in matrix.shape)
    matrix[row, feature] = np.inf
    message = f"x{row}: feature {feature} has value inf; values must be finite float32 numbers"
    for features in (matrix, CSR.from_scipy(sp.csr_array(matrix))):
        with pytest.raises(ValueError, match=message):
            csr_module.check_finite(features, lambda r: f"x{r}")
