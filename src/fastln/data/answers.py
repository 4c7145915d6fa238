"""Answers as text: which answers count as equal, and the vocabulary of answers that a classifier chooses from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fastln.errors import FastLNError
from fastln.ops.linear_cross_entropy import IGNORE_INDEX

UNKNOWN = IGNORE_INDEX
"""The index of an answer outside the vocabulary; the loss ignores it."""

_SURROUNDING = " .,;:!?\"'`"


def normalise_answer(text: str) -> str:
    """Normalise an answer for comparison.

    In this order: convert to lower case; replace runs of white space by one blank; strip blanks and the characters
    ``. , ; : ! ? " ' ` `` from both ends. Nothing else changes: `5%`, `X-ray` and `(CN V)` keep their signs; `Yes.` and
    `" yes"` become `yes`.
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
        """Make the vocabulary of training answers: normalised, most frequent first, ties sorted by text.

        Raises:
            FastLNError: There are no answers, or one of them is empty after normalising.
        """
        counts = Counter(normalise_answer(answer) for answer in answers)
        return cls(sorted(counts, key=lambda answer: (-counts[answer], answer)))

    def index(self, answer: str) -> int:
        """Return the index of an answer, which need not be normalised; `UNKNOWN` if the vocabulary lacks it."""
        return self._indices.get(normalise_answer(answer), UNKNOWN)

    def __getitem__(self, index: int) -> str:
        return self._answers[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers)

    def __len__(self) -> int:
        return len(self._answers)
