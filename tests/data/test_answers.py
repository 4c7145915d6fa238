"""Normalised answers and the vocabulary of a classifier."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastln.data import AnswerVocabulary, normalise_answer
from fastln.data.answers import answer_words
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


@pytest.mark.parametrize(
    ("spellings", "normalised"),
    [
        (["是。", "是", " 是 ．", "「是」", "是！"], "是"),
        (["ＭＲＩ", "mri", "ＭＲＩ。"], "mri"),
        (["ménière", "Me\u0301nie\u0300re.", "MÉNIÈRE"], "ménière"),
        (["crohn’s", "Crohn's", "crohnʼs"], "crohn's"),
        (["X‑ray", "x–ray", "x-ray", "Ｘ－ｒａｙ"], "x-ray"),
        (["−5", "-5", "‐５"], "-5"),
        (["１２", "١٢", "12", "१२"], "12"),
        (["左 肺", "左肺", "左　肺。", "左\u200b肺"], "左肺"),
        (["CT 图像", "CT图像", "ＣＴ图像"], "ct图像"),
        (["肝，脾", "肝、脾", "肝, 脾", "肝,脾。"], "肝,脾"),
        (["نعم", "نعم؟", "«نعم»", "\u200fنعم۔"], "نعم"),
        (["हाँ।", "हाँ"], "हाँ"),
        (["“Yes”", "¿yes?", "yes…", "yes\xa0"], "yes"),
        (["STRASSE", "straße"], "strasse"),
        (["ﬁbrosis", "fibrosis"], "fibrosis"),
        (["37 ℃", "37 °C"], "37 °c"),
        (["50％", "50%"], "50%"),
        (["はい。", "ﾊｲ", "ハイ"], None),
    ],
)
def test_spellings_of_one_answer_are_one(spellings, normalised):
    got = [normalise_answer(spelling) for spelling in spellings]
    assert len(set(got)) == (1 if normalised else 2)  # hiragana and katakana are different letters
    assert normalised is None or got[0] == normalised
    vocabulary = AnswerVocabulary.build(spellings)
    assert len(vocabulary) == len(set(got))


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_answers_in_ascii_are_normalised_as_ever(text):
    """Published figures stay: this is the rule that they were made with."""
    assert normalise_answer(text) == " ".join(text.lower().split()).strip(" .,;:!?\"'`")
    assert answer_words(text) == [word for part in text.lower().split() if (word := part.strip(" .,;:!?\"'`"))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("左肺上叶", list("左肺上叶")),
        ("CT, 肺部。", ["ct", "肺", "部"]),
        ("右レントゲン", list("右レントゲン")),
        ("ปอด", list("ปอด")),
        ("좌측 폐", ["좌측", "폐"]),
        ("Ménière’s disease", ["ménière's", "disease"]),
    ],
)
def test_words_of_answers(text, words):
    assert answer_words(text) == words


def test_vocabularies_of_older_versions_still_find_their_answers():
    vocabulary = AnswerVocabulary(["crohn’s", "crohn's", "是。", "yes"])
    assert [vocabulary.index(answer) for answer in ("Crohn's", "crohn’s", "是", "Yes")] == [0, 0, 2, 3]
    assert len(vocabulary) == 4


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
