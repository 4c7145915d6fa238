"""What a plan needs to know about data: its number of samples, its texts' lengths, its images' sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from fastln.data import DataOptions, Sample, load_dataset
from fastln.models.sources import load_tokenizer

CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English; used where the model has no tokenizer beside its configuration."""


@dataclass(frozen=True)
class Corpus:
    """The training questions of a dataset.

    Attributes:
        name: The data's name.
        n_samples: Its questions.
        mean_tokens: The mean number of tokens that a question's texts have.
        most_tokens: The largest.
        counted: How tokens were counted, in words.
        images: In words: how many images, of which sizes; empty without any.
    """

    name: str
    n_samples: int
    mean_tokens: int
    most_tokens: int
    counted: str
    images: str

    def n_steps(self, batch_size: int) -> int:
        """Return the steps of an epoch."""
        return math.ceil(self.n_samples / batch_size)


def read_corpus(data: str, source: str, options: DataOptions, *, with_answers: bool) -> Corpus:
    """Read a dataset's training split: texts, and the headers of images.

    Args:
        data: As `fastln.data.load_dataset` takes it.
        source: The model's directory or hub name, for its tokenizer.
        options: How to read the data.
        with_answers: Whether answers are part of the texts, as in language models.

    Raises:
        FastLNError: If the data cannot be read.
    """
    dataset = load_dataset(data, "train", options=options)
    count, counted = _counter(source)
    lengths = [count(_text(sample, with_answers)) for sample in dataset.samples]
    keys = sorted({key for sample in dataset.samples for key in sample.images})
    images = ""
    if keys:
        edges = sorted(max(dataset.stat(key)[:2]) for key in keys)
        span = f"{edges[0]} to {edges[-1]} pixels, {median(edges):.0f} in the median"
        images = f"{len(keys):,} images, their longer edges {span}"
    return Corpus(dataset.name, len(lengths), max(1, round(fmean(lengths))), max(1, *lengths), counted, images)


def _text(sample: Sample, with_answers: bool) -> str:
    if not with_answers:
        return sample.question
    turns = [*sample.history, (sample.question, sample.answer)]
    return " ".join(part for part in (sample.system, *(text for turn in turns for text in turn)) if part)


def _counter(source: str) -> tuple[Callable[[str], int], str]:
    try:
        tokenizer = load_tokenizer(source)
    # Whatever transformers raises, there is no tokenizer.
    except Exception:
        rule = f"from the lengths of texts, at {CHARACTERS_PER_TOKEN} characters a token, for want of a tokenizer"
        return (lambda text: math.ceil(len(text) / CHARACTERS_PER_TOKEN) + 2), rule
    return (lambda text: len(tokenizer(text, verbose=False)["input_ids"])), "by the model's tokenizer"


def clipped(length: int, most: int | None) -> int:
    """Return a text's length, at most what the model has positions for."""
    return length if most is None else max(1, min(length, most))
