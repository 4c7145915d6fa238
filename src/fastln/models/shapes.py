"""Models of usual sizes with random weights, each with a random batch of a chosen shape: for timing, not learning.

A shape is written CLASS:BATCHxSIZE, for example `BertForMaskedLM:8x128` (sequences of 128 tokens) or
`ViTForImageClassification:8x224` (images of 224² pixels); CLASS:BATCHxSIZE:LAYERS sets the number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from fastln.errors import FastLNError
from fastln.models.task import Task
from fastln.ops.linear_cross_entropy import IGNORE_INDEX

QUESTION_TOKENS = 16  # of BLIP-VQA
ANSWER_TOKENS = 8  # of a causal language model, whose other tokens carry no label, and of BLIP-VQA

_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
_GPT2 = {"n_embd": 768, "n_head": 12, "n_positions": 1024}
_OPT = {"hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "word_embed_proj_dim": 768}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = re.compile(r"(?P<family>\w+):(?P<batch_size>[1-9]\d*)x(?P<size>[1-9]\d*)(:(?P<n_layers>[1-9]\d*))?")


@dataclass(frozen=True)
class Family:
    """Models of one class and width.

    Attributes:
        n_layers: the usual depth.
        width: width of a layer.
        n_tokens: gives the number of tokens of a sample from its size.
        make: makes a model from the size of a sample and a number of layers.
        batch: makes the model's arguments, labels included, from a number of samples and their size.
    """

    n_layers: int
    width: int
    n_tokens: Callable[[int], int]
    make: Callable[[int, int], PreTrainedModel]
    batch: Callable[[int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Shape:
    """The specification of a model and a batch for it, as `parse_shape` reads it."""

    family: str
    batch_size: int
    size: int
    n_layers: int


class ShapeTask(Task):
    """A model with random weights.

    Attributes:
        batch: its arguments, the same for every step.
    """

    def __init__(self, model: PreTrainedModel, batch: dict[str, Tensor], *, name: str) -> None:
        super().__init__(model, name=name)
        self.batch = batch

    @property
    def random_weights(self) -> bool:
        """Always."""
        return True


def _config(model: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, re.sub(r"(For\w+|LMHeadModel|Model)$", "Config", model))(**settings)


def text_family(
    model: str, sizes: dict[str, Any], vocabulary: int, n_layers: int, *, masked: bool = False, depth: str = ""
) -> Family:
    """Language models: 15% of the tokens have labels if `masked`, else the last `ANSWER_TOKENS`.

    Args:
        model: transformers' class.
        sizes: arguments of its configuration.
        vocabulary: size of its vocabulary.
        n_layers: the usual depth.
        masked: whether it fills in masked tokens.
        depth: the configuration's name for the number of layers, if it is not the usual one.
    """
    depth = depth or "num_hidden_layers"

    def make(n_tokens: int, layers: int) -> PreTrainedModel:
        positions = {} if "n_positions" in sizes else {"max_position_embeddings": max(512, n_tokens) + 2}
        settings = {"vocab_size": vocabulary, depth: layers, **positions, **_SPECIAL, **sizes}
        return getattr(transformers, model)(_config(model, settings))

    def batch(n: int, n_tokens: int) -> dict[str, Tensor]:
        ids = torch.randint(3, vocabulary, (n, n_tokens))
        place = torch.arange(n_tokens)
        labelled = place % 20 < 3 if masked else place >= n_tokens - ANSWER_TOKENS
        return {"input_ids": ids, "labels": torch.where(labelled, ids, IGNORE_INDEX)}

    return Family(n_layers, sizes.get("hidden_size") or sizes["n_embd"], lambda n_tokens: n_tokens, make, batch)


def vision_family(model: str, patch: int, extra_tokens: int) -> Family:
    """Vision encoders of ViT-Base's size, with a classifier if their class has one.

    Args:
        model: transformers' class.
        patch: edge of a patch, in pixels.
        extra_tokens: number of tokens besides the patches.
    """

    def make(edge: int, layers: int) -> PreTrainedModel:
        settings: dict[str, Any] = {"image_size": edge, "patch_size": patch, "num_hidden_layers": layers, **_BASE}
        kind = model.removesuffix("ForImageClassification")
        if kind != model and hasattr(transformers, f"{kind}VisionConfig"):  # one half of a model of images and texts
            settings = {"vision_config": settings}
        return getattr(transformers, model)(_config(model, settings))

    def batch(n: int, edge: int) -> dict[str, Tensor]:
        images = {"pixel_values": torch.randn(n, 3, edge, edge)}
        return images | ({"labels": torch.arange(n) % 2} if "Classification" in model else {})

    return Family(12, 768, lambda edge: (edge // patch) ** 2 + extra_tokens, make, batch)


def _blip_vqa() -> Family:
    """BLIP-VQA: ViT-Base, and BERT-Base as encoder of the question and as decoder of the answer."""

    def make(edge: int, layers: int) -> PreTrainedModel:
        config = transformers.BlipConfig(
            vision_config={"image_size": edge, "num_hidden_layers": layers}, text_config={"num_hidden_layers": layers}
        )
        return transformers.BlipForQuestionAnswering(config)

    def batch(n: int, edge: int) -> dict[str, Tensor]:
        question, answer = torch.randint(3, 30522, (n, QUESTION_TOKENS)), torch.randint(3, 30522, (n, ANSWER_TOKENS))
        return {
            "pixel_values": torch.randn(n, 3, edge, edge),
            "input_ids": question,
            "attention_mask": torch.ones_like(question),
            "decoder_input_ids": answer,
            "labels": answer,
        }

    return Family(12, 768, lambda edge: (edge // 16) ** 2 + 1, make, batch)


FAMILIES: dict[str, Family] = {
    "BertForMaskedLM": text_family("BertForMaskedLM", _BASE, 30522, 12, masked=True),
    "RobertaForMaskedLM": text_family("RobertaForMaskedLM", _BASE, 50265, 12, masked=True),
    "ViTForImageClassification": vision_family("ViTForImageClassification", 16, 1),
    "DeiTForImageClassification": vision_family("DeiTForImageClassification", 16, 2),
    "Dinov2ForImageClassification": vision_family("Dinov2ForImageClassification", 14, 1),
    "CLIPForImageClassification": vision_family("CLIPForImageClassification", 16, 1),
    "SiglipForImageClassification": vision_family("SiglipForImageClassification", 16, 0),
    "BlipForQuestionAnswering": _blip_vqa(),
    "GPT2LMHeadModel": text_family("GPT2LMHeadModel", _GPT2, 50257, 12, depth="n_layer"),
    "OPTForCausalLM": text_family("OPTForCausalLM", _OPT, 50272, 12),
    "LlamaForCausalLM": text_family("LlamaForCausalLM", _WIDE, 32000, 8),
    "MistralForCausalLM": text_family("MistralForCausalLM", _WIDE, 32000, 8),
    "Qwen2ForCausalLM": text_family("Qwen2ForCausalLM", _WIDE, 32000, 8),
    "GemmaForCausalLM": text_family("GemmaForCausalLM", _WIDE | {"head_dim": 64}, 32000, 8),
}
"""Encoders have BERT-Base's and ViT-Base's sizes. Models with gated MLPs have 8 layers of width 1,024, whatever their
published sizes."""


def is_shape(spec: str) -> bool:
    """Whether `spec` has the form of a shape."""
    return spec.partition(":")[0] in FAMILIES or bool(_SHAPE.fullmatch(spec))


def parse_shape(spec: str) -> Shape:
    """Read a shape's specification.

    Raises:
        FastLNError: if it is malformed, or there is no family for its class.
    """
    found = _SHAPE.fullmatch(spec)
    if not found:
        raise FastLNError(f"shape {spec!r}: not of the form CLASS:BATCHxSIZE or CLASS:BATCHxSIZE:LAYERS")
    name = found["family"]
    if name not in FAMILIES:
        near = get_close_matches(name, FAMILIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FastLNError(f"shape {spec!r}: there is no {name!r}{hint}; valid classes: {', '.join(FAMILIES)}")
    n_layers = int(found["n_layers"] or FAMILIES[name].n_layers)
    return Shape(name, int(found["batch_size"]), int(found["size"]), n_layers)


def make_shape(
    spec: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> ShapeTask:
    """Make the model and the batch that `spec` describes.

    Args:
        spec: CLASS:BATCHxSIZE or CLASS:BATCHxSIZE:LAYERS.
        dtype: dtype of parameters and pixel values.
        seed: seed for weights and batch.
        device: device of both.

    Raises:
        FastLNError: as in `parse_shape`.
    """
    shape = parse_shape(spec)
    family = FAMILIES[shape.family]
    torch.manual_seed(seed)
    model = family.make(shape.size, shape.n_layers).to(device, dtype)
    batch = family.batch(shape.batch_size, shape.size)
    batch = {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in batch.items()}
    return ShapeTask(model, batch, name=spec)
