"""Models and data small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, BertConfig, BlipConfig, ViTConfig, ViTImageProcessorPil

from fastln.data import Sample, VQADataset, load_dataset
from fastln.models import VQATask, load_task
from fastln.models.tokens import word_tokenizer

WIDTH = 32
SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Twice(torch.autograd.Function):
    """Its arguments pass `__torch_function__` by."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def phantom(n_questions: int = 48) -> VQADataset:
    data = load_dataset("phantom", "train")
    data.samples = data.samples[:n_questions]
    return data


def towers(folder: Path, samples: list[Sample]) -> None:
    """Write a tiny ViT and a tiny BERT with its tokenizer to `folder`/vision and /text, as a user would have them."""
    torch.manual_seed(0)
    vision, text = folder / "vision", folder / "text"
    AutoModel.from_config(ViTConfig(**SIZES, image_size=32, patch_size=8)).save_pretrained(vision)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(vision)
    bert = BertConfig(**SIZES, vocab_size=128, max_position_embeddings=64, hidden_dropout_prob=0.0)
    bert.attention_probs_dropout_prob = 0.0
    AutoModel.from_config(bert).save_pretrained(text)
    word_tokenizer((sample.question for sample in samples), 128).save_pretrained(text)


def dual_spec(folder: Path) -> str:
    """Write tiny encoders for the phantom to `folder`, and return what names them as a model."""
    towers(folder, phantom().samples)
    return f"dual:{folder / 'vision'},{folder / 'text'}"


def dual(folder: Path, data: VQADataset, dtype: torch.dtype = torch.float32, seed: int = 0) -> VQATask:
    vision, text = folder / "vision", folder / "text"
    if not vision.exists():
        towers(folder, data.samples)
    task = load_task(f"dual:{vision},{text}", data, dtype=dtype, seed=seed)
    task.model.fusion_head.dropout.p = 0.0
    return task


def blip_config() -> BlipConfig:
    return BlipConfig(
        vision_config={**SIZES, "image_size": 32, "patch_size": 8, "initializer_range": 0.02},
        text_config={
            **SIZES,
            "vocab_size": 160,
            "max_position_embeddings": 64,
            "bos_token_id": 158,
            "sep_token_id": 102,
            "eos_token_id": 102,
        },
    )


def blip(folder: Path, data: VQADataset, dtype: torch.dtype = torch.float32, seed: int = 0) -> VQATask:
    folder.mkdir(exist_ok=True)
    blip_config().to_json_file(folder / "tiny.json")
    return load_task(f"blip:{folder / 'tiny.json'}", data, dtype=dtype, seed=seed)


TASKS = {"dual": dual, "blip": blip}
