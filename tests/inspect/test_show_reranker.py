"""How a second stage is told in a line."""

from __future__ import annotations

import pytest

from mach.inspect.show import show_reranker

RECORD = {"depth": 20, "weight": 1.5, "parameters": 12345, "bytes": 45678, "train_s": 3.21}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("networks", 20, "held out"), "{} and of 20 near to it: {}, by networks, chosen on what is held out, {}"),
        (("logit + 6 margin + 12 likeness", 0, "dev"), "{}: {}, by logit + 6 margin + 12 likeness, chosen on the dev split, {}"),
        (("logit + 1.5 margin", 0, "nothing"), "{}: {}, by logit + 1.5 margin, as set, {}"),
        ((), "{}: {}, by logit + 1.5 margin, chosen by an earlier version, {}"),
    ],
)
def test_it_says_what_orders_and_by_what_it_was_chosen(more, expected):
    parts = "re-ranker of a sample's 20 best labels", "12,345 parameters, 45.7 kB", "3.2 s of fitting"
    assert show_reranker(RECORD | dict(zip(("order", "near", "chosen_on"), more, strict=False))) == expected.format(*parts)
