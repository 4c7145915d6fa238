"""Tasks: a model to tune, and such a model with everything that visual question answering needs."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastln.data import GroupedBatches, demands
from fastln.errors import FastLNError
from fastln.files import user_path
from fastln.origin import Origin

if TYPE_CHECKING:
    from fastln.data import Sample, VQADataset
    from fastln.models.images import ImageInputs

ModelT = TypeVar("ModelT", bound=nn.Module)

MAX_QUESTION_TOKENS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What an adapter keeps of the data that its base was made for.

    Attributes:
        answers: the answers that a new dual encoder chooses from; None for those of the training data.
        tokenizer: that of a bare configuration; None for one of the training data's words.
    """

    answers: Sequence[str] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


NOTHING_KEPT = Kept()


class Task:
    """A model to tune with a method.

    Attributes:
        model: the network; `model(**batch).loss` is what training minimises.
        name: the model's name in tables.
        head: names of the modules that make up the task head.
        random_head: those of them that are randomly initialised and so train with every method.
        origin: where it came from, for its adapters and checkpoints.
    """

    head: tuple[str, ...] = ()
    origin: Origin = Origin()

    def __init__(self, model: PreTrainedModel, *, name: str, random_head: tuple[str, ...] = ()) -> None:
        self.model = model
        self.name = name
        self.random_head = random_head

    def head_under(self, method: str) -> tuple[str, ...]:
        """Return the names of the head's modules that train, at its rate: the random ones, or all for method `head`."""
        return self.head if method == "head" else self.random_head

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def random_weights(self) -> bool:
        """Whether the model was built from a bare configuration, so that accuracy means nothing; saved with it."""
        return bool(getattr(self.model.config, "random_weights", False))


class VQATask(Task, ABC):
    """Visual question answering with one model: batches in, loss or answers out.

    Attributes:
        tokenizer: for the questions (and for generated answers).
        images: turns images into pixel values.
        vision: name of the vision tower whose last hidden states the model reads, so that they can be cached; empty,
            for the whole model, if there is none.
        takes: which of the data's demands (`fastln.data.demands`) it can meet.
        does: what it can do, for messages about data that it cannot use.
        shares_images: whether samples on one image share its vision pass, and so belong in one batch.
    """

    vision: str = ""
    takes: frozenset[str] = frozenset({"images"})
    does: str = "it answers one question about one image (models that chat, chat:SOURCE, take all of these)"
    shares_images: bool = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageInputs | None,
        *,
        name: str,
        random_head: tuple[str, ...] = (),
    ) -> None:
        super().__init__(model, name=name, random_head=random_head)
        self.tokenizer = tokenizer
        self.images = images

    @property
    def vision_tower(self) -> nn.Module:
        """The module that turns pixel values into features."""
        return self.model.get_submodule(self.vision)

    def check_data(self, dataset: VQADataset) -> None:
        """Check that the model can use the samples, and warn about texts that it cuts off.

        Raises:
            FastLNError: if they hold images, several images, no images, reports or conversations, and the model cannot
                use them.
        """
        if missing := sorted(demands(dataset.samples) - self.takes):
            first = next(sample for sample in dataset.samples if demands([sample]) & {*missing})
            raise FastLNError(
                f"{dataset.name} holds {' and '.join(missing)}, which {self.name} cannot take: {self.does}; the first "
                f"such row is sample {first.id}"
            )
        for what, (lengths, most) in self.cut_off(dataset.samples).items():
            if cut := [sample.id for sample, n in zip(dataset.samples, lengths, strict=True) if n > most]:
                logger.warning(
                    "%s %s: %d of %d %s have more than %d tokens and are cut off there, for example that of sample %s",
                    dataset.name,
                    dataset.split,
                    len(cut),
                    len(lengths),
                    what,
                    most,
                    cut[0],
                )

    def cut_off(self, samples: list[Sample]) -> dict[str, tuple[list[int], int]]:
        """Return how many tokens each sample's texts have, and how many the model keeps; nothing if it keeps all."""
        return {}

    def batches(
        self, dataset: VQADataset, batch_size: int, *, seed: int, questions_per_image: int, drop_last: bool = False
    ) -> GroupedBatches:
        """Return a dataset's batches, grouped to reduce the cost of each; see `GroupedBatches`.

        A model that shares vision passes gets up to `questions_per_image` questions on an image together. Any other
        model gets texts of similar length, because they are padded to the longest.
        """
        return GroupedBatches(
            dataset,
            batch_size,
            seed=seed,
            questions_per_image=questions_per_image if self.shares_images else 1,
            drop_last=drop_last,
            by_length=not self.shares_images,
        )

    @abstractmethod
    def collate(self, samples: list[Sample], dataset: VQADataset) -> dict[str, Any]:
        """Make the model's keyword arguments, with labels, from samples of one dataset."""

    @abstractmethod
    def answers(self, batch: dict[str, Any]) -> list[str]:
        """Return the model's answer to each question of a batch made by `collate`."""

    def save(self, directory: Path) -> None:
        """Write model, tokenizer and image preprocessing, for `load_task(directory)` to load."""
        directory = user_path(directory)
        self.model.save_pretrained(directory)
        self.save_tools(directory)

    def save_tools(self, directory: Path) -> None:
        """Write the tokenizer and the image preprocessing."""
        self.tokenizer.save_pretrained(directory)
        if self.images is not None:
            self.images.processor.save_pretrained(directory)

    def question_lengths(self, samples: list[Sample]) -> tuple[list[int], int]:
        """Return how many tokens each question has, and the most that `tokenize` keeps."""
        ids = self.tokenizer([sample.question for sample in samples], verbose=False)["input_ids"]
        return [len(row) for row in ids], MAX_QUESTION_TOKENS

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, (batch, longest), on the model's device."""
        tokens = self.tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=MAX_QUESTION_TOKENS,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}


def cast_as_loaded(model: ModelT, dtype: torch.dtype) -> ModelT:
    """Cast a model to the values that `from_pretrained(dtype=...)` would load after it was saved, in place.

    Buffers that are not saved, such as the frequencies of rotary positions, are made anew in float32 there. `model.to`
    would round them, and the saved model would give other results than this one.

    Args:
        model: A model that was made in float32.
        dtype: The dtype of its parameters and its other buffers.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer
    return model
