"""Parse lines of `l1,l2 f:v f:v` from bytes, the lines of XC-repository text and of svmlight."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mach.data.csr import CSR, Columns, Floats, Ints, tidy_rows
from mach.errors import DataError
from mach.kernels import jit

Bytes = npt.NDArray[np.uint8]
MAX_IDS = 2**31 - 1  # ids and their number fit int32
_OK, _GARBAGE, _LABEL_RANGE, _FEATURE_RANGE, _NOT_FINITE = range(5)
_EXACT, _SLOW, _BAD = range(3)
_SPACE, _TAB, _NEWLINE, _RETURN, _COMMENT, _COMMA, _COLON = (ord(c) for c in " \t\n\r#,:")
_PLUS, _MINUS, _POINT, _ZERO, _SMALL_E, _BIG_E = (ord(c) for c in "+-.0eE")
_MAX_EXPONENT = 60
_POWERS = np.array([float(f"1e{i}") for i in range(_MAX_EXPONENT + 1)])
_SLACK = 2.0**-50
_NUMBER, _DIGITS, _WORD_END = re.compile(rb"[-+.0-9eE]*"), re.compile(rb"[0-9]*"), re.compile(rb"[^ \t\r\n]*\Z")


@dataclass(frozen=True, slots=True)
class Lines:
    """What is known of a file's lines: its name for messages, the sizes all ids must lie below, whether `#` begins a comment.

    Where comments are allowed (svmlight), lines without any content are no samples, as in scikit-learn; in XC text
    such a line is a sample with neither labels nor features.
    """

    name: str
    n_features: int
    n_labels: int
    comments: bool


def parse_lines(text: Bytes, lines: Lines, first_line: int) -> tuple[CSR, CSR]:
    """Parse whole lines, of which the last ends with a newline too, to (features, labels).

    Rows are sorted by id; the values of a feature named twice are summed, a label named twice is kept once.
    Each value is the float32 nearest to what Python's `float` reads.

    Raises: DataError naming the file, the line (the first of `text` being `first_line`) and the token.
    """
    n_rows, n_colons, n_commas = _count(text)
    label_counts, feature_counts = np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int64)
    labels, features = np.empty(n_rows + n_commas, np.int32), np.empty(n_colons, np.int32)
    values, slow = np.empty(n_colons, np.float32), np.empty((n_colons, 2), np.int64)
    limits = (lines.n_labels, lines.n_features)
    out = (label_counts, labels, feature_counts, features, values, slow)
    n_rows, n_slow, code, at = _parse(text, limits, lines.comments, *out)
    if code != _OK:
        raise DataError(_complaint(text, at, code, lines, first_line))
    _patch_slow(text, slow[:n_slow], values, lines, first_line)
    f_indptr, f_indices, f_values = tidy_rows(feature_counts[:n_rows], features, values)
    l_indptr, l_indices, _ = tidy_rows(label_counts[:n_rows], labels, None)
    return CSR(f_indptr, f_indices, f_values, lines.n_features), CSR(l_indptr, l_indices, None, lines.n_labels)


def _patch_slow(text: Bytes, slow: Ints, values: Floats, lines: Lines, first_line: int) -> None:
    """Let Python read the few numbers that the kernel could not round with certainty: (index, offset) each."""
    for index, at in slow.tolist():
        number = float(_found(_NUMBER.match(text.data, at)))
        with np.errstate(over="ignore"):
            values[index] = number
        if not math.isfinite(values[index]):
            raise DataError(_complaint(text, at, _NOT_FINITE, lines, first_line))


def _found(match: re.Match[bytes] | None) -> bytes:
    """Give what was matched, of a pattern that matches wherever it is asked: the kernel stopped there, or it may be empty."""
    assert match is not None
    return match[0]


def _token(text: Bytes, at: int) -> str:
    """Give what stands between blanks around an offset, up to about 60 characters either side."""
    begin = at - len(_found(_WORD_END.search(text[max(0, at - 60) : at].tobytes())))
    return _word(text, begin)


def _word(text: Bytes, at: int) -> str:
    """Give up to 60 characters from an offset to the next blank."""
    return text[at : at + 60].tobytes().split(None, 1)[0].decode("utf-8", "replace")


def _complaint(text: Bytes, at: int, code: int, lines: Lines, first_line: int) -> str:
    """Say what is wrong with the token at an offset."""
    where = f"{lines.name}:{first_line + int(np.count_nonzero(text[:at] == _NEWLINE))}"
    token = _token(text, at)
    number = _found(_DIGITS.match(text.data, at)).decode()
    if code == _LABEL_RANGE:
        hint = " (ids are int32)" if lines.comments else "; is the third number of line 1 the label count?"
        return f"{where}: label id {number} is outside [0, {lines.n_labels}){hint}"
    if code == _FEATURE_RANGE:
        hint = " (ids are int32)" if lines.comments else "; is the second number of line 1 the feature count?"
        return f"{where}: feature id {number} is outside [0, {lines.n_features}){hint}"
    feature, colon, value = token.partition(":")
    if code == _NOT_FINITE or (colon and feature.isdigit() and _is_not_finite(value)):
        return f"{where}: feature {feature} has value {value}; values must be finite float32 numbers"
    negative = [part for part in feature.split(",") if part.startswith("-") and part[1:].isdigit()]
    if negative:
        return f"{where}: {'feature' if colon else 'label'} id {negative[0]} is negative; ids count from 0"
    wanted = "feature:value" if colon else "a list of label ids (l1,l2) nor feature:value"
    return f"{where}: '{token}' is n{'ot' if colon else 'either'} {wanted}"


def _is_not_finite(value: str) -> bool:
    try:
        return not math.isfinite(float(value))
    except ValueError:
        return False


@jit
def _count(text: Bytes) -> tuple[int, int, int]:
    """Count newlines, colons and commas: upper bounds of rows, features and further labels."""
    newlines = colons = commas = 0
    for i in range(len(text)):
        newlines += text[i] == _NEWLINE
        colons += text[i] == _COLON
        commas += text[i] == _COMMA
    return newlines, colons, commas


@jit
def _parse(
    text: Bytes,
    limits: tuple[int, int],
    comments: bool,
    label_counts: Ints,
    labels: Columns,
    feature_counts: Ints,
    features: Columns,
    values: Floats,
    slow: Ints,
) -> tuple[int, int, int, int]:
    """Fill the arrays; give the numbers of rows and of slow values, an error code and its offset."""
    at = row = n_labels = n_features = n_slow = 0
    while at < len(text):
        at = _skip_blanks(text, at)
        if comments and (text[at] == _NEWLINE or text[at] == _COMMENT):
            at = _skip_line(text, at)
            continue
        at, end, code = _parse_labels(text, at, comments, limits[0], labels, n_labels)
        label_counts[row], n_labels = end - n_labels, end
        if code != _OK:
            return row, n_slow, code, at
        at, end, n_slow, code = _parse_features(text, at, comments, limits[1], features, values, slow, n_features, n_slow)
        feature_counts[row], n_features = end - n_features, end
        if code != _OK:
            return row, n_slow, code, at
        at = _skip_line(text, at)
        row += 1
    return row, n_slow, _OK, at


@jit
def _parse_labels(text: Bytes, at: int, comments: bool, limit: int, labels: Columns, n: int) -> tuple[int, int, int]:
    """Read `l1,l2` and the blanks after it; if a feature or nothing stands here, there are no labels."""
    begin = at
    while True:
        label, after = _parse_id(text, at)
        if at == begin and (after == at or text[after] == _COLON):
            return at, n, _OK
        if after == at or not (text[after] == _COMMA or _is_end(text[after], comments)):
            return at, n, _GARBAGE
        if label >= limit:
            return at, n, _LABEL_RANGE
        labels[n] = label
        n += 1
        if text[after] != _COMMA:
            return _skip_blanks(text, after), n, _OK
        at = after + 1


@jit
def _parse_features(
    text: Bytes, at: int, comments: bool, limit: int, features: Columns, values: Floats, slow: Ints, n: int, n_slow: int
) -> tuple[int, int, int, int]:
    """Read `f:v f:v` up to the end of the line or a comment."""
    while not (text[at] == _NEWLINE or (comments and text[at] == _COMMENT)):
        feature, colon = _parse_id(text, at)
        if colon == at or text[colon] != _COLON:
            return at, n, n_slow, _GARBAGE
        if feature >= limit:
            return at, n, n_slow, _FEATURE_RANGE
        number, after, kind = _parse_number(text, colon + 1)
        if kind == _BAD or not _is_end(text[after], comments):
            return at, n, n_slow, _GARBAGE
        if kind == _SLOW:
            slow[n_slow, 0], slow[n_slow, 1] = n, colon + 1
            n_slow += 1
        features[n], values[n] = feature, number
        n += 1
        at = _skip_blanks(text, after)
    return at, n, n_slow, _OK


@jit
def _parse_id(text: Bytes, at: int) -> tuple[int, int]:
    """Read digits; give their number, at most about 2**40, and the offset after them."""
    number = 0
    while _ZERO <= text[at] <= _ZERO + 9:
        number = min(number * 10 + (text[at] - _ZERO), 1 << 40)
        at += 1
    return number, at


@jit
def _parse_number(text: Bytes, at: int) -> tuple[float, int, int]:
    """Read a decimal number; give it as float64, the offset after it, and how far it can be trusted.

    With at most 53 bits of digits and a power of ten up to 22 both factors are exact, so one correctly rounded
    operation gives the nearest float64 (Clinger 1990, "How to read floating point numbers accurately"). Otherwise
    the result is off by less than 2**-50 of itself; where that cannot change the float32, it is as good. The rest is slow.
    """
    negative = text[at] == _MINUS
    at += negative or text[at] == _PLUS
    begin, mantissa, n_digits, exponent, point = at, np.uint64(0), 0, 0, 0
    while _ZERO <= text[at] <= _ZERO + 9 or (text[at] == _POINT and point == 0):
        if text[at] == _POINT:
            point = 1
        elif n_digits < 19:
            mantissa = mantissa * np.uint64(10) + np.uint64(text[at] - _ZERO)
            n_digits += 1 if mantissa else 0
            exponent -= point
        else:
            exponent += 1 - point
        at += 1
    if at - begin == point:
        return 0.0, at, _BAD
    if text[at] == _SMALL_E or text[at] == _BIG_E:
        power, at = _parse_power(text, at + 1)
        if at < 0:
            return 0.0, at, _BAD
        exponent += power
    number = 0.0
    if mantissa > 0:
        if not -_MAX_EXPONENT <= exponent <= _MAX_EXPONENT:
            return 0.0, at, _SLOW
        number = float(mantissa) * _POWERS[exponent] if exponent >= 0 else float(mantissa) / _POWERS[-exponent]
    exact = mantissa <= np.uint64(1 << 53) and -22 <= exponent <= 22
    sure = exact or np.float32(number * (1 - _SLACK)) == np.float32(number * (1 + _SLACK))
    kind = _EXACT if sure and np.isfinite(np.float32(number)) else _SLOW
    return -number if negative else number, at, kind


@jit
def _parse_power(text: Bytes, at: int) -> tuple[int, int]:
    """Read the digits after the `e` of a number, with their sign; the offset is -1 if there are none."""
    negative = text[at] == _MINUS
    at += negative or text[at] == _PLUS
    power, after = _parse_id(text, at)
    return (-power if negative else power), (after if after > at else -1)


@jit
def _is_end(byte: int, comments: bool) -> bool:
    return byte == _SPACE or byte == _NEWLINE or byte == _TAB or byte == _RETURN or (comments and byte == _COMMENT)


@jit
def _skip_blanks(text: Bytes, at: int) -> int:
    while text[at] == _SPACE or text[at] == _TAB or text[at] == _RETURN:
        at += 1
    return at


@jit
def _skip_line(text: Bytes, at: int) -> int:
    while text[at] != _NEWLINE:
        at += 1
    return at + 1
