"""Hashed n-gram counts of documents: what scikit-learn's HashingVectorizer counts, column for column, at the speed of bytes.

A document is brought to lower case and to UTF-8. Words are runs of two or more letters, digits or `_`; word n-grams are
joined by a blank. Character n-grams lie within a word with one blank at each end (`analyzer="char_wb"`); a padded word
no longer than n counts once, whole. Column: abs(murmur3_32(n-gram)) mod 2**bits. The words' columns come first, then
the characters'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mach.data.csr import CSR, Columns, Ints
from mach.errors import ConfigError
from mach.kernels import jit

Span = tuple[int, int]
Bytes = npt.NDArray[np.uint8]
_WORD = re.compile(r"\w\w+")
_BLANK, _END = ord(" "), ord("\n")
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class Grams:
    """Which n-grams are counted, and in how many columns.

    Raises: ConfigError naming the field, its value and the allowed range.
    """

    word_ngrams: Span | None  # shortest and longest, in words; None: none
    char_ngrams: Span | None  # shortest and longest, in characters; None: none
    hash_bits: int  # 2**hash_bits columns for words, as many for characters

    def __post_init__(self) -> None:
        for name, span in (("word_ngrams", self.word_ngrams), ("char_ngrams", self.char_ngrams)):
            if span is not None and not (len(span) == 2 and 1 <= span[0] <= span[1] <= 8):
                raise ConfigError(f"{name}={span} must be None or (shortest, longest) with 1 <= shortest <= longest <= 8")
        if self.word_ngrams is None and self.char_ngrams is None:
            raise ConfigError("word_ngrams and char_ngrams are both None; one of them must be a span such as (1, 2)")
        if not 8 <= self.hash_bits <= 28:
            raise ConfigError(f"hash_bits={self.hash_bits} must lie in [8, 28]")

    @property
    def n_columns(self) -> int:
        """Give the number of hashed columns, words' and characters' together."""
        return 2 << self.hash_bits

    def count(self, documents: Sequence[str]) -> CSR:
        """Count the n-grams of N documents: CSR (N, n_columns), values how often each occurs."""
        lowered = [document.lower() for document in documents]
        words = _joined(" ".join(_WORD.findall(text)) for text in lowered) if self.word_ngrams else ""
        chars = _joined(" ".join(text.split()) for text in lowered) if self.char_ngrams else ""
        spans = (self.word_ngrams or (1, 0), self.char_ngrams or (1, 0))
        indptr, indices, counts = _count(_to_bytes(words), _to_bytes(chars), *spans, len(lowered), self.hash_bits)
        return CSR(indptr, indices, counts, self.n_columns)


def _joined(texts: Iterable[str]) -> str:
    """Put each text between blanks and end it with a newline, which no text holds."""
    return "".join(f" {text} \n" for text in texts)


def _to_bytes(text: str) -> Bytes:
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)


@jit
def _count(
    words: Bytes, chars: Bytes, word_span: Span, char_span: Span, n_documents: int, bits: int
) -> tuple[Ints, Columns, npt.NDArray[np.float32]]:
    """Count per document; `tally` holds one document's counts and is emptied through the list of its columns."""
    per_word, per_char = word_span[1] - word_span[0] + 1, char_span[1] - char_span[0] + 1
    most = len(words) * max(0, per_word) + len(chars) * max(0, per_char)
    indptr, indices, counts = np.zeros(n_documents + 1, np.int64), np.empty(most, np.int32), np.empty(most, np.float32)
    tally = np.zeros(2 << bits, np.int32)
    size = word_at = char_at = 0
    for document in range(n_documents):
        begin = size
        if len(words):
            word_at, size = _count_words(words, word_at, word_span, bits, tally, indices, size)
        if len(chars):
            char_at, size = _count_chars(chars, char_at, char_span, bits, tally, indices, size)
        indices[begin:size].sort()
        for i in range(begin, size):
            counts[i] = tally[indices[i]]
            tally[indices[i]] = 0
        indptr[document + 1] = size
    return indptr, indices[:size].copy(), counts[:size].copy()


@jit
def _count_words(text: Bytes, at: int, span: Span, bits: int, tally: Columns, columns: Columns, size: int) -> tuple[int, int]:
    """Count the n-grams of the words of ` w1 w2 .. ` and a newline; give the offset after it and the number of columns so far."""
    at += 1
    while text[at] != _END and text[at] != _BLANK:
        end = at
        for n in range(1, span[1] + 1):
            while text[end] != _BLANK:
                end += 1
            if n >= span[0]:
                size = _add(_column(text, at, end, bits), tally, columns, size)
            if text[end + 1] == _END:
                break
            end += 1
        while text[at] != _BLANK:
            at += 1
        at += 1
    while text[at] != _END:
        at += 1
    return at + 1, size


@jit
def _count_chars(text: Bytes, at: int, span: Span, bits: int, tally: Columns, columns: Columns, size: int) -> tuple[int, int]:
    """Count the n-grams inside each padded word of ` w1 w2 .. ` and a newline; give what `_count_words` gives."""
    while text[at + 1] != _END and text[at + 1] != _BLANK:
        word_end = at + 1
        while text[word_end] != _BLANK:
            word_end += 1
        for n in range(span[0], span[1] + 1):
            begin, end = at, at
            for _ in range(n):
                end = min(_next_char(text, end), word_end + 1)
            size = _add(_column(text, begin, end, bits) + (1 << bits), tally, columns, size)
            if end > word_end:
                break
            while end <= word_end:
                begin, end = _next_char(text, begin), _next_char(text, end)
                size = _add(_column(text, begin, end, bits) + (1 << bits), tally, columns, size)
        at = word_end
    while text[at] != _END:
        at += 1
    return at + 1, size


@jit
def _next_char(text: Bytes, at: int) -> int:
    """Step over one character of UTF-8."""
    at += 1
    while text[at] & 0xC0 == 0x80:
        at += 1
    return at


@jit
def _add(column: int, tally: Columns, columns: Columns, size: int) -> int:
    """Raise a column's count; list the column when it is new."""
    if tally[column] == 0:
        columns[size] = column
        size += 1
    tally[column] += 1
    return size


@jit
def _column(text: Bytes, begin: int, end: int, bits: int) -> int:
    """Hash bytes with MurmurHash3 x86-32, seed 0 (A. Appleby, public domain); abs of it as int32, mod 2**bits."""
    h = 0
    n_whole = begin + (end - begin) // 4 * 4
    for i in range(begin, n_whole, 4):
        h ^= _scramble(text[i] | text[i + 1] << 8 | text[i + 2] << 16 | text[i + 3] << 24)
        h = (h << 13 | h >> 19) & _LOW_32
        h = (h * 5 + 0xE6546B64) & _LOW_32
    tail = 0
    for i in range(end - 1, n_whole - 1, -1):
        tail = tail << 8 | text[i]
    if end > n_whole:
        h ^= _scramble(tail)
    h ^= end - begin
    h = ((h ^ h >> 16) * 0x85EBCA6B) & _LOW_32
    h = ((h ^ h >> 13) * 0xC2B2AE35) & _LOW_32
    h ^= h >> 16
    return min(h, (1 << 32) - h) & ((1 << bits) - 1)


@jit
def _scramble(k: int) -> int:
    k = (k * 0xCC9E2D51) & _LOW_32
    k = (k << 15 | k >> 17) & _LOW_32
    return (k * 0x1B873593) & _LOW_32
