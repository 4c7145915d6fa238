"""Exact match, recall and F1 of answers; BLEU, ROUGE-L and CIDEr of reports, against figures worked out by hand."""

import math
import re
import sys

import pytest

from fastln import metrics
from fastln.data import Sample
from fastln.errors import FastLNError
from fastln.metrics import Accuracy, ClosedOpen, ReportScores, accuracy, check_scorable, score

SAMPLES = [
    Sample("1", "a", "Q", "Yes", True),
    Sample("2", "a", "Q", "no", True),
    Sample("3", "a", "Q", "Left lung", False),
    Sample("4", "a", "Q", "12", False),
    Sample("5", "a", "Q", "the left", True),
]
ANSWERS = ["yes.", "yes", "lung,  left", "12", "The Left"]
BY_LABEL = {
    "closed": pytest.approx(200 / 3),
    "open": 50.0,
    "n_closed": 3,
    "n_open": 2,
    "open_recall": 100.0,
    "open_f1": 100.0,
}
BY_ANSWER = ClosedOpen(
    closed=50.0,
    open=pytest.approx(200 / 3),
    n_closed=2,
    n_open=3,
    open_recall=100.0,
    open_f1=100.0,
)


def test_closed_and_open_by_both_definitions():
    assert accuracy(ANSWERS, SAMPLES) == Accuracy(all=60.0, n_all=5, by_answer=BY_ANSWER, **BY_LABEL)
    lines = accuracy(ANSWERS, SAMPLES).summary().splitlines()
    assert lines[0] == "exact match: all 60.0% of 5"
    assert lines[1] == (
        "  closed by the data's label: closed 66.7% of 3, open 50.0% of 2 (recall 100.0%, token F1 100.0%)"
    )
    assert lines[2].startswith("  closed where the answer is yes or no: closed 50.0% of 2, open 66.7% of 3 ")


def test_data_without_labels_has_the_definition_by_answer_alone():
    samples = [Sample(s.id, s.image, s.question, s.answer, None) for s in SAMPLES]
    scores = accuracy(ANSWERS, samples)
    assert (scores.closed, scores.open, scores.n_closed, scores.n_open) == (None, None, 0, 0)
    assert scores.by_answer == BY_ANSWER
    assert "closed by the data's label: the data has no labels" in scores.summary()


@pytest.mark.parametrize(
    ("prediction", "answer", "recall", "f1"),
    [
        ("left upper lobe", "Right upper lobe.", 2 / 3, 2 / 3),
        ("upper", "right upper lobe", 1 / 3, 0.5),
        ("the right, upper lobe", "right upper lobe", 1, 6 / 7),
        ("", "right upper lobe", 0, 0),
        ("right", "", 0, 0),  # readers refuse such answers
        ("", "", 1, 1),
        ("no no no", "no, no", 1, 0.8),  # a word counts as often as it occurs
        ("no", "no, no", 0.5, 2 / 3),
    ],
)
def test_recall_and_f1_of_words(prediction, answer, recall, f1):
    scores = accuracy([prediction], [Sample("1", "a", "Q", answer, False)])
    assert (scores.open_recall, scores.open_f1) == (pytest.approx(100 * recall), pytest.approx(100 * f1))
    assert scores.by_answer.open_recall == scores.open_recall


def test_the_percent_of_nothing_is_none():
    nothing = ClosedOpen(closed=None, open=None, n_closed=0, n_open=0, open_recall=None, open_f1=None)
    scores = accuracy([], [])
    assert (scores.all, scores.n_all, scores.by_answer) == (None, 0, nothing)
    assert (scores.closed, scores.open, scores.open_recall) == (None, None, None)
    assert "all - of 0" in scores.summary()


def test_each_sample_needs_a_prediction():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        accuracy(["yes"], SAMPLES)


def reports(*texts):
    return [Sample(str(number), f"{number}/0.png", "", text, None) for number, text in enumerate(texts)]


WANTED = reports("The heart is normal.", "No pleural effusion!", "Clear lungs.")
WRITTEN = ["the heart is large", "No effusion", "clear lungs"]


def test_reports_by_hand():
    pytest.importorskip("pycocoevalcap")
    scores = score(WRITTEN, WANTED)
    assert isinstance(scores, ReportScores)
    assert scores.n_reports == 3
    # Words: 3 of 4, 2 of 2, 2 of 2; pairs: 2 of 3, 0 of 1, 1 of 1; triples: 1 of 2; quadruples: 0 of 1.
    # 8 words stand against 9, so each figure is shortened by the same factor.
    short = math.exp(1 - 9 / 8)
    assert scores.bleu_1 == pytest.approx(short * 7 / 8, rel=1e-6)
    assert scores.bleu_2 == pytest.approx(short * (7 / 8 * 3 / 5) ** (1 / 2), rel=1e-6)
    assert scores.bleu_3 == pytest.approx(short * (7 / 8 * 3 / 5 * 1 / 2) ** (1 / 3), rel=1e-6)
    assert scores.bleu_4 < 1e-3
    # Longest common subsequences: 3 of 4 and 4; 2 of 2 given and 3 wanted; all.
    rouge = [0.75, (1 + 1.44) * 1 * (2 / 3) / (2 / 3 + 1.44 * 1), 1]
    assert scores.rouge_l == pytest.approx(sum(rouge) / 3)
    assert "3 reports: BLEU-1 to 4 0.772" in scores.summary()


