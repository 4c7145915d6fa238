"""How conversational models of each family read images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
)

from fastln.errors import FastLNError
from fastln.models.image_size import check_size
from fastln.models.images import ImageInputs, ImagePixels


@dataclass(frozen=True)
class ChatVision:
    """How the models of a family read images.

    Attributes:
        placeholder: an image's place in a text, with its token.
        tokens: the special tokens of a tokenizer made for a bare configuration, by the configuration's field.
        images: makes the image reader from a source (None for a bare configuration), the configuration and a dtype.
        set_size: sets the image reader's size, or raises if the configuration forbids it.
        n_tokens: the number of tokens of an image, from the configuration and the shape of its `pixel_values`.
        marks_tokens: whether the model must be told which tokens are an image's (`mm_token_type_ids`).
        processor: makes transformers' processor from the configuration, the image reader and the tokenizer, if it is
            more than the two together and must be saved.
    """

    placeholder: str
    tokens: Mapping[str, str]
    images: Callable[[str | None, PreTrainedConfig, torch.dtype], ImageInputs]
    set_size: Callable[[ImageInputs, PreTrainedConfig, int], None]
    n_tokens: Callable[[PreTrainedConfig, torch.Size], int]
    marks_tokens: bool = False
    processor: Callable[[PreTrainedConfig, ImageInputs, PreTrainedTokenizerBase], ProcessorMixin] | None = None


def _llava_images(source: str | None, config: PreTrainedConfig, dtype: torch.dtype) -> ImageInputs:
    edge = config.vision_config.image_size
    if source is None:
        return ImagePixels(CLIPImageProcessorPil(), edge, dtype)
    return ImagePixels.of_source(source, config.vision_config, dtype, edge)


def _llava_size(images: ImageInputs, config: PreTrainedConfig, image_size: int) -> None:
    edge = config.vision_config.image_size
    if image_size != edge:
        raise FastLNError(
            f"image size {image_size}: this LLaVA reads only images of {edge} x {edge} pixels, whose patches give as "
            "many tokens as its language model expects; leave the image size out"
        )


def _llava_tokens(config: PreTrainedConfig, shape: torch.Size) -> int:
    # One per row of the tower's output, perhaps without the class token; a tower without weights gives the shape.
    with torch.device("meta"):
        tower = AutoModel.from_config(copy.deepcopy(config.vision_config))
        rows = tower(torch.empty(shape)).last_hidden_state.shape[1]
    return rows - (config.vision_feature_select_strategy == "default")


def llava_processor(
    config: PreTrainedConfig, images: ImageInputs, tokenizer: PreTrainedTokenizerBase
) -> ProcessorMixin:
    """Return transformers' processor of a LLaVA, which knows how many tokens an image takes."""
    assert isinstance(images, ImagePixels)
    edge, patch, strategy = images.image_size, config.vision_config.patch_size, config.vision_feature_select_strategy
    n_tokens = _llava_tokens(config, images.shape())
    return LlavaProcessor(
        images.processor,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=n_tokens - (edge // patch) ** 2 + (strategy == "default"),
        chat_template=tokenizer.chat_template,
        image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
    )


def _qwen_images(source: str | None, config: PreTrainedConfig, dtype: torch.dtype) -> ImageInputs:
    vision = config.vision_config
    if source is not None:
        return ImageInputs(AutoImageProcessor.from_pretrained(source), dtype)
    sizes = {name: getattr(vision, name) for name in ("patch_size", "temporal_patch_size")}
    return ImageInputs(Qwen2VLImageProcessorPil(**sizes, merge_size=vision.spatial_merge_size), dtype)


def _qwen_size(images: ImageInputs, config: PreTrainedConfig, image_size: int) -> None:
    check_size(image_size, config.vision_config.patch_size * config.vision_config.spatial_merge_size)
    # The processor's names for the least and the most pixels of an image.
    least, most = min(images.processor.size["shortest_edge"], image_size**2), image_size**2
    images.processor.size = {"shortest_edge": least, "longest_edge": most}


def _qwen_tokens(config: PreTrainedConfig, shape: torch.Size) -> int:
    return shape[0] // config.vision_config.spatial_merge_size**2


CHAT_VISION = {
    "llava": ChatVision(
        "{image}", {"image_token_id": "<image>"}, _llava_images, _llava_size, _llava_tokens, processor=llava_processor
    ),
    "qwen2_5_vl": ChatVision(
        "<|vision_start|>{image}<|vision_end|>",
        {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        _qwen_images,
        _qwen_size,
        _qwen_tokens,
        marks_tokens=True,
    ),
}
"""The families, by the configuration's model_type."""
