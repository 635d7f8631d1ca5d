"""Splitting dev off: nothing lost, look-alikes kept together, their groups those of loops in float64, the same for ever."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.data import CSR, Dataset, split_dev, write_dataset
from mach.data.alike import BANDS, ROWS, alike_groups
from mach.errors import ConfigError, DataError

ONES = 2**64 - 1


def mixed(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ONES
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ONES
    return x ^ (x >> 31)


def soonest(j, feature, weight):
    bits = mixed((mixed(feature ^ ONES) + (j + 1) * 0x9E3779B97F4A7C15) & ONES)
    return -math.log(((bits >> 11) + 0.5) / 2**53) / weight


def keys_of(i, row, counts, n):
    """Give sample i's first features of each band's orders."""
    weights = {f: np.float64(np.float32(v)) ** 2 * math.log(n / counts[f]) for f, v in row.items()}
    weights = {f: w for f, w in weights.items() if w > 0}
    firsts = [min(weights, key=lambda f, j=j: soonest(j, f, weights[f])) if weights else (i,) for j in range(BANDS * ROWS)]
    return [tuple(firsts[b * ROWS : (b + 1) * ROWS]) for b in range(BANDS)]


def reference_groups(rows):
    """Join samples that agree in all ROWS orders of a band, over and over, each sample a dict of feature -> value."""
    n = len(rows)
    counts = {f: sum(f in row for row in rows) for row in rows for f in row}
    keys = [keys_of(i, row, counts, n) for i, row in enumerate(rows)]
    group = list(range(n))
    for _ in range(n):
        for i in range(n):
            for j in range(n):
                if any(a == b for a, b in zip(keys[i], keys[j], strict=True)):
                    group[i] = group[j] = min(group[i], group[j])
    return group


def csr_of(rows, n_features):
    indptr = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    pairs = [(f, row[f]) for row in rows for f in sorted(row)]
    return CSR(indptr, np.array([f for f, _ in pairs], np.int32), np.array([v for _, v in pairs], np.float32), n_features)


values = st.floats(-4, 4, width=32)


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.integers(0, 9), values, max_size=6), min_size=1, max_size=8))
def test_groups_are_the_references(rows):
    assert alike_groups(csr_of(rows, 10)).tolist() == reference_groups(rows)


def documents(seed=0, n_topics=40, n_versions=3):
    """Give documents of twelve words, each in three versions that differ in one of them; and a few common words."""
    rng = np.random.default_rng(seed)
    rows = []
    for topic in range(n_topics):
        words = rng.choice(400, 12, replace=False) + 10
        for version in range(n_versions):
            row = {int(f): 1.0 for f in words} | {int(f): 1.0 for f in rng.choice(10, 4, replace=False)}
            row[500 + topic * n_versions + version] = 1.0
            rows.append(row)
    return csr_of(rows, 1000)


def test_versions_are_together_and_others_apart():
    groups = alike_groups(documents()).reshape(40, 3)
    assert (groups == groups[:, :1]).mean() > 0.95
    assert len(np.unique(groups)) >= 40


def test_groups_are_frozen():
    groups = alike_groups(documents(n_topics=6))
    assert groups.tolist() == FROZEN


FROZEN = [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 11, 12, 12, 12, 15, 15, 15]


@pytest.fixture
def dataset(tmp_path):
    X, rng = documents().to_scipy(), np.random.default_rng(1)
    Y = sp.csr_array((rng.random((120, 7)) < 0.3).astype(np.float32))
    names = [f"label {k}" for k in range(7)]
    return write_dataset(tmp_path / "data", {"train": (X, Y), "test": (X[:5], Y[:5])}, label_names=names)


def dense(part):
    return part.to_scipy().toarray()


@pytest.mark.parametrize("by", ["samples", "alike"])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_nothing_is_lost(dataset, tmp_path, by, share):
    told = []
    found = split_dev(dataset, tmp_path / "out", share=share, by=by, progress=lambda *each: told.append(each))
    found.verify()
    parts, whole = [found.split("train"), found.split("dev")], dataset.split("train")
    for what in ("features", "labels"):
        rows = np.concatenate([dense(getattr(part, what)) for part in parts])
        assert sorted(map(tuple, rows)) == sorted(map(tuple, dense(getattr(whole, what))))
        assert np.array_equal(dense(getattr(found.split("test"), what)), dense(getattr(dataset.split("test"), what)))
    places = [np.argmax((dense(whole.features) == row).all(1)) for row in dense(parts[1].features)]
    assert places == sorted(places) and np.array_equal(dense(whole.labels)[places], dense(parts[1].labels))
    assert list(found.label_names) == list(dataset.label_names)
    assert share * 120 <= parts[1].n_samples <= share * 120 + 3
    assert told[-1] == (125, 125)


def test_no_group_is_cut(dataset, tmp_path):
    groups = alike_groups(dataset.split("train").features)
    found = split_dev(dataset, tmp_path / "out", share=0.3, by="alike", seed=3)
    rows = {tuple(row): group for row, group in zip(dense(dataset.split("train").features), groups, strict=True)}
    dev = {rows[tuple(row)] for row in dense(found.split("dev").features)}
    train = {rows[tuple(row)] for row in dense(found.split("train").features)}
    assert dev and train and not dev & train


def test_the_same_split_is_made_once_and_another_seed_draws_others(dataset, tmp_path):
    one = split_dev(dataset, tmp_path / "one", seed=1)
    made = (tmp_path / "one" / "manifest.json").stat().st_mtime_ns
    assert split_dev(dataset, tmp_path / "one", seed=1).fingerprint == one.fingerprint
    assert (tmp_path / "one" / "manifest.json").stat().st_mtime_ns == made
    assert split_dev(dataset, tmp_path / "two", seed=2).fingerprint != one.fingerprint
    with pytest.raises(DataError, match="holds another data set"):
        split_dev(dataset, tmp_path / "one", seed=2)


def test_text_and_its_vectorizer_come_along(tmp_path):
    from mach.data import prepare

    lines = [f"{'odd' if i % 2 else 'even'}\tnumber {i} of many small numbers\n" for i in range(40)]
    (tmp_path / "train.tsv").write_text("label\ttext\n" + "".join(lines))
    whole = prepare(tmp_path / "train.tsv", tmp_path / "data")
    found = split_dev(whole, tmp_path / "out", share=0.25)
    found.verify()
    assert sorted([*found.split("train").text, *found.split("dev").text]) == sorted(whole.split("train").text)
    assert np.array_equal(dense(found.vectorizer.transform(found.split("dev").text[:])), dense(found.split("dev").features))


def test_what_cannot_be_split_is_refused(dataset, tmp_path):
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"share=.* must lie in \(0, 1\)"):
            split_dev(dataset, tmp_path / "out", share=share)
    with pytest.raises(ConfigError, match="by='topic' must be 'samples' or 'alike'"):
        split_dev(dataset, tmp_path / "out", by="topic")
    done = split_dev(dataset, tmp_path / "out")
    with pytest.raises(DataError, match="has a dev split already, of 12 samples"):
        split_dev(done, tmp_path / "again")
    X = sp.csr_array(np.eye(2, 3, dtype=np.float32)[[0] * 20])
    one = write_dataset(tmp_path / "one", {"train": (X, X)})
    split_dev(one, tmp_path / "half", by="samples")
    same = write_dataset(
        tmp_path / "same", {"train": (sp.vstack([documents(n_topics=1).to_scipy()] * 20), sp.csr_array(np.ones((60, 2))))}
    )
    with pytest.raises(DataError, match=r"6 of 60 training samples were wanted for dev, 0 can be had .*split by samples"):
        split_dev(same, tmp_path / "no", by="alike")
    many = write_dataset(tmp_path / "dense", {"train": (np.ones((20, 2), np.float32), sp.csr_array(np.ones((20, 2))))})
    with pytest.raises(DataError, match="look-alikes are told by sparse features"):
        split_dev(many, tmp_path / "no", by="alike")
    assert isinstance(split_dev(many, tmp_path / "yes"), Dataset)
    assert not (tmp_path / "no").exists()
