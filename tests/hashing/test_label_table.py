from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hashing_reference import bucket
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.errors import ConfigError, ModelError
from mach.hashing import LabelTable, families
from mach.hashing import table as table_module

FAMILIES = ["carter-wegman", "multiply-shift", "xxhash"]
TOP = 2**40


def names_of(n_labels):
    return [f"label {k}" for k in range(n_labels)]


@pytest.fixture(params=FAMILIES)
def table(request):
    return LabelTable.hashed(300, 20, repetitions=[3, 0, 7], family=request.param, seed=5, label_names=names_of(300))


def test_array_holds_what_is_computed_and_the_reference_says(table, monkeypatch):
    monkeypatch.setattr(table_module, "CHUNK", 77)
    array_RK = table.array()
    assert array_RK.shape == (3, 300) and array_RK.dtype == np.uint8 and not array_RK.flags.writeable
    assert table.array() is array_RK and table.nbytes == array_RK.nbytes
    for row, repetition in enumerate([3, 0, 7]):
        labels = names_of(300) if table.family == "xxhash" else range(300)
        assert array_RK[row].tolist() == [bucket(table.family, k, 300, 20, 5, repetition) for k in labels]
        assert table.buckets(np.arange(300).reshape(3, 100), row).tolist() == array_RK[row].reshape(3, 100).tolist()


def test_labels_of_is_the_inverse(table):
    for row in range(3):
        for b in range(20):
            labels = table.labels_of(b, row)
            assert labels.dtype == np.int64
            assert labels.tolist() == [k for k in range(300) if table.array()[row, k] == b]


@pytest.mark.parametrize(
    ("n_labels", "n_buckets", "dtype"),
    [(300, 256, np.uint8), (300, 257, np.uint16), (70_000, 2**16, np.uint16), (70_000, 2**16 + 1, np.uint32)],
)
def test_smallest_type_that_holds_the_buckets(n_labels, n_buckets, dtype):
    table = LabelTable.hashed(n_labels, n_buckets, 2)
    assert table.array().dtype == dtype
    assert table.nbytes == table.array().nbytes
    assert table.array()[1].max() == n_buckets - 1  # Carter-Wegman with so many labels fills each bucket


def test_identity():
    table = LabelTable.identity(300)
    assert table.is_identity and not LabelTable.hashed(300, 300, 1).is_identity
    assert (table.n_repetitions, table.n_buckets, table.repetitions, table.nbytes) == (1, 300, (0,), 0)
    assert table.array().tolist() == [list(range(300))] and table.array().dtype == np.uint16
    assert table.buckets([7, 0, 299], 0).tolist() == [7, 0, 299]
    assert table.labels_of(42, 0).tolist() == [42]
    indptr, indices = np.array([0, 2, 2]), np.array([5, 9], dtype=np.int32)
    assert table.positives(indptr, indices, 0) == (pytest.approx(indptr), pytest.approx(indices))
    assert LabelTable.identity(1).array().tolist() == [[0]]


def test_a_large_table_is_computed_and_never_held():
    table = LabelTable.hashed(TOP, 2**20, 2)
    labels = table.labels_of(99, 1)
    assert abs(len(labels) - 2**20) <= 1 and set(table.buckets(labels, 1)) == {99}
    assert table.nbytes == 2 * TOP * 4 and "_array" not in vars(table)
    assert table.buckets(TOP - 1, 0).shape == ()


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.integers(0, 99), max_size=60), max_size=6),
    st.integers(2, 100),
    st.integers(0, 3),
    st.booleans(),
    st.lists(st.integers(0, 99), max_size=3),
)
def test_positives_are_the_set_of_buckets(samples, n_buckets, row, wide, before):
    table = LabelTable.hashed(100, n_buckets, 4)
    lengths = [len(s) for s in samples]
    indptr = len(before) + np.cumsum([0, *lengths])
    indices = np.array([*before, *(k for s in samples for k in s), 99], dtype=np.int64 if wide else np.int32)
    indices.flags.writeable = False
    got_indptr, got = table.positives(indptr, indices, row)
    expected = [sorted({int(table.array()[row, k]) for k in s}) for s in samples]
    assert got_indptr.dtype == np.int64 and got.dtype == np.int32
    assert got_indptr.tolist() == [0, *np.cumsum([len(e) for e in expected]).astype(int).tolist()]
    assert got.tolist() == [b for e in expected for b in e]


def test_positives_of_a_sample_with_very_many_labels():
    table = LabelTable.hashed(5000, 700, 1)
    labels = np.random.default_rng(0).permutation(5000)[:3000].astype(np.int32)
    _, got = table.positives(np.array([0, 3000]), labels, 0)
    assert got.tolist() == sorted(set(table.array()[0, labels].tolist()))


