"""Lines of `l1,l2 f:v f:v` against Python's own split, int and float."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mach.data.parse import Lines, parse_lines
from mach.errors import DataError

XC = Lines("t.txt", 50, 20, comments=False)
SVM = Lines("t.svm", 2**31 - 1, 2**31 - 1, comments=True)


def parse(text: str | bytes, lines: Lines = XC, first_line: int = 2):
    raw = text.encode() if isinstance(text, str) else text
    return parse_lines(np.frombuffer(bytearray(raw), np.uint8), lines, first_line)


def rows_of(csr):
    bounds = zip(csr.indptr[:-1], csr.indptr[1:], strict=True)
    if csr.values is None:
        return [csr.indices[a:b].tolist() for a, b in bounds]
    return [list(zip(csr.indices[a:b].tolist(), csr.values[a:b].tolist(), strict=True)) for a, b in bounds]


def parse_reference(text: str):
    """Read lines the slow and plain way; float32 sums of duplicates in the order of the line."""
    features, labels = [], []
    for line in text.removesuffix("\n").split("\n"):
        tokens = line.split()
        ids = [int(i) for token in tokens if ":" not in token for i in token.split(",")]
        sums: dict[int, np.float32] = {}
        for i, v in (token.split(":") for token in tokens if ":" in token):
            value = np.float32(float(v))
            sums[int(i)] = sums[int(i)] + value if int(i) in sums else value
        labels.append(sorted(set(ids)))
        features.append([(i, float(v)) for i, v in sorted(sums.items())])
    return features, labels


numbers = st.one_of(
    st.floats(-1e30, 1e30).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.decimals(-1000, 1000, places=5).map(str),
    st.integers(-(10**25), 10**25).map(str),
    st.tuples(st.integers(0, 10**20), st.integers(0, 10**20), st.integers(-40, 18)).map(lambda t: f"{t[0]}.{t[1]}e{t[2]}"),
)


@given(numbers)
@example("16777217")  # half way between two float32: rounds to even
@example("16777217.0000000000000000000000001")
@example("1.00000005960464477539062500000000000000001")
@example("9007199254740993")
@example("3.4028235677973366e38")  # the last number that is not infinite as float32, but one
@example("1e-46")
@example("1e-400")
@example("0e999")
@example("0." + "0" * 100 + "1e90")
@example("+.5")
@example("5.")
@example("-0")
@example("7.E-2")
def test_numbers_are_what_python_reads(number):
    with np.errstate(over="ignore"):
        expected = np.float32(float(number))
    if math.isinf(expected):
        with pytest.raises(DataError, match=r"t.txt:2: feature 3 has value .*; values must be finite float32 numbers"):
            parse(f"1 3:{number}\n")
    else:
        features, _ = parse(f"1 3:{number}\n")
        assert features.values.tobytes() == expected.tobytes()


def test_numbers_next_to_the_middle_between_two_float32_are_rounded_as_python_does():
    rng = np.random.default_rng(0)
    low = (rng.random(2000) * 10.0 ** rng.integers(-30, 30, 2000)).astype(np.float32)
    middle = (low.astype(np.float64) + np.nextafter(low, np.float32(np.inf)).astype(np.float64)) / 2
    tokens = [form % number for form in ("%.16g", "%.17g", "%.18e", "%.25e") for number in middle.tolist()]
    features, _ = parse(" ".join(["0", *(f"{i}:{token}" for i, token in enumerate(tokens))]) + "\n", SVM)
    assert np.array_equal(features.values, np.array([float(token) for token in tokens]).astype(np.float32))


blanks = st.sampled_from([" ", "  ", "\t"])
pairs = st.tuples(st.integers(0, 49), st.decimals(-9, 9, places=3)).map(lambda p: f"{p[0]}:{p[1]}")
line = st.tuples(
    st.sampled_from(["", " "]),
    st.lists(st.integers(0, 19).map(str), max_size=4).map(",".join),
    blanks,
    st.lists(pairs, max_size=6),
    blanks,
    st.sampled_from(["\n", "\r\n", " \n"]),
).map(lambda p: p[0] + p[1] + (p[2] if p[1] else "") + p[4].join(p[3]) + p[5])


@given(st.lists(line, min_size=1, max_size=6).map("".join))
@example("\n")
@example("1,2\n")
@example("0:1\n 1:2\n3\n")
def test_lines_are_what_python_reads(text):
    features, labels = parse(text)
    assert (rows_of(features), rows_of(labels)) == parse_reference(text)
    assert (features.n_columns, labels.n_columns) == (50, 20)


def test_duplicates_are_summed_and_labels_kept_once():
    features, labels = parse("4,2,4 7:1 3:2 7:0.5\n")
    assert (rows_of(features), rows_of(labels)) == ([[(3, 2.0), (7, 1.5)]], [[2, 4]])


def test_svmlight_skips_comments_and_lines_without_content():
    features, labels = parse("# a\n\n1 3:1#x 4:1\n  # b\n2#\n 5:2e0#c\n", SVM)
    assert (rows_of(features), rows_of(labels)) == ([[(3, 1.0)], [], [(5, 2.0)]], [[1], [2], []])


def test_sum_of_slow_numbers_is_sorted_after_they_are_read():
    features, _ = parse("1 9:16777217 3:1e-50 9:1\n")
    assert rows_of(features) == [[(3, 0.0), (9, 16777216.0)]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("20 3:1", r"label id 20 is outside \[0, 20\); is the third number of line 1 the label count\?"),
        ("1,99999999999999999999 3:1", r"label id 99999999999999999999 is outside \[0, 20\)"),
        ("18446744073709551617 3:1", r"label id 18446744073709551617 is outside"),  # 1 in 64 bits
        ("1 3:1 50:1", r"feature id 50 is outside \[0, 50\); is the second number of line 1 the feature count\?"),
        ("-1 3:1", r"label id -1 is negative; ids count from 0"),
        ("1,-2 3:1", r"label id -2 is negative"),
        ("1 -3:1", r"feature id -3 is negative"),
        ("1 3:nan", r"feature 3 has value nan; values must be finite float32 numbers"),
        ("1 3:1 4:-Infinity", r"feature 4 has value -Infinity; values must be finite"),
        ("1 3:1e39", r"feature 3 has value 1e39; values must be finite"),
        ("1 3:1e999", r"feature 3 has value 1e999; values must be finite"),
        ("1 3:0x1", r"'3:0x1' is not feature:value"),
        ("1 3:1_0", r"'3:1_0' is not feature:value"),
        ("1 3:", r"'3:' is not feature:value"),
        ("1 3:1e", r"'3:1e' is not feature:value"),
        ("1 3:.", r"'3:\.' is not feature:value"),
        ("1 3:1:2", r"'3:1:2' is not feature:value"),
        ("1 :2", r"':2' is not feature:value"),
        ("1 3:1,4:2", r"'3:1,4:2' is not feature:value"),
        ("1, 3:1", r"'1,' is neither a list of label ids \(l1,l2\) nor feature:value"),
        ("1 2 3:1", r"'2' is neither a list of label ids"),
        ("1,x 3:1", r"'1,x' is neither a list of label ids"),
        ("cat 3:1", r"'cat' is neither a list of label ids"),
        ("1 3:1 # note", r"'#' is neither a list of label ids"),
        ("1 3:1 \xe9", r"'é' is neither"),
        ("x" * 300, r"'x{60}' is neither"),
    ],
)
def test_bad_tokens_are_named_with_their_line(bad, message):
    for text in (f"1 2:3\n\n{bad}\n1 2:3\n", f"1 2:3\n\n{bad}\r\n"):
        with pytest.raises(DataError, match=rf"^t\.txt:102: {message}"):
            parse(text, XC, first_line=100)


def test_ids_beyond_int32_are_refused_without_a_header():
    with pytest.raises(DataError, match=r"t.svm:1: feature id 2147483647 is outside \[0, 2147483647\) \(ids are int32\)"):
        parse("1 2147483647:1\n", SVM, 1)
    with pytest.raises(DataError, match=r"t.svm:1: label id 2147483648 is outside \[0, 2147483647\) \(ids are int32\)"):
        parse("2147483648 1:1\n", SVM, 1)
