"""Files of labels: what they may hold, read a run of samples at a time, and the line that is named when one is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.data import lists
from mach.data.lists import LabelLists, Names, read_labels
from mach.errors import DataError

NAMES = Names(6, ["Lima", "Oslo", "New York", "Paris, TX", "São Paulo", "7"])
NUMBERS = Names(6, None)


def as_lists(arrays):
    return [array.tolist() for array in arrays]


def test_one_set_of_ids_and_names(tmp_path):
    file = tmp_path / "r.txt"
    file.write_bytes(b'\xef\xbb\xbfOslo\r\n\n  5\nNew York\n"Paris, TX"\nS\xc3\xa3o Paulo\nOslo\n1')
    assert read_labels(file, NAMES).tolist() == [1, 2, 3, 4, 5]
    np.save(tmp_path / "r.npy", np.array([4, 0, 4], np.int32))
    found = read_labels(tmp_path / "r.npy", NUMBERS)
    assert found.tolist() == [0, 4] and found.dtype == np.int64


def test_digits_are_ids_even_where_a_name_looks_like_one(tmp_path):
    (tmp_path / "r.txt").write_text("7\n")
    with pytest.raises(DataError, match=r"r.txt:1: label id 7 is outside \[0, 6\)"):
        read_labels(tmp_path / "r.txt", NAMES)


@pytest.mark.parametrize(
    ("content", "names", "words"),
    [
        (b"1\n6\n", NUMBERS, r"r.txt:2: label id 6 is outside \[0, 6\)"),
        (b"1\n-1\n", NUMBERS, "r.txt:2: '-1' is no label id, and the labels of this model have no names; give ids"),
        (b"Lima\n\nLyma\n", NAMES, "r.txt:3: there is no label named 'Lyma'"),
        (b"1\n\xff\n", NAMES, "r.txt:2: is not UTF-8 text"),
        (b"\n\n", NAMES, "r.txt: holds no labels; give at least one"),
        (b"", NAMES, "r.txt: is empty"),
    ],
)
def test_wrong_lines_of_one_set(tmp_path, content, names, words):
    (tmp_path / "r.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_labels(tmp_path / "r.txt", names)


def test_wrong_files_of_one_set(tmp_path):
    with pytest.raises(DataError, match="absent: cannot be read"):
        read_labels(tmp_path / "absent", NUMBERS)
    np.save(tmp_path / "a.npy", np.array([0.5]))
    np.save(tmp_path / "b.npy", np.array([6]))
    (tmp_path / "c.npy").write_bytes(b"no array")
    np.save(tmp_path / "d.npy", np.array([{}]), allow_pickle=True)
    for name, words in [("a", "must be an array of label ids, got float64"), ("b", r"must lie in \[0, 6\), got 6..6")]:
        with pytest.raises(DataError, match=words):
            read_labels(tmp_path / f"{name}.npy", NUMBERS)
    for name in "cd":
        with pytest.raises(DataError, match=f"{name}.npy: cannot be read"):
            read_labels(tmp_path / f"{name}.npy", NUMBERS)


def test_a_set_a_sample(tmp_path):
    file = tmp_path / "e.txt"
    file.write_text('0,5 Oslo\t1\n\n"New York", "Paris, TX"\n  \nSão 3\n'.replace("São", '"São Paulo"'))
    found = LabelLists(file, 5, NAMES)
    assert as_lists(found.rows(0, 5)) == [[0, 1, 5], [], [2, 3], [], [3, 4]]
    assert found.where(2) == f"{file}:3"
    matrix = sp.csr_array(np.array([[0, 1, 0, 0, 0, 2], [0] * 6]))
    matrix.data[0] = 0  # an entry that says no
    sp.save_npz(tmp_path / "e.npz", matrix)
    found = LabelLists(tmp_path / "e.npz", 2, NUMBERS)
    assert as_lists(found.rows(0, 2)) == [[5], []] and as_lists(found.rows(1, 2)) == [[]]
    assert found.where(1) == f"{tmp_path}/e.npz: row 1"


@settings(max_examples=30)
@given(
    rows=st.lists(st.sets(st.integers(0, 999)), max_size=40),
    cuts=st.lists(st.integers(0, 40), min_size=2, max_size=2),
    every=st.integers(1, 9),
    ending=st.sampled_from(["", "\n"]),
)
def test_any_run_of_samples_can_be_read(tmp_path_factory, rows, cuts, every, ending):
    file = tmp_path_factory.mktemp("lists") / "e.txt"
    text = "\n".join(", ".join(map(str, row)) for row in rows)
    file.write_text(text + ending if rows and (ending or rows[-1]) else text + "\n" * bool(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "EVERY", every)
        found = LabelLists(file, len(rows), Names(1000, None))
        start, stop = sorted(min(cut, len(rows)) for cut in cuts)
        if start < stop:
            assert as_lists(found.rows(start, stop)) == [sorted(row) for row in rows[start:stop]]


def test_places_are_held_and_not_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "EVERY", 10)
    (tmp_path / "e.txt").write_text("".join(f"{i % 6}\n" for i in range(1000)))
    found = LabelLists(tmp_path / "e.txt", 1000, NUMBERS)
    assert len(found._places) == 101
    assert as_lists(found.rows(777, 780)) == [[777 % 6], [778 % 6], [779 % 6]]


def test_the_key_is_of_the_content(tmp_path):
    for name, text in [("a", "1\n\n"), ("b", "1\n\n"), ("c", "\n1\n")]:
        (tmp_path / name).write_text(text)
    a, b, c = (LabelLists(tmp_path / name, 2, NUMBERS).key for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1\n", r"e.txt: has 1 lines for 3 samples; give one each, an empty one for no labels"),
        ("1\n\n\n\n", r"e.txt: has 4 lines for 3 samples"),
        ("1\n\n2,x\n", r"e.txt:3: 'x' is no label id"),
        ('1\n2,"3\n\n', r"e.txt:2: a double quote is not closed"),
        ("1\n2 9\n\n", r"e.txt:2: label id 9 is outside \[0, 6\)"),
    ],
)
def test_wrong_sets_a_sample(tmp_path, content, words):
    (tmp_path / "e.txt").write_text(content)
    with pytest.raises(DataError, match=words):
        LabelLists(tmp_path / "e.txt", 3, NUMBERS).rows(0, 3)


def test_wrong_files_of_sets(tmp_path):
    sp.save_npz(tmp_path / "e.npz", sp.eye_array(3, 6).tocsr())
    with pytest.raises(DataError, match=r"e.npz: is a matrix of shape \(3, 6\); it must be \(4, 6\), the samples and labels"):
        LabelLists(tmp_path / "e.npz", 4, NUMBERS)
    (tmp_path / "f.npz").write_bytes(b"no archive")
    for name in ("f.npz", "absent.npz", "absent.txt"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            LabelLists(tmp_path / name, 4, NUMBERS)


def test_names_whose_hashes_are_equal_are_told_apart(monkeypatch):
    monkeypatch.setattr(lists.xxhash, "xxh3_64_intdigest", lambda name: len(name))
    assert [NAMES.__class__(6, NAMES._names).id_of(name, "f:1") for name in ("Oslo", "Lima")] == [1, 0]
    with pytest.raises(DataError, match="f:1: there is no label named 'Rome'"):
        Names(6, NAMES._names).id_of("Rome", "f:1")