def test_select_keeps_the_rows_of_the_chosen_repetitions(table):
    part = table.select([7, 3])
    assert part.repetitions == (7, 3) and part.n_repetitions == 2
    assert part.array().tolist() == table.array()[[2, 0]].tolist()
    assert part.fingerprint() == table.fingerprint()


def test_buckets_given_stand_instead_of_hashed_ones(table):
    rng = np.random.default_rng(0)
    rows = {number: rng.integers(20, size=300) for number in (0, 7)}
    learnt = table.with_given({0: rows[0]}).with_given({7: rows[7]})
    assert learnt.array().dtype == np.uint8 and not learnt.array().flags.writeable
    assert learnt.array().tolist() == [table.array()[0].tolist(), rows[0].tolist(), rows[7].tolist()]
    indptr, labels = np.array([0, 3, 300]), np.r_[[4, 9, 250], rng.permutation(300)[:297]].astype(np.int32)
    for row in range(3):
        assert learnt.buckets(labels, row).tolist() == learnt.array()[row, labels].tolist()
        got_indptr, got = learnt.positives(indptr, labels, row)
        assert got[: got_indptr[1]].tolist() == sorted(set(learnt.array()[row, labels[:3]].tolist()))
        for b in range(20):
            assert learnt.labels_of(b, row).tolist() == np.flatnonzero(learnt.array()[row] == b).tolist()
    assert not learnt.is_arithmetic and learnt.inverse.ids_RK.shape == (3, 300)
    assert learnt.select([7, 3]).array().tolist() == learnt.array()[[2, 0]].tolist()
    assert list(learnt.select([7, 3]).given) == [7] and learnt.select([3]).is_arithmetic == table.is_arithmetic
    assert learnt.fingerprint() == table.fingerprint() and learnt.to_dict() == table.to_dict()  # kept elsewhere


