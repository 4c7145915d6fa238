"""Answers as text: what counts as the same answer, and the list of those that a classifier can give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fastln.errors import FastLNError
from fastln.ops.linear_cross_entropy import IGNORE_INDEX

UNKNOWN = IGNORE_INDEX
"""The index of an answer that is not in the vocabulary, which counts for nothing in the loss."""

_SURROUNDING = " .,;:!?\"'`"


def normalise_answer(text: str) -> str:
    """Return an answer in the form in which answers are compared.

    In this order: lower case; runs of white space become one blank; blanks and the characters ``. , ; : ! ? " ' ` ``
    are taken from both ends. Nothing inside changes and nothing else is removed: `5%`, `X-ray` and `(CN V)` keep
    their signs, `Yes.` and `" yes"` become `yes`.
    """
    return " ".join(text.lower().split()).strip(_SURROUNDING)


class AnswerVocabulary:
    """The answers that a classifier chooses from, by index.

    Args:
        answers: Normalised answers, all different, in the order of their indices.

    Raises:
        FastLNError: `answers` is empty, or one of them is.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self._answers = tuple(answers)
        if not self._answers:
            raise FastLNError("the answer vocabulary is empty: the training data has no answers")
        if "" in self._answers:
            raise FastLNError(
                f"answer {self._answers.index('')} of the answer vocabulary, counted from 0, is the empty text ''; "
                "an answer needs more than blanks and punctuation"
            )
        self._indices = {answer: index for index, answer in enumerate(self._answers)}

    @classmethod
    def build(cls, answers: Iterable[str]) -> AnswerVocabulary:
        """Make the vocabulary of training answers: normalised, the most frequent first, equal counts by their text.

        Raises:
            FastLNError: There are no answers, or normalising leaves nothing of one.
        """
        counts = Counter(normalise_answer(answer) for answer in answers)
        return cls(sorted(counts, key=lambda answer: (-counts[answer], answer)))

    def index(self, answer: str) -> int:
        """Return the index of an answer in any spelling; `UNKNOWN` where the vocabulary lacks it."""
        return self._indices.get(normalise_answer(answer), UNKNOWN)

    def __getitem__(self, index: int) -> str:
        return self._answers[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers)

    def __len__(self) -> int:
        return len(self._answers)
