"""How good answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastln.data.answers import normalise_answer
from fastln.data.dataset import Sample

__all__ = ["Accuracy", "accuracy", "normalise_answer"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Exact-match accuracy over all questions, the closed and the open ones.

    Attributes:
        all: Percent right, 0 to 100; None where there are no such questions.
        closed: The same for closed questions, as the data labels them.
        open: The same for open questions.
        n_all: Number of questions.
        n_closed: Number of closed questions.
        n_open: Number of open questions.
    """

    all: float | None
    closed: float | None
    open: float | None
    n_all: int
    n_closed: int
    n_open: int


def accuracy(predictions: Sequence[str], samples: Sequence[Sample]) -> Accuracy:
    """Score predicted answers: right is what equals the answer, both normalised by `normalise_answer`.

    Args:
        predictions: The predicted answers, in the order of the samples.
        samples: The questions with their answers.

    Raises:
        ValueError: There are more or fewer predictions than samples.
    """
    right = [
        (sample.closed, normalise_answer(prediction) == normalise_answer(sample.answer))
        for prediction, sample in zip(predictions, samples, strict=True)
    ]
    closed = [hit for is_closed, hit in right if is_closed]
    open_ = [hit for is_closed, hit in right if not is_closed]
    return Accuracy(
        all=_percent(closed + open_),
        closed=_percent(closed),
        open=_percent(open_),
        n_all=len(right),
        n_closed=len(closed),
        n_open=len(open_),
    )


def _percent(hits: list[bool]) -> float | None:
    return 100 * sum(hits) / len(hits) if hits else None
