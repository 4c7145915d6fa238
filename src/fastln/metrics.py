"""How good answers and reports are.

Answers are compared after `normalise_answer`, the same for every figure. Two definitions of a closed question are in
use, and both are counted: what the data labels closed (yes/no questions and those that name a choice), and what has
`yes` or `no` for its answer. Reports are scored by BLEU, ROUGE-L and CIDEr as pycocoevalcap computes them, the code
behind the figures in papers on report generation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastln.data.answers import normalise_answer
from fastln.data.dataset import Sample
from fastln.errors import FastLNError

__all__ = ["Accuracy", "ClosedOpen", "ReportScores", "accuracy", "check_scorable", "normalise_answer", "score"]

YES_NO = ("yes", "no")

_WORD = re.compile(r"[^\W_]+(?:[-'./][^\W_]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedOpen:
    """Closed and open questions apart, under one definition of closed.

    Attributes:
        closed: Percent of the closed questions answered right, 0 to 100; None where there are none.
        open: The same for open questions.
        n_closed: Number of closed questions.
        n_open: Number of open questions.
        open_recall: Mean share, in percent, of the words of an open question's answer that the given answer holds.
        open_f1: Mean of the harmonic mean of that and of the share of the given answer's words that are right.
    """

    closed: float | None
    open: float | None
    n_closed: int
    n_open: int
    open_recall: float | None
    open_f1: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy(ClosedOpen):
    """Exact match over all questions, and over the closed and open ones as the data labels them.

    Where the data has no labels, only `by_answer` tells closed from open.

    Attributes:
        all: Percent of all questions answered right, 0 to 100; None where there are none.
        n_all: Number of questions.
        by_answer: Closed is what has `yes` or `no` for its answer.
    """

    all: float | None
    n_all: int
    by_answer: ClosedOpen

    def summary(self) -> str:
        """Write it in three lines, of which one is for each definition of closed."""
        by_label = _written(self) if self.n_closed + self.n_open else "the data has no labels"
        return "\n".join(
            [
                f"exact match: all {_percent(self.all)} of {self.n_all}",
                f"  closed by the data's label: {by_label}",
                f"  closed where the answer is yes or no: {_written(self.by_answer)}",
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportScores:
    """Reports against their references, in the units of papers: BLEU and ROUGE-L from 0 to 1, CIDEr from 0 to 10.

    Words are compared: runs of letters and digits in lower case, joined by an inner hyphen, apostrophe, point or slash;
    all other punctuation is dropped.

    Attributes:
        bleu_1: BLEU over all reports at once, of single words, without smoothing.
        bleu_2: The same of up to two words, weighed equally.
        bleu_3: The same of up to three words.
        bleu_4: The same of up to four words.
        rouge_l: Mean ROUGE-L, an F-measure with recall weighed 1.2 times precision.
        cider: Mean CIDEr, of up to four words; the document frequencies are the references' own.
        n_reports: Number of reports.
    """

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider: float
    n_reports: int

    def summary(self) -> str:
        """Write it in one line."""
        bleu = ", ".join(f"{value:.3f}" for value in (self.bleu_1, self.bleu_2, self.bleu_3, self.bleu_4))
        return f"{self.n_reports} reports: BLEU-1 to 4 {bleu}; ROUGE-L {self.rouge_l:.3f}; CIDEr {self.cider:.3f}"


def score(predictions: Sequence[str], samples: Sequence[Sample]) -> Accuracy | ReportScores:
    """Score answers as answers, and reports, where the data is of reports, as reports.

    Args:
        predictions: What a model wrote, in the order of the samples.
        samples: What was asked, with what is right.

    Raises:
        ValueError: There are more or fewer predictions than samples.
        FastLNError: As for `check_scorable`.
    """
    if samples and all(sample.is_report for sample in samples):
        return _score_reports(predictions, samples)
    return accuracy(predictions, samples)


def check_scorable(samples: Sequence[Sample]) -> None:
    """Check that `score` has what it takes, which is better found before a model is asked than after.

    Raises:
        FastLNError: There are reports to score, and pycocoevalcap is missing.
    """
    if any(sample.is_report for sample in samples):
        _report_metrics()


def accuracy(predictions: Sequence[str], samples: Sequence[Sample]) -> Accuracy:
    """Score predicted answers: right is what equals the answer, both normalised by `normalise_answer`.

    Args:
        predictions: The predicted answers, in the order of the samples.
        samples: The questions with their answers.

    Raises:
        ValueError: There are more or fewer predictions than samples.
    """
    pairs = [
        (normalise_answer(prediction), normalise_answer(sample.answer))
        for prediction, sample in zip(predictions, samples, strict=True)
    ]
    by_label = _closed_open(pairs, [sample.closed for sample in samples])
    return Accuracy(
        all=_share([prediction == answer for prediction, answer in pairs]),
        n_all=len(pairs),
        by_answer=_closed_open(pairs, [answer in YES_NO for _, answer in pairs]),
        **{name: getattr(by_label, name) for name in ClosedOpen.__slots__},
    )


def _closed_open(pairs: list[tuple[str, str]], closed: list[bool | None]) -> ClosedOpen:
    """Score pairs of prediction and answer; what is neither closed nor open is left out."""
    hits: dict[bool | None, list[float]] = {True: [], False: [], None: []}
    for (prediction, answer), kind in zip(pairs, closed, strict=True):
        hits[kind].append(prediction == answer)
    overlaps = [_overlap(*pair) for pair, kind in zip(pairs, closed, strict=True) if kind is False]
    return ClosedOpen(
        closed=_share(hits[True]),
        open=_share(hits[False]),
        n_closed=len(hits[True]),
        n_open=len(hits[False]),
        open_recall=_share([recall for recall, _ in overlaps]),
        open_f1=_share([f1 for _, f1 in overlaps]),
    )


def _overlap(prediction: str, answer: str) -> tuple[float, float]:
    """Return recall and F1 of the answer's words, each counted as often as it occurs."""
    given, wanted = (
        Counter(word for part in text.split() if (word := normalise_answer(part))) for text in (prediction, answer)
    )
    common = (given & wanted).total()
    # 2PR / (P + R) with P = common / given and R = common / wanted.
    return common / wanted.total(), 2 * common / (given.total() + wanted.total())


