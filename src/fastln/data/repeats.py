"""Training rows that a test or validation split repeats: scores would reward that the model remembers them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from fastln.data.answers import normalise_answer
from fastln.data.dataset import Sample

logger = logging.getLogger(__name__)


def drop_repeats(
    name: str, splits: Mapping[str, list[Sample]], copies: Mapping[str, str]
) -> Mapping[str, list[Sample]]:
    """Drop from training what another split repeats: the same images, questions and answers.

    Case and white space do not count, and answers are compared as they are scored. The other splits stay complete. The
    log says how many rows were dropped, and how many repeat a question about the same images with another answer; those
    stay.

    Args:
        name: The data's name.
        splits: The samples by split.
        copies: As in `Source.copies`.
    """
    others = [split for split in splits if split != "train"]
    if "train" not in splits or not others:
        return splits
    known = {_whole(sample, copies) for split in others for sample in splits[split]}
    asked = {question for question, _ in known}
    kept, dropped, differing = [], 0, 0
    for sample in splits["train"]:
        whole = _whole(sample, copies)
        if whole in known:
            dropped += 1
        else:
            kept.append(sample)
            differing += whole[0] in asked
    where = f"the {' or '.join(others)} split"
    if dropped:
        logger.warning(
            "%s: dropped %d training questions that %s repeats with images and answer (--keep-repeats keeps them)",
            name,
            dropped,
            where,
        )
    if differing:
        logger.info(
            "%s: %d training questions have the images and the question of %s, and another answer; they stay",
            name,
            differing,
            where,
        )
    return {**splits, "train": kept}


def _whole(sample: Sample, copies: Mapping[str, str]) -> tuple[object, tuple[str, ...]]:
    """Return what is asked about which images, and the answers."""
    turns = [*sample.history, (sample.question, sample.answer)]
    images = tuple(copies.get(key, key) for key in sample.images)
    return (images, sample.system, _folded(question for question, _ in turns)), tuple(
        normalise_answer(answer) for _, answer in turns
    )


def _folded(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(" ".join(text.lower().split()) for text in texts)
