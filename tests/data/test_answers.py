"""Normalised answers and the vocabulary of a classifier."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastln.data import AnswerVocabulary, normalise_answer
from fastln.errors import FastLNError


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Yes", "yes"),
        (" yes. ", "yes"),
        ("'Left  \t lung' .", "left lung"),
        ("X-Ray", "x-ray"),
        ("5%", "5%"),
        ("CN III (right)", "cn iii (right)"),
        ("a. b", "a. b"),
        ("?!", ""),
    ],
)
def test_normalise_answer(text, normalised):
    assert normalise_answer(text) == normalised


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


def test_vocabulary_by_frequency_then_text():
    vocabulary = AnswerVocabulary.build(["no", "Yes", "left", "yes.", "Chest", "NO ", "yes"])
    assert list(vocabulary) == ["yes", "no", "chest", "left"]
    assert len(vocabulary) == 4
    assert vocabulary[1] == "no"
    assert [vocabulary.index(answer) for answer in ("Left.", "YES", "right")] == [3, 0, -100]
    assert list(AnswerVocabulary(vocabulary)) == list(vocabulary)


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(FastLNError, match="answer vocabulary is empty"):
        AnswerVocabulary.build([])


def test_an_empty_answer_is_refused():
    with pytest.raises(FastLNError, match=r"answer 1 of the answer vocabulary.*''"):
        AnswerVocabulary(["yes", ""])
    with pytest.raises(FastLNError, match=r"answer 1 of the answer vocabulary.*''"):
        AnswerVocabulary.build(["yes", "yes", "?!"])
