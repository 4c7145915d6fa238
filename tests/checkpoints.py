"""Tiny checkpoints on disk, as users have them, for tests of what a model's checkpoint lacks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ViTConfig,
    ViTForImageClassification,
)

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(**SIZES, vocab_size=64, max_position_embeddings=32)


def write(folder: Path, name: str) -> str:
    """Write the checkpoint of that name, unless it is there, and return its directory."""
    torch.manual_seed(0)
    if not (folder / name).exists():
        MODELS[name]().save_pretrained(folder / name)
    return str(folder / name)


MODELS = {
    "bert": lambda: BertModel(BERT),
    "bert without pooler": lambda: BertModel(BERT, add_pooling_layer=False),
    "vit of 3 classes": lambda: ViTForImageClassification(
        ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3)
    ),
    "llama without head": lambda: LlamaModel(LlamaConfig(**SIZES, vocab_size=64)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, tie_word_embeddings=True)),
}
