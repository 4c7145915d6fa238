"""Samples and their images: the data that all readers return and all models take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from PIL import Image
from torch.utils.data import Dataset

from fastln.data.images import ImageStat
from fastln.errors import FastLNError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one or several images, or one report to write about them.

    Attributes:
        id: The sample's name in its data; it need not be unique.
        image: Key of the image, for `VQADataset.image`; several samples may share one image. Empty if there is no
            image: a question for a language model.
        question: The question; runs of white space are single blanks. Empty if a report is to be written.
        answer: The answer (or the report) in the spelling of the data, never empty.
        closed: True if the data calls the question closed (yes/no, or a named choice), False if open, None if it does
            not say.
        views: Keys of further images of the same study, in the order of the data.
        history: The earlier questions and answers of the same conversation. A model may learn those answers too; the
            last one, `answer`, is what is scored.
        system: What is said to the model before the conversation; empty if nothing is.
        places: For each image the number of the turn, from 0, whose question it stands in; empty if all stand in the
            first.
    """

    id: str
    image: str
    question: str
    answer: str
    closed: bool | None
    views: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    places: tuple[int, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """The keys of all images."""
        return (self.image, *self.views) if self.image else ()

    @property
    def n_characters(self) -> int:
        """The total length of the texts of all turns, and of the system's."""
        turns = ((self.question, self.answer), *self.history)
        return len(self.system) + sum(len(text) for turn in turns for text in turn)

    @property
    def is_report(self) -> bool:
        """Whether a report is to be written, because there is no question."""
        return not self.question


def demands(samples: Iterable[Sample]) -> frozenset[str]:
    """Return what samples demand of a model beyond the answer to one question.

    Returns:
        Some of `images`, `questions without an image`, `several images`, `reports`, `conversations` and `system
        turns`.
    """
    found = set()
    for sample in samples:
        found.add("images" if sample.image else "questions without an image")
        if sample.views:
            found.add("several images")
        if sample.is_report:
            found.add("reports")
        if sample.history:
            found.add("conversations")
        if sample.system:
            found.add("system turns")
    return frozenset(found)


def digest(samples: Iterable[Sample], stats: Mapping[str, ImageStat]) -> str:
    """Return a digest of samples, in order: their texts and their images' keys and stats (not pixels).

    Reading every image in full at each start would take too long.
    """
    hashed = hashlib.sha256()
    for sample in samples:
        hashed.update(repr((sample, [tuple(stats[key]) for key in sample.images])).encode())
    return hashed.hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """The result of a reader: all splits, and a function from an image's key to the image.

    Attributes:
        name: The data's name, for messages.
        synthetic: Whether a program draws the images.
        splits: The samples by split, in the order of the data; splits that the data lacks are missing.
        image: Takes a key, gives the image in mode RGB; can be pickled, for worker processes, and called from several
            threads at once.
        stats: What is known about each image without decoding it, by key.
        copies: For each image that is byte for byte an earlier one: the key of that.
    """

    name: str
    synthetic: bool
    splits: Mapping[str, list[Sample]]
    image: Callable[[str], Image.Image]
    stats: Mapping[str, ImageStat]
    copies: Mapping[str, str] = field(default_factory=dict)

    def dataset(self, split: str, *, validation_fraction: float = 0.0) -> VQADataset:
        """Return one split.

        If the data has no validation split, one can be taken from the training questions: all questions about some of
        the images, chosen only by a hash of the image's key (a copy of an image counts as that image). So all
        rephrasings of a question stay on one side, and so do all answers about an image. If only some of these were set
        aside, a model could learn the others as the answer to everything.

        Args:
            split: `train`, `validation` or `test`.
            validation_fraction: Fraction of the images whose training questions are set aside, from 0 up to but not
                including 1.

        Returns:
            The questions of the split, at least one.

        Raises:
            FastLNError: The split is unknown, missing in the data or empty; or the fraction is out of range, or is
                given for data that already has a validation split.
        """
        check_split(split, validation_fraction)
        if validation_fraction and "validation" in self.splits:
            raise FastLNError(
                f"{self.name} already has a validation split: validation_fraction must be 0, not {validation_fraction}"
            )
        if validation_fraction and split != "test":
            wanted = split == "validation"
            samples = [s for s in self._split("train") if self._set_aside(s, validation_fraction) == wanted]
            note = f" with validation_fraction {validation_fraction}"
        else:
            samples, note = self._split(split), ""
        if not samples:
            raise FastLNError(f"{self.name}: the {split} split holds no usable row{note}")
        return VQADataset(self, split, samples)

    def _set_aside(self, sample: Sample, fraction: float) -> bool:
        name = self.copies.get(sample.image, sample.image) or sample.question
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64

    def _split(self, split: str) -> list[Sample]:
        if split in self.splits:
            return self.splits[split]
        aside = "; --validation (validation_fraction), now 0, can set some training questions aside"
        hint = aside if split == "validation" else ""
        raise FastLNError(f"{self.name} has no {split} split, only {', '.join(self.splits)}{hint}")


class VQADataset(Dataset[Sample]):
    """The questions of one split. Images are decoded on each access.

    Attributes:
        name: The name of the data.
        split: `train`, `validation` or `test`.
        synthetic: Whether a program draws the images.
        samples: The questions, in a fixed order.
    """

    def __init__(self, source: Source, split: str, samples: list[Sample]) -> None:
        self.name = source.name
        self.split = split
        self.synthetic = source.synthetic
        self.samples = samples
        self._image = source.image
        self._stats = source.stats

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def image(self, key: str) -> Image.Image:
        """Return an image of a sample.

        Args:
            key: One of `Sample.images`.

        Returns:
            The image in mode RGB, in its own size.

        Raises:
            FastLNError: The image cannot be decoded, or no sample has this key.
        """
        return self._image(key)

    def stat(self, key: str) -> ImageStat:
        """Return what is known about an image, one of `Sample.images`, without decoding it."""
        return self._stats[key]


def check_split(split: str, validation_fraction: float = 0.0) -> None:
    """Check what can be checked before any data is read.

    Raises:
        FastLNError: There is no such split, or the fraction is out of range.
    """
    if split not in SPLITS:
        near = get_close_matches(split, SPLITS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise FastLNError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}{meant}")
    if not 0 <= validation_fraction < 1:
        raise FastLNError(f"validation_fraction must be from 0 up to but not including 1, not {validation_fraction}")