def test_buckets_that_cannot_be_given_are_named():
    table, zeros = LabelTable.hashed(300, 20, 2), np.zeros(300, np.int64)
    for numbers, buckets, message in (
        (table, {2: zeros}, r"repetition 2 cannot be given buckets: this hashed table hashes \[0, 1\]"),
        (LabelTable.identity(300), {0: zeros}, "repetition 0 cannot be given buckets: this identity table"),
        (table, {1: zeros[:9]}, r"given for repetition 1 must be 300 integers, got int64 of shape \(9,\)"),
        (table, {1: zeros + 0.5}, "must be 300 integers, got float64"),
        (table, {1: zeros - 1}, r"bucket -1 of repetition 1 is outside \[0, 20\)"),
        (table, {1: zeros + 20}, r"bucket 20 of repetition 1 is outside \[0, 20\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            numbers.with_given(buckets)


def test_a_name_has_one_bucket_in_every_vocabulary():
    names = names_of(50)
    one = LabelTable.hashed(50, 16, 2, family="xxhash", label_names=names)
    other = LabelTable.hashed(90, 16, 2, family="xxhash", label_names=names_of(90)[::-1])
    assert other.array()[:, ::-1][:, :50].tolist() == one.array().tolist()
    assert one.families[1].buckets_of(["label 7"]).tolist() == [one.array()[1, 7]]


def test_description_makes_the_same_table(table):
    stored = json.loads(json.dumps(table.to_dict()))
    again = LabelTable.from_dict(stored, label_names=names_of(300))
    assert again == table and again.array().tolist() == table.array().tolist()
    identity = LabelTable.identity(12)
    assert LabelTable.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity
    assert pickle.loads(pickle.dumps(table)) == table  # processes are sent tables


# A change below means that stored models' tables would no longer be recognised.
@pytest.mark.parametrize(
    ("family", "fingerprint"),
    [
        ("carter-wegman", "0d0e50587823c824360032c778dbbea4"),
        ("multiply-shift", "12365a9da6ce0956969b4cc44aff7b58"),
        ("xxhash", "7fdb17ecd70cfaa0df70707667a724db"),
    ],
)
def test_fingerprint_is_frozen(family, fingerprint):
    assert LabelTable.hashed(300, 20, 2, family=family, label_names=names_of(300)).fingerprint() == fingerprint


def test_fingerprint_of_identity_is_frozen():
    assert LabelTable.identity(300).fingerprint() == "287c535d3bf4c049f6c4c7703dfc2e70"


def test_fingerprints_differ_with_everything_that_moves_a_label():
    tables = [LabelTable.hashed(300, 20, 2, family=f, seed=s, label_names=names_of(300)) for f in FAMILIES for s in (0, 1)]
    tables += [LabelTable.hashed(301, 20, 2), LabelTable.hashed(300, 21, 2), LabelTable.hashed(300, 300, 1)]
    tables += [LabelTable.identity(300), LabelTable.identity(301)]
    tables += [LabelTable.hashed(300, 20, 2, family="xxhash", label_names=names_of(300)[::-1])]
    assert len({t.fingerprint() for t in tables}) == len(tables)


def test_a_change_of_hash_code_or_of_names_is_noticed(monkeypatch):
    named = LabelTable.hashed(300, 20, 2, family="xxhash", label_names=names_of(300)).to_dict()
    with pytest.raises(ModelError, match=r"label table has fingerprint .*, the stored one .*version of mach and the label names"):
        LabelTable.from_dict(named, label_names=names_of(300)[::-1])
    stored = LabelTable.hashed(300, 20, 2).to_dict()
    monkeypatch.setattr(families, "prime_from", lambda n: 311)
    with pytest.raises(ModelError, match="label table has fingerprint"):
        LabelTable.from_dict(stored)


def test_a_missing_value_is_named():
    stored = LabelTable.hashed(300, 20, 2).to_dict()
    del stored["seed"]
    with pytest.raises(ModelError, match="stored label table lacks 'seed': the manifest is broken"):
        LabelTable.from_dict(stored)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_buckets": 1, "n_repetitions": 1}, r"n_buckets=1 must lie in \[2, 300\], the number of labels"),
        ({"n_buckets": 301, "n_repetitions": 1}, r"n_buckets=301 must lie in \[2, 300\]"),
        ({"n_labels": TOP + 1, "n_repetitions": 1}, r"n_labels=1099511627777 must lie in \[1, 1099511627776\]"),
        ({"n_labels": 1, "n_buckets": 1, "n_repetitions": 1}, r"n_labels=1 must lie in \[2, .* identity"),
        ({"n_repetitions": 0}, "n_repetitions=0 must be 1 or more"),
        ({"repetitions": []}, r"repetitions=\[\] must be one or more different numbers"),
        ({"repetitions": [3, 3]}, r"repetitions=\[3, 3\] must be one or more different numbers"),
        ({"repetitions": [2, -1]}, r"repetitions=\[2, -1\] must be one or more different numbers, 0 or above"),
        ({}, "give either n_repetitions .* or repetitions"),
        ({"n_repetitions": 2, "repetitions": [0, 1]}, "give either n_repetitions .* or repetitions"),
        (
            {"n_repetitions": 2, "family": "xxhash"},
            "family 'xxhash' hashes label names .* give label_names, or take 'carter-wegman'",
        ),
        ({"n_repetitions": 2, "family": "xxhash", "label_names": ["a"]}, "label_names holds 1 names, but n_labels=300"),
        ({"n_repetitions": 2, "family": "md5"}, "family='md5' must be one of 'carter-wegman', 'multiply-shift', 'xxhash'"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LabelTable.hashed(**{"n_labels": 300, "n_buckets": 20, **arguments})


@pytest.mark.parametrize("n_labels", [0, TOP + 1])
def test_bad_identity_is_named(n_labels):
    with pytest.raises(ConfigError, match=rf"n_labels={n_labels} must lie in \[1, 1099511627776\]"):
        LabelTable.identity(n_labels)


@pytest.mark.parametrize("table", [LabelTable.hashed(300, 20, 2), LabelTable.identity(300)], ids=["hashed", "identity"])
def test_bad_lookups_are_named(table):
    for label in (-1, 300):
        with pytest.raises(ConfigError, match=rf"label id {label} is outside \[0, 300\)"):
            table.buckets([5, label], 0)
        with pytest.raises(ConfigError, match=rf"label id {label} is outside \[0, 300\)"):
            table.positives(np.array([0, 2]), np.array([5, label], dtype=np.int32), 0)
    with pytest.raises(ConfigError, match="label ids must be integers, not float64"):
        table.buckets([0.5], 0)
    for b in (-1, table.n_buckets):
        with pytest.raises(ConfigError, match=rf"bucket {b} is outside \[0, {table.n_buckets}\)"):
            table.labels_of(b, 0)
    for row in (-1, table.n_repetitions):
        message = rf"row {row} is outside \[0, {table.n_repetitions}\)"
        with pytest.raises(ConfigError, match=message):
            table.buckets([0], row)
        with pytest.raises(ConfigError, match=message):
            table.labels_of(0, row)
        with pytest.raises(ConfigError, match=message):
            table.positives(np.array([0]), np.array([], dtype=np.int32), row)


def test_a_repetition_that_is_not_held_is_named():
    with pytest.raises(ConfigError, match=r"repetition 4 is not in this table, which holds \[3, 5\]"):
        LabelTable.hashed(300, 20, repetitions=[3, 5]).select([3, 4])


def test_no_labels_have_no_buckets():
    assert LabelTable.hashed(300, 20, 1).buckets([], 0).tolist() == []