def test_cider_by_hand():
    """Every word and every pair is in one reference of three, so all weigh log 3 and cosines are counts."""
    pytest.importorskip("pycocoevalcap")
    scores = score(WRITTEN, WANTED)
    # Single words, pairs, triples, quadruples; a word that no reference holds weighs as one that one holds.
    first = [3 / 4, 2 / 3, 1 / 2, 0]
    second = [2 / math.sqrt(2 * 3), 0, 0, 0]
    third = [1, 1, 0, 0]
    # A difference in length is punished by a Gaussian of deviation 6; the lengths are counts of pairs.
    expected = [sum(first) / 4, math.exp(-1 / (2 * 36)) * sum(second) / 4, sum(third) / 4]
    assert scores.cider == pytest.approx(10 * sum(expected) / 3, rel=1e-6)


def test_perfect_reports_have_the_best_scores():
    pytest.importorskip("pycocoevalcap")
    long = reports("the heart is normal in size", "there is no pleural effusion", "lungs are clear of any mass")
    scores = score([sample.answer.upper() + "." for sample in long], long)
    assert (scores.bleu_1, scores.bleu_4, scores.rouge_l) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert scores.cider == pytest.approx(10)
    nothing = score(["", "", ""], long)
    assert max(nothing.bleu_1, nothing.rouge_l, nothing.cider) < 1e-6


def test_each_report_needs_a_prediction():
    pytest.importorskip("pycocoevalcap")
    with pytest.raises(ValueError, match="1 predictions for 3 reports"):
        score(["clear"], WANTED)


CHINESE = ["心脏大小正常。双肺纹理清晰，未见异常。", "双侧胸腔积液，右侧较多。", "心影增大，肺淤血。"]


def test_chinese_reports_are_scored_by_letter():
    pytest.importorskip("pycocoevalcap")
    scores = score([text.replace("。", ".").replace("，", " , ") for text in CHINESE], reports(*CHINESE))
    assert (scores.bleu_1, scores.bleu_4, scores.rouge_l) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert scores.cider == pytest.approx(10)
    assert scores.notes == ()
    partly = score(["心脏增大", "双侧积液", "肺淤血"], reports(*CHINESE))
    assert 0 < partly.bleu_2 < partly.bleu_1 < 1
    # Three letters of four are in the reference of 16, in this order.
    assert score(["心脏增大"], reports(CHINESE[0])).rouge_l == pytest.approx(
        2.44 * 0.75 * 3 / 16 / (3 / 16 + 1.44 * 0.75)
    )


@pytest.mark.parametrize(
    "texts",
    [["The heart is normal."], ["No effusion in either lung."] * 3, ["Normal heart size!", "normal heart SIZE"]],
)
def test_cider_of_references_that_do_not_differ_is_not_scored(texts):
    pytest.importorskip("pycocoevalcap")
    scores = score(texts, reports(*texts))
    assert scores.cider is None
    assert "CIDEr needs at least two different references: not scored" in scores.notes
    assert "; CIDEr -\n" in scores.summary()
    assert scores.bleu_1 == pytest.approx(1)


def test_bleu_of_more_words_than_any_reference_has_is_not_scored():
    pytest.importorskip("pycocoevalcap")
    scores = score(["clear lungs", "heart normal"], reports("Clear lungs", "Normal heart"))
    assert (scores.bleu_1, scores.bleu_3, scores.bleu_4) == (pytest.approx(1), None, None)
    assert scores.notes == ("no reference has more than 2 words: BLEU with more is not scored",)
    assert "BLEU-1 to 4 1.000, 0.707, -, -; ROUGE-L" in scores.summary()


def test_texts_without_words():
    pytest.importorskip("pycocoevalcap")
    scores = score(
        ["", "no effusion", "the lungs are clear"], reports("___.", "no effusion", "the lungs are not clear")
    )
    assert scores.n_reports == 2
    assert scores.notes == ("1 references have no word and are not scored",)
    assert score(["", "clear"], reports("one mass", "clear")).notes[0] == "1 predictions have no word"
    nothing = score(["clear"], reports("___"))
    assert (nothing.bleu_1, nothing.rouge_l, nothing.cider, nothing.n_reports) == (None, None, None, 0)


def test_words_of_english_reports_are_as_ever():
    """Published figures stay: this is the rule that they were made with."""
    text = "The 2.5-cm mass, x_1 isn't (T1/T2)... NO; follow-up -- a1b2 'quoted' 50% e.g. end."
    rule = re.compile(r"[^\W_]+(?:[-'./][^\W_]+)*")
    assert metrics._words(text) == " ".join(rule.findall(text.lower()))
    ascii_text = "".join(map(chr, range(128))) * 2
    assert metrics._words(ascii_text) == " ".join(rule.findall(ascii_text.lower()))


def test_chinese_answers():
    samples = [
        Sample("1", "a", "Q", "是", None),
        Sample("2", "a", "Q", "没有", None),
        Sample("3", "a", "Q", "左肺上叶", None),
        Sample("4", "a", "Q", "Ménière", None),
    ]
    scores = accuracy(["是。", "没 有", "左肺下叶", "Me\u0301nie\u0300re"], samples)
    assert scores.all == 75
    assert (scores.by_answer.closed, scores.by_answer.n_closed, scores.by_answer.n_open) == (100, 2, 2)
    assert scores.by_answer.open_recall == pytest.approx(100 * (3 / 4 + 1) / 2)


def test_without_the_library_reports_are_refused_and_answers_are_not(monkeypatch):
    for name in ("bleu.bleu", "cider.cider", "rouge.rouge"):
        monkeypatch.setitem(sys.modules, f"pycocoevalcap.{name}", None)
    check_scorable(SAMPLES)
    with pytest.raises(FastLNError, match=r"fastln\[reports\]"):
        check_scorable(WANTED)
