"""Score answers and reports.

All answer scores compare answers after `normalise_answer`. There are two common definitions of a closed question, and
fastln counts both: questions that the data labels closed (yes/no questions and those that name a choice), and questions
whose answer is `yes` or `no` (or a Chinese word for them, see `YES_NO`). Reports are scored by BLEU, ROUGE-L and CIDEr
with pycocoevalcap, which papers on report generation use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

from fastln.data.answers import UNSPACED, answer_words, canonical, normalise_answer
from fastln.data.dataset import Sample
from fastln.errors import FastLNError

__all__ = ["Accuracy", "ClosedOpen", "ReportScores", "accuracy", "check_scorable", "normalise_answer", "score"]

_YES = ("yes", "是", "是的", "有", "存在", "对", "正确", "能", "可以", "会", "包含")
_NO = ("no", "不是", "否", "不", "没有", "无", "不存在", "不对", "不正确", "错误", "不能", "不可以", "不会", "不包含")
YES_NO = frozenset(_YES + _NO)
"""The answers that make a question closed, where this is told by the answer."""

_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]"
_WORD = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|{_LETTER}+(?:[-'./]{_LETTER}+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedOpen:
    """Scores of closed and open questions, under one definition of closed.

    Attributes:
        closed: Percent of closed questions answered correctly, 0 to 100; None if there are none.
        open: The same for open questions.
        n_closed: Number of closed questions.
        n_open: Number of open questions.
        open_recall: Mean recall over open questions, in percent: the share of the reference answer's words that the
            prediction contains. In scripts without blanks between words, such as Chinese, each letter is a word.
        open_f1: Mean F1 over open questions, in percent: the harmonic mean of that recall and of the share of the
            prediction's words that are in the reference answer.
    """

    closed: float | None
    open: float | None
    n_closed: int
    n_open: int
    open_recall: float | None
    open_f1: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy(ClosedOpen):
    """Exact match over all questions, and over closed and open questions as the data labels them.

    If the data has no labels, only `by_answer` separates closed from open questions.

    Attributes:
        all: Percent of all questions answered correctly, 0 to 100; None if there are none.
        n_all: Number of questions.
        by_answer: The scores when closed means that the answer is `yes` or `no`.
    """

    all: float | None
    n_all: int
    by_answer: ClosedOpen

    def summary(self) -> str:
        """Return the scores as three lines: one overall, then one for each definition of closed."""
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
    """Scores of reports against their references, in the usual units: BLEU and ROUGE-L from 0 to 1, CIDEr from 0 to 10.

    Scores compare words. A word is a run of letters and digits in lower case; a hyphen, apostrophe, point or slash
    inside a word stays. All other punctuation is dropped. In scripts without blanks between words, such as Chinese,
    each letter is a word, as is usual. A score that is not defined for these references is None, and `notes` says why.

    Attributes:
        bleu_1: Corpus BLEU of single words, without smoothing; with n words, None if no reference has that many.
        bleu_2: The same with up to two words, weighted equally.
        bleu_3: The same with up to three words.
        bleu_4: The same with up to four words.
        rouge_l: Mean ROUGE-L, an F-measure with beta = 1.2.
        cider: Mean CIDEr with up to four words. The document frequencies come from the references: None if these do
            not differ, because then every word weighs nothing.
        n_reports: Number of reports that were scored: those whose reference has a word.
        notes: What the scores leave out, one sentence each.
    """

    bleu_1: float | None
    bleu_2: float | None
    bleu_3: float | None
    bleu_4: float | None
    rouge_l: float | None
    cider: float | None
    n_reports: int
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the scores as one line, and each note as another."""
        bleu = ", ".join(map(_decimal, (self.bleu_1, self.bleu_2, self.bleu_3, self.bleu_4)))
        scores = f"BLEU-1 to 4 {bleu}; ROUGE-L {_decimal(self.rouge_l)}; CIDEr {_decimal(self.cider)}"
        return "\n".join([f"{self.n_reports} reports: {scores}", *(f"  note: {note}" for note in self.notes)])


