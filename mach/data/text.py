"""TextVectorizer: documents to weighted n-gram features, the same ones for training and for every later question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mach.data.csr import CSR, Columns, Floats, Ints
from mach.data.grams import Grams, Span
from mach.data.threads import ordered
from mach.errors import ConfigError, DataError
from mach.files import atomic, map_array, read_json, write_json
from mach.kernels import jit

FORMAT = 1
_FILE = "vectorizer.json"


@dataclass(frozen=True, slots=True, eq=False)
class TextVectorizer:
    """Turns text into rows of length 1 over F columns, those n-gram hashes that enough training documents share.

    The weight of an n-gram is (1 + ln tf) ln(1 + N / df): tf times in this document, in df of the N it was fitted on
    (Salton & Buckley 1988, "Term-weighting approaches in automatic text retrieval").
    """

    grams: Grams
    kept: Columns  # (F,), ascending: the hashed columns that became features 0..F-1
    weights: Floats  # (F,), ln(1 + N / df)

    @classmethod
    def fit(
        cls,
        chunks: Iterable[Sequence[str]],
        *,
        word_ngrams: Span | None = (1, 2),
        char_ngrams: Span | None = (2, 4),
        hash_bits: int = 20,
        min_df: int = 2,
        max_features: int | None = None,
    ) -> TextVectorizer:
        """Learn from documents that come in chunks, each read once.

        Args:   word_ngrams, char_ngrams, shortest and longest n-gram, None for none of the kind; hash_bits, each kind is
                hashed to 2**hash_bits columns; columns in fewer than min_df documents are dropped, and of more than
                max_features only the most frequent are kept (ties: the lower column).
        Raises: ConfigError for an option out of range, DataError if no column is left.
        """
        grams = Grams(word_ngrams=word_ngrams, char_ngrams=char_ngrams, hash_bits=hash_bits)
        for name, value in (("min_df", min_df), ("max_features", max_features)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        df, n_documents = np.zeros(grams.n_columns, np.int64), 0
        for counts in ordered(grams.count, chunks):
            _add_to(df, counts.indices)
            n_documents += len(counts)
        kept = np.flatnonzero(df >= min_df)
        if max_features is not None and len(kept) > max_features:
            kept = np.sort(kept[np.argsort(-df[kept], kind="stable")[:max_features]])
        if not len(kept):
            raise DataError(f"no n-gram occurs in {min_df} or more of the {n_documents} training documents; lower min_df")
        return cls(grams, kept.astype(np.int32), np.log1p(n_documents / df[kept]).astype(np.float32))

    @property
    def n_features(self) -> int:
        """Give F."""
        return len(self.kept)

    def transform(self, documents: Sequence[str]) -> CSR:
        """Give the features of N documents, (N, F). A document without any known n-gram has an empty row."""
        counts = self.grams.count(documents)
        lookup = np.full(self.grams.n_columns, -1, np.int32)
        lookup[self.kept] = np.arange(len(self.kept), dtype=np.int32)
        assert counts.values is not None
        indptr = np.zeros(len(counts) + 1, np.int64)
        size = _weigh(counts.indptr, counts.indices, counts.values, lookup, np.array(self.weights), indptr)
        return CSR(indptr, counts.indices[:size], counts.values[:size], self.n_features)

    def save(self, folder: str | Path) -> None:
        """Write vectorizer.json, kept.npy and weights.npy into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in (("kept", self.kept), ("weights", self.weights)):
            with atomic(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)
        grams = self.grams
        spans = {"word_ngrams": grams.word_ngrams, "char_ngrams": grams.char_ngrams}
        write_json(folder / _FILE, {"format": FORMAT, **spans, "hash_bits": grams.hash_bits, "n_features": self.n_features})

    @classmethod
    def load(cls, folder: str | Path) -> TextVectorizer:
        """Read what `save` wrote; the arrays are mapped, not read.

        Raises: DataError if a file is missing, broken or of another format.
        """
        folder = Path(folder)
        try:
            stored = read_json(folder / _FILE)
            if stored.get("format") != FORMAT:
                raise DataError(
                    f"{folder}: has vectorizer format {stored.get('format')}, this version of mach reads format {FORMAT}"
                )
            spans = {name: stored[name] and tuple(stored[name]) for name in ("word_ngrams", "char_ngrams")}
            grams = Grams(**spans, hash_bits=stored["hash_bits"])
            kept, weights = map_array(folder / "kept.npy"), map_array(folder / "weights.npy")
        except (OSError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: is not a stored vectorizer ({error})") from error
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{folder}: the stored vectorizer is broken ({error})") from error
        if not len(kept) == len(weights) == stored["n_features"]:
            raise DataError(f"{folder}: the stored vectorizer is broken (its arrays differ in length)")
        return cls(grams, kept, weights)


@jit
def _add_to(df: Ints, columns: Columns) -> None:
    for column in columns:
        df[column] += 1


@jit
def _weigh(indptr: Ints, columns: Columns, values: Floats, lookup: Columns, weights: Floats, out_indptr: Ints) -> int:
    """Turn counts to weights in place, unknown columns left out, every row scaled to length 1."""
    size = 0
    for row in range(len(indptr) - 1):
        begin, squares = size, 0.0
        for i in range(indptr[row], indptr[row + 1]):
            feature = lookup[columns[i]]
            if feature >= 0:
                weight = (1.0 + math.log(values[i])) * weights[feature]
                squares += weight * weight
                columns[size], values[size] = feature, weight
                size += 1
        for i in range(begin, size):
            values[i] /= math.sqrt(squares)
        out_indptr[row + 1] = size
    return size