def _score_reports(predictions: Sequence[str], samples: Sequence[Sample]) -> ReportScores:
    bleu, rouge, cider = _report_metrics()
    written = {number: [_words(text)] for number, text in enumerate(predictions)}
    wanted = {number: [_words(sample.answer)] for number, sample in enumerate(samples)}
    if len(written) != len(wanted):
        raise ValueError(f"{len(written)} predictions for {len(wanted)} reports")
    bleus = bleu(wanted, written)
    return ReportScores(
        bleu_1=bleus[0],
        bleu_2=bleus[1],
        bleu_3=bleus[2],
        bleu_4=bleus[3],
        rouge_l=float(rouge(wanted, written)),
        cider=float(cider(wanted, written)),
        n_reports=len(wanted),
    )


def _report_metrics() -> list[Callable]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise FastLNError("to score reports pycocoevalcap is needed: pip install 'fastln[reports]'") from error
    return [
        lambda wanted, written: Bleu(4).compute_score(wanted, written, verbose=0)[0],
        lambda wanted, written: Rouge().compute_score(wanted, written)[0],
        lambda wanted, written: Cider().compute_score(wanted, written)[0],
    ]


def _words(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _written(scores: ClosedOpen) -> str:
    return (
        f"closed {_percent(scores.closed)} of {scores.n_closed}, open {_percent(scores.open)} of {scores.n_open} "
        f"(recall {_percent(scores.open_recall)}, token F1 {_percent(scores.open_f1)})"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


def _share(values: Sequence[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None
