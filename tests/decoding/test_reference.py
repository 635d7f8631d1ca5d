"""The reference itself, against figures worked by hand."""

from __future__ import annotations

import math

import pytest

from mach.decoding import reference

HALF, QUARTER = 0.0, -math.log(3)  # logits of the probabilities 1/2 and 1/4


@pytest.mark.parametrize(
    ("estimator", "scores"),
    [
        ("logits", [0.0, QUARTER]),
        ("log-probs", [2 * math.log(1 / 2), math.log(1 / 2) + math.log(1 / 4)]),
        ("min", [1 / 2, 1 / 4]),
        ("median", [1 / 2, 3 / 8]),
        ("mean", [4 / 3 * (1 / 2 - 1 / 4), 4 / 3 * (3 / 8 - 1 / 4)]),
    ],
)
def test_two_labels_that_share_their_first_bucket(estimator, scores):
    logits_RB = [[HALF, 5, 5, 5], [HALF, QUARTER, 5, 5]]
    assert reference.label_scores(logits_RB, [[0, 0], [0, 1]], loss="logistic", estimator=estimator) == pytest.approx(scores)


def test_softmax_is_over_the_buckets():
    found = reference.log_probabilities([math.log(2), math.log(5), math.log(3)], "softmax")
    assert found == pytest.approx([math.log(p) for p in (0.2, 0.5, 0.3)])


def test_identity_mean_is_the_probability():
    found = reference.label_scores([[HALF, QUARTER]], [[0, 1]], loss="squared-hinge", estimator="mean", is_identity=True)
    assert found == pytest.approx([1 / 2, 1 / 4])


def test_ties_go_to_the_smaller_label():
    assert reference.topk([1.0, 3.0, 2.0, 3.0, 2.0], 4) == [1, 3, 2, 4]
