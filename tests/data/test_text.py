"""The vectorizer against scikit-learn's HashingVectorizer and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer

from mach.data.grams import Grams
from mach.data.text import TextVectorizer
from mach.errors import ConfigError, DataError

DOCUMENTS = ["New York", "new york city", "York", "Åre", "Москва́ 莫斯科市 a", "", "x", "snow_white & the 7 dwarfs, the seven!"]
spans = st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda p: (p[0], p[0] + p[1])))


def count_reference(documents, grams: Grams) -> np.ndarray:
    """Count with scikit-learn: words' columns, then characters'."""
    parts = []
    for analyzer, span in (("word", grams.word_ngrams), ("char_wb", grams.char_ngrams)):
        n = 2**grams.hash_bits
        hashing = HashingVectorizer(analyzer=analyzer, ngram_range=span or (1, 1), n_features=n, alternate_sign=False, norm=None)
        parts.append(hashing.transform(documents) if span else sp.csr_array((len(documents), n)))
    return sp.hstack(parts).toarray()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), spans, spans)
@example(DOCUMENTS, (1, 2), (2, 4))
@example(["\x1c\u3000ß İ\x85\n_a", "a  b\ta"], (1, 3), (1, 8))
def test_counts_equal_scikit_learn(documents, words, chars):
    if words is None and chars is None:
        words = (1, 1)
    grams = Grams(word_ngrams=words, char_ngrams=chars, hash_bits=9)
    counts = grams.count(documents)
    assert np.array_equal(counts.to_scipy().toarray(), count_reference(documents, grams))
    assert all((np.diff(counts.indices[a:b]) > 0).all() for a, b in zip(counts.indptr[:-1], counts.indptr[1:], strict=True))


def transform_reference(train, documents, grams: Grams, min_df: int) -> np.ndarray:
    """Weigh, select and normalise in float64, number by number."""
    df = (count_reference(train, grams) > 0).sum(axis=0)
    kept = [column for column in range(len(df)) if df[column] >= min_df]
    rows = []
    for tf in count_reference(documents, grams):
        row = [(1 + math.log(tf[c])) * math.log(1 + len(train) / df[c]) if tf[c] else 0.0 for c in kept]
        length = math.sqrt(sum(weight * weight for weight in row))
        rows.append([weight / length if length else 0.0 for weight in row])
    return np.array(rows)


@pytest.mark.parametrize("min_df", [1, 2])
def test_features_equal_the_formula(min_df):
    options = {"word_ngrams": (1, 2), "char_ngrams": (2, 4), "hash_bits": 12}
    vectorizer = TextVectorizer.fit([DOCUMENTS[:3], DOCUMENTS[3:]], min_df=min_df, **options)
    features = vectorizer.transform([*DOCUMENTS, "unseen zzz", "york"])
    expected = transform_reference(DOCUMENTS, [*DOCUMENTS, "unseen zzz", "york"], Grams(**options), min_df)
    assert features.to_scipy().shape == expected.shape == (10, vectorizer.n_features)
    assert features.to_scipy().toarray() == pytest.approx(expected, abs=1e-6)
    assert np.diff(features.indptr)[5] == 0  # the empty document


def test_max_features_keeps_the_most_frequent():
    every = TextVectorizer.fit([DOCUMENTS], min_df=1, hash_bits=12)
    few = TextVectorizer.fit([DOCUMENTS], min_df=1, hash_bits=12, max_features=5)
    best = sorted(zip(every.weights.tolist(), every.kept.tolist(), strict=True))[:5]  # the smallest weight: the largest df
    assert sorted(few.kept.tolist()) == few.kept.tolist() == sorted(column for _, column in best)


def test_a_stored_vectorizer_gives_the_same_bits(tmp_path):
    vectorizer = TextVectorizer.fit([DOCUMENTS], min_df=1, word_ngrams=None, hash_bits=12)
    vectorizer.save(tmp_path / "v")
    loaded = TextVectorizer.load(tmp_path / "v")
    assert (loaded.grams, loaded.n_features) == (vectorizer.grams, vectorizer.n_features)
    a, b = vectorizer.transform(DOCUMENTS), loaded.transform(DOCUMENTS)
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("indptr", "indices", "values"))
    assert sorted(file.name for file in (tmp_path / "v").iterdir()) == ["kept.npy", "vectorizer.json", "weights.npy"]


def test_features_are_frozen():  # a change orphans every stored text model: raise the vectorizer's format number with it
    vectorizer = TextVectorizer.fit([["new york", "york"]], min_df=1, hash_bits=10, char_ngrams=(3, 3))
    features = vectorizer.transform(["York new york!"])
    assert vectorizer.kept.tolist() == [391, 448, 515, 1150, 1415, 1602, 1653, 1681, 1795, 1949]
    once, twice = 0.316818, 0.338443
    assert features.indices.tolist() == list(range(10))
    expected = [once, once, twice, twice, once, once, twice, once, twice, 0.19989]
    assert features.values.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"word_ngrams": (2, 1)},
            r"word_ngrams=\(2, 1\) must be None or \(shortest, longest\) with 1 <= shortest <= longest <= 8",
        ),
        ({"char_ngrams": (1, 9)}, r"char_ngrams=\(1, 9\) must be None"),
        ({"word_ngrams": None, "char_ngrams": None}, r"both None; one of them must be a span"),
        ({"hash_bits": 40}, r"hash_bits=40 must lie in \[8, 28\]"),
        ({"min_df": 0}, r"min_df=0 must be at least 1"),
        ({"max_features": 0}, r"max_features=0 must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        TextVectorizer.fit([DOCUMENTS], **options)


def test_nothing_in_common_is_an_error():
    with pytest.raises(DataError, match=r"no n-gram occurs in 2 or more of the 2 training documents; lower min_df"):
        TextVectorizer.fit([["abc"], ["xyz"]], char_ngrams=None)


def test_broken_stored_vectorizers_are_refused(tmp_path):
    with pytest.raises(DataError, match="is not a stored vectorizer"):
        TextVectorizer.load(tmp_path)
    TextVectorizer.fit([DOCUMENTS], min_df=1, hash_bits=8).save(tmp_path)
    whole = (tmp_path / "kept.npy").read_bytes()
    (tmp_path / "kept.npy").write_bytes(whole[:-4])
    with pytest.raises(DataError, match="the stored vectorizer is broken"):
        TextVectorizer.load(tmp_path)
    (tmp_path / "kept.npy").write_bytes(whole)
    manifest = (tmp_path / "vectorizer.json").read_text()
    (tmp_path / "vectorizer.json").write_text(manifest.replace('"format": 1', '"format": 7'))
    with pytest.raises(DataError, match="has vectorizer format 7, this version of mach reads format 1"):
        TextVectorizer.load(tmp_path)
