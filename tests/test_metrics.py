"""Exact-match accuracy."""

import pytest

from fastln.data import Sample
from fastln.metrics import Accuracy, accuracy

SAMPLES = [
    Sample("1", "a", "Q", "Yes", True),
    Sample("2", "a", "Q", "no", True),
    Sample("3", "a", "Q", "Left lung", False),
    Sample("4", "a", "Q", "12", False),
    Sample("5", "a", "Q", "yes", True),
]


def test_accuracy_counts_closed_and_open_apart():
    assert accuracy(["yes.", "yes", "left  lung", "13", "Yes"], SAMPLES) == Accuracy(
        all=60.0, closed=pytest.approx(200 / 3), open=50.0, n_all=5, n_closed=3, n_open=2
    )


def test_the_percent_of_nothing_is_none():
    assert accuracy(["12"], SAMPLES[3:4]) == Accuracy(100.0, None, 100.0, 1, 0, 1)
    assert accuracy([], []) == Accuracy(None, None, None, 0, 0, 0)


def test_each_sample_needs_a_prediction():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        accuracy(["yes"], SAMPLES)