def score(predictions: Sequence[str], samples: Sequence[Sample]) -> Accuracy | ReportScores:
    """Score predictions as reports if all samples are reports, and as answers otherwise.

    Args:
        predictions: The model's outputs, in the order of the samples.
        samples: The questions or reports, with the references.

    Raises:
        ValueError: If the numbers of predictions and samples differ.
        FastLNError: As for `check_scorable`.
    """
    if samples and all(sample.is_report for sample in samples):
        return _score_reports(predictions, samples)
    return accuracy(predictions, samples)


def check_scorable(samples: Sequence[Sample]) -> None:
    """Check that `score` has the packages it needs. Call this before the model runs.

    Raises:
        FastLNError: If there are reports to score and pycocoevalcap is not installed.
    """
    if any(sample.is_report for sample in samples):
        _report_metrics()


def accuracy(predictions: Sequence[str], samples: Sequence[Sample]) -> Accuracy:
    """Score predicted answers by exact match, after `normalise_answer` on both sides.

    Args:
        predictions: The predicted answers, in the order of the samples.
        samples: The questions with their answers.

    Raises:
        ValueError: If the numbers of predictions and samples differ.
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
    """Score pairs of prediction and answer. Skip pairs without a closed or open label."""
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
    """Return recall and F1 over the answer's words, counting repeated words."""
    given, wanted = (Counter(answer_words(text)) for text in (prediction, answer))
    if not wanted:
        return float(not given), float(not given)
    common = (given & wanted).total()
    # 2PR / (P + R) with P = common / given and R = common / wanted.
    return common / wanted.total(), 2 * common / (given.total() + wanted.total())


def _score_reports(predictions: Sequence[str], samples: Sequence[Sample]) -> ReportScores:
    bleu, rouge, cider = _report_metrics()
    if len(predictions) != len(samples):
        raise ValueError(f"{len(predictions)} predictions for {len(samples)} reports")
    pairs = [
        (_words(prediction), words)
        for prediction, sample in zip(predictions, samples, strict=True)
        if (words := _words(sample.answer))
    ]
    notes = []
    if wordless := len(samples) - len(pairs):
        notes.append(f"{wordless} references have no word and are not scored")
    if empty := sum(not prediction for prediction, _ in pairs):
        notes.append(f"{empty} predictions have no word")
    written = {number: [prediction] for number, (prediction, _) in enumerate(pairs)}
    wanted = {number: [reference] for number, (_, reference) in enumerate(pairs)}
    longest = max((len(reference.split()) for _, reference in pairs), default=0)
    bleus: list[float | None] = [*(bleu(wanted, written) if pairs else [])[:longest], *[None] * 4][:4]
    if pairs and longest < 4:
        notes.append(f"no reference has more than {longest} words: BLEU with more is not scored")
    differ = len({reference for _, reference in pairs}) > 1
    if pairs and not differ:
        notes.append("CIDEr needs at least two different references: not scored")
    return ReportScores(
        bleu_1=bleus[0],
        bleu_2=bleus[1],
        bleu_3=bleus[2],
        bleu_4=bleus[3],
        rouge_l=float(rouge(wanted, written)) if pairs else None,
        cider=float(cider(wanted, written)) if differ else None,
        n_reports=len(pairs),
        notes=tuple(notes),
    )


def _report_metrics() -> list[Callable]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise FastLNError("scoring reports needs pycocoevalcap: pip install 'fastln[reports]'") from error
    return [
        lambda wanted, written: Bleu(4).compute_score(wanted, written, verbose=0)[0],
        lambda wanted, written: Rouge().compute_score(wanted, written)[0],
        lambda wanted, written: Cider().compute_score(wanted, written)[0],
    ]


def _words(text: str) -> str:
    return " ".join(_WORD.findall(canonical(text)))


def _written(scores: ClosedOpen) -> str:
    return (
        f"closed {_percent(scores.closed)} of {scores.n_closed}, open {_percent(scores.open)} of {scores.n_open} "
        f"(recall {_percent(scores.open_recall)}, token F1 {_percent(scores.open_f1)})"
    )


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


def _share(values: Sequence[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None
