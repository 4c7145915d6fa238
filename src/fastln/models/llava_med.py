"""Loads LLaVA-Med's own checkpoints (model type `llava_mistral`) as transformers' LLaVA, with the same results.

Their code is not part of transformers, and stores the same layers under other names: a CLIP vision tower, a projector
of two linear layers, a Mistral language model. Prompts and images are made as its authors train and evaluate it:
https://github.com/microsoft/LLaVA-Med, release 1.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastln.errors import FastLNError
from fastln.models.images import ImagePixels
from fastln.models.sources import load_tokenizer, refuse_missing

MODEL_TYPE = "llava_mistral"

IMAGE_TOKEN = "<image>"
TEMPLATE = (
    "{% set before = namespace(text='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set before.text = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + before.text + message['content'] + ' [/INST] ' }}"
    "{% set before.text = '' %}"
    "{% else %}{{ message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""The form of the conversations that it was trained on (`mistral_instruct`)."""

_KNOWN_TOWER = "clip-vit-large-patch14-336"  # the default of LlavaConfig, so that nothing is downloaded
_NAMES = {
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(?=embed_tokens|layers|norm)": "model.language_model.",
}
# Settings of LLaVA's code that transformers' model lacks, with the values that it assumes.
_ONLY = {"mm_projector_type": ("mlp2x_gelu",), "mm_use_im_start_end": (False, None)}


def is_llava_med(source: str) -> bool:
    """Whether a directory or hub name holds a checkpoint in LLaVA-Med's own form."""
    return PreTrainedConfig.get_config_dict(source)[0].get("model_type") == MODEL_TYPE


def load(
    source: str, dtype: torch.dtype | str
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase, ImagePixels]:
    """Load a checkpoint as the model, tokenizer and image preprocessing of transformers' LLaVA.

    The tokenizer gets an image token, which is new to the model. Its rows in the word embeddings and the head are the
    means of all others, so that it is never the most likely.

    Args:
        source: a directory or hub name, with the weights as safetensors.
        dtype: dtype of the parameters; "auto" for the checkpoint's. Pixel values have the model's dtype.

    Raises:
        FastLNError: if the checkpoint lacks weights, or has a part that transformers' LLaVA lacks.
    """
    found, _ = PreTrainedConfig.get_config_dict(source)
    for name, values in _ONLY.items():
        if found.get(name) not in values:
            raise FastLNError(f"{source}: {name} is {found.get(name)!r}; transformers' LLaVA takes only {values[0]!r}")
    model, report = LlavaForConditionalGeneration.from_pretrained(
        source,
        config=_config(source, found),
        dtype=dtype,
        key_mapping=_NAMES,
        use_safetensors=True,
        output_loading_info=True,
    )
    refuse_missing(source, "LLaVA-Med", report["missing_keys"])
    vars(model).pop("_weight_conversions", None)  # otherwise save_pretrained would restore the original names
    tokenizer = load_tokenizer(source, model.config)
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = min(tokenizer.model_max_length, found.get("tokenizer_model_max_length") or 2048)
    _add_image_token(model, tokenizer)
    processor = LlavaImageProcessorPil(do_pad=found.get("image_aspect_ratio") == "pad")
    return model, tokenizer, ImagePixels(processor, model.config.vision_config.image_size, model.dtype)


def _config(source: str, found: dict[str, Any]) -> LlavaConfig:
    tower = found.get("mm_vision_tower") or ""
    vision = None if Path(tower).name == _KNOWN_TOWER else CLIPVisionConfig.from_pretrained(tower)
    own = {*MistralConfig().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures"}
    return LlavaConfig(
        vision_config=vision,
        text_config=MistralConfig.from_dict({name: value for name, value in found.items() if name in own}),
        vision_feature_layer=found.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default"
        if found.get("mm_vision_select_feature", "patch") == "patch"
        else "full",
    )


def _add_image_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    number = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    before = model.config.text_config.vocab_size
    if number >= before:
        model.resize_token_embeddings(number + 1, mean_resizing=False)
        for rows in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
            rows[before:] = rows[:before].float().mean(dim=0)
    model.config.image_token_id = number
