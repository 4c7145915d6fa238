"""A batch for any model that `outline` makes, of chosen size, from its configuration: for plans, not for learning."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fastln.errors import FastLNError
from fastln.models.chat_vision import CHAT_VISION
from fastln.models.dual_encoder import MODEL_TYPE as DUAL
from fastln.models.image_size import check_reads, check_size_for, position_arguments
from fastln.models.shapes import ANSWER_TOKENS, FAMILIES, QUESTION_TOKENS, is_shape, parse_shape
from fastln.ops.linear_cross_entropy import IGNORE_INDEX

CHAT_TOKENS, OTHER_TOKENS = 512, 128
"""Tokens of a text: of language models, and of others."""

SAMPLES = 8
"""Samples of a batch."""

_FIRST_ID = 3  # of the numbers that stand for no special token in most vocabularies


@dataclass(frozen=True)
class BatchSize:
    """The size of a batch.

    Attributes:
        n_samples: Samples in it; None for a shape's own, or what is usual.
        image_size: Edge of its square images, in pixels; None for the model's own.
        text_length: Tokens of each text, an image's tokens apart; None for what is usual.
    """

    n_samples: int | None = None
    image_size: int | None = None
    text_length: int | None = None

    def settled(self, spec: str) -> BatchSize:
        """Return the size with a number of samples: that of the shape `spec`, if it is one."""
        if self.n_samples is not None:
            return self
        return replace(self, n_samples=parse_shape(spec).batch_size if is_shape(spec) else SAMPLES)


USUAL = BatchSize()
"""The size that leaves everything open."""


@dataclass(frozen=True)
class Example:
    """A batch, and what it is.

    Attributes:
        arguments: The model's arguments: images on the meta device, all else on the CPU, with values.
        image_size: Edge of its images; None without any.
        text_length: Tokens of each text, an image's apart; None without any.
        n_image_tokens: Tokens that an image takes in a text.
        step: Image sizes are multiples of this.
        most_tokens: The most tokens of a text that the model has positions for; None if it does not say.
    """

    arguments: dict[str, Any]
    image_size: int | None = None
    text_length: int | None = None
    n_image_tokens: int = 0
    step: int = 1
    most_tokens: int | None = None

    @property
    def n_samples(self) -> int:
        """Samples in the batch."""
        return len(next(value for value in self.arguments.values() if isinstance(value, Tensor)))

    def describe(self) -> str:
        """Say in a few words what the batch is."""
        words = [f"{self.n_samples} samples"]
        if self.image_size is not None:
            words.append(f"an image of {self.image_size}²")
        if self.text_length is not None:
            extra = f" and {self.n_image_tokens} of the image" if self.n_image_tokens else ""
            words.append(f"{self.text_length} tokens{extra}")
        labels = self.arguments.get("labels")
        if isinstance(labels, Tensor) and labels.ndim > 1:
            words.append(f"{int((labels != IGNORE_INDEX).sum()) // len(labels)} labels")
        return f"{words[0]} of {', '.join(words[1:])}" if len(words) > 1 else words[0]


def example(model: PreTrainedModel, size: BatchSize, spec: str = "") -> Example:
    """Make a batch for a model.

    Language models get labels for their last `ANSWER_TOKENS` tokens, as when they learn answers; masked ones for 15% of
    all tokens; others for each sample. A bare encoder has none.

    Args:
        model: The model; it may be on the meta device.
        size: The batch's size.
        spec: The shape that the model was made from, if it was: its own batches are used.

    Raises:
        FastLNError: If the model takes no images or texts of this size, or its shapes depend on values.
    """
    n_samples = size.settled(spec).n_samples
    assert n_samples is not None
    if is_shape(spec):
        return _of_shape(model, n_samples, spec)
    config, takes = model.config, inspect.signature(type(model).forward).parameters
    if config.model_type in CHAT_VISION and config.model_type != "llava":
        raise FastLNError(
            f"{type(model).__name__}: how much it computes depends on the values of its inputs, so it cannot be "
            "planned from its configuration; fastln train --dry-run shows the memory of a batch of your data"
        )
    vision = getattr(config, "vision_config", None) or config
    has_images, has_text = "pixel_values" in takes, "input_ids" in takes
    if size.image_size is not None and not has_images:
        raise FastLNError(f"{type(model).__name__} reads no images: leave --image-size out")
    if size.text_length is not None and not has_text:
        raise FastLNError(f"{type(model).__name__} reads no texts: leave --text-length out")
    arguments: dict[str, Any] = {}
    edge, n_image_tokens, step = None, 0, 1
    if has_images:
        edge, step, more = _image(model, vision, size)
        arguments = {"pixel_values": torch.empty(n_samples, 3, edge, edge, device="meta"), **more}
    if config.model_type == "llava":
        n_image_tokens = CHAT_VISION["llava"].n_tokens(config, torch.Size((1, 3, edge or 0, edge or 0)))
    text = getattr(config, "text_config", None) or config
    length = None
    if has_text:
        length = _length(model, text, size, n_image_tokens)
        ids = _ids(text, n_samples, length)
        if n_image_tokens:
            ids = torch.cat([ids.new_full((n_samples, n_image_tokens), config.image_token_id), ids], dim=1)
        arguments["input_ids"] = ids
        arguments |= _labels_of_text(model, text, ids, takes)
        if "attention_mask" in takes and config.model_type in ("blip", DUAL):
            arguments["attention_mask"] = torch.ones_like(ids)
    elif "labels" in takes:
        arguments["labels"] = torch.zeros(n_samples, dtype=torch.int64)
    if config.model_type == "llava":
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    return Example(arguments, edge, length, n_image_tokens, step, _most_tokens(text) if has_text else None)


def _of_shape(model: PreTrainedModel, n_samples: int, spec: str) -> Example:
    shape = parse_shape(spec)
    one = FAMILIES[shape.family].batch(1, shape.size)
    arguments: dict[str, Any] = {
        name: torch.empty(n_samples, *x.shape[1:], dtype=x.dtype, device="meta")
        if x.is_floating_point()
        else x.repeat(n_samples, *(1,) * (x.ndim - 1))
        for name, x in one.items()
    }
    vision = getattr(model.config, "vision_config", None) or model.config
    is_image = "pixel_values" in arguments
    length = arguments["input_ids"].shape[1] if "input_ids" in arguments else None
    return Example(
        arguments, shape.size if is_image else None, length, step=_edge(vision, "patch_size") or 1 if is_image else 1
    )


def resized(spec: str, size: BatchSize) -> str:
    """Return the shape that has a batch of this size; other names of models unchanged.

    Raises:
        FastLNError: If the shape has a size of another kind.
    """
    if not is_shape(spec):
        return spec
    shape = parse_shape(spec)
    is_image = "pixel_values" in FAMILIES[shape.family].batch(1, 32)
    own, other = (size.image_size, size.text_length) if is_image else (size.text_length, size.image_size)
    if other is not None:
        right, wrong = ("--image-size", "--text-length") if is_image else ("--text-length", "--image-size")
        raise FastLNError(f"shape {spec!r}: {wrong} does not fit it; its size is {right}")
    return f"{shape.family}:{size.n_samples or shape.batch_size}x{own or shape.size}:{shape.n_layers}"


def _image(model: PreTrainedModel, vision: PreTrainedConfig, size: BatchSize) -> tuple[int, int, dict[str, Any]]:
    """Return the edge of images, the step of such edges, and what else the model must be told."""
    own, step = _edge(vision, "image_size"), _edge(vision, "patch_size") or 1
    edge = size.image_size or own
    if edge is None:
        raise FastLNError(f"{type(model).__name__}: its configuration says no image size; give --image-size")
    check_size_for(vision, size.image_size)
    if edge == own:
        return edge, step, {}
    if model.config.model_type == "llava":
        raise FastLNError(
            f"image size {edge}: {type(model).__name__} reads only images of {own} x {own} pixels; leave --image-size "
            "out"
        )
    part = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is vision), model)
    if part is not model:
        check_reads(part, edge)
    return edge, step, dict(position_arguments(model if part is model else part, edge))


def _edge(config: PreTrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return max(value) if isinstance(value, list | tuple) else value


def _most_tokens(text: PreTrainedConfig) -> int | None:
    names = ("max_position_embeddings", "n_positions")
    most = next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
    # RoBERTa's positions begin after the number of its padding.
    return most - 2 if most is not None and text.model_type in ("roberta", "xlm-roberta", "camembert") else most


def _length(model: PreTrainedModel, text: PreTrainedConfig, size: BatchSize, n_image_tokens: int) -> int:
    most = _most_tokens(text)
    usual = CHAT_TOKENS if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__ else OTHER_TOKENS
    if model.config.model_type == "blip":
        usual = QUESTION_TOKENS
    length = size.text_length or (usual if most is None else min(usual, most - n_image_tokens))
    if most is not None and length + n_image_tokens > most:
        raise FastLNError(
            f"text length {length}: {type(model).__name__} has positions for {most} tokens"
            + (f", of which an image takes {n_image_tokens}" if n_image_tokens else "")
        )
    return length


def _ids(text: PreTrainedConfig, n_samples: int, length: int) -> Tensor:
    vocabulary = getattr(text, "vocab_size", None) or _FIRST_ID + 1
    return torch.full((n_samples, length), min(_FIRST_ID, vocabulary - 1))


def _labels_of_text(model: PreTrainedModel, text: PreTrainedConfig, ids: Tensor, takes: Any) -> dict[str, Any]:
    name = type(model).__name__
    if model.config.model_type == "blip" and "decoder_input_ids" in takes:
        answers = _ids(text, len(ids), ANSWER_TOKENS)
        return {"decoder_input_ids": answers, "labels": answers}
    if "labels" not in takes:
        return {"return_loss": True} if "return_loss" in takes else {}
    if getattr(model.config, "is_encoder_decoder", False) and "Classification" not in name:
        return {"labels": _ids(text, len(ids), ANSWER_TOKENS)}
    if "SequenceClassification" in name or model.config.model_type == DUAL:
        return {"labels": torch.zeros(len(ids), dtype=torch.int64)}
    place = torch.arange(ids.shape[1])
    if "TokenClassification" in name:
        return {"labels": torch.zeros_like(ids)}
    labelled = place % 20 < 3 if "Masked" in name or "PreTraining" in name else place >= ids.shape[1] - ANSWER_TOKENS
    return {"labels": torch.where(labelled, ids, IGNORE_INDEX)}
