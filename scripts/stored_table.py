"""What a layer stores for backward while norms alone train: stock against fastln, one row for each family.

    python scripts/stored_table.py

*Measured* by autograd's saved tensors (parameters excluded) in bfloat16, on models with random weights: what 4 layers
store less what 2 layers do, halved, so that embeddings, heads and losses are not in it. A unit is one bfloat16 tensor
of a layer's width for each token. Dropout is as each family's configuration has it by default.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastln
from fastln.bench.accounting import SavedActivations
from fastln.methods import norm_parameters

VOCABULARY = 1000
BATCH = 2
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
WIDE = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16, "num_key_value_heads": 16}
TEXT = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 514,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: As the table has it.
        make: From a number of layers to a model.
        inputs: What the model takes.
        n_tokens: Of one sample.
        width: Of a layer.
    """

    name: str
    make: Callable[[int], nn.Module]
    inputs: dict[str, Tensor]
    n_tokens: int
    width: int


def _text(n_tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (BATCH, n_tokens))
    return {"input_ids": ids, "labels": torch.where(torch.arange(n_tokens) < n_tokens - 8, -100, ids)}


def _text_family(model: str, n_tokens: int, sizes: dict[str, Any], layers: str = "num_hidden_layers") -> Family:
    def make(n_layers: int) -> nn.Module:
        config = getattr(transformers, f"{model.split('For')[0].removesuffix('LMHeadModel')}Config")
        return getattr(transformers, model)(config(**sizes, **TEXT, **{layers: n_layers}))

    width = sizes.get("hidden_size") or sizes["n_embd"]
    return Family(f"{model}, {n_tokens} tokens", make, _text(n_tokens), n_tokens, width)


def _vision_family(model: str, size: int, patch: int, extra_tokens: int, **sizes: Any) -> Family:
    def make(n_layers: int) -> nn.Module:
        config = getattr(transformers, f"{model.removesuffix('Model')}Config")
        settings = {"image_size": size, "patch_size": patch, "num_hidden_layers": n_layers, **BASE, **sizes}
        return getattr(transformers, model)(config(**settings))

    pixels = torch.randn(BATCH, 3, size, size, dtype=torch.bfloat16)
    n_tokens = (size // patch) ** 2 + extra_tokens
    return Family(f"{model}, {size}²", make, {"pixel_values": pixels}, n_tokens, sizes.get("hidden_size", 768))


def families() -> list[Family]:
    """All rows."""
    gpt2 = {"n_embd": 768, "n_head": 12, "n_positions": 514}
    opt = {"hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "word_embed_proj_dim": 768}
    return [
        _text_family("BertForMaskedLM", 128, BASE),
        _text_family("RobertaForMaskedLM", 128, BASE),
        _vision_family("ViTModel", 224, 16, 1),
        _vision_family("DeiTModel", 224, 16, 2),
        _vision_family("Dinov2Model", 224, 14, 1),
        _vision_family("CLIPVisionModel", 224, 16, 1),
        _vision_family("SiglipVisionModel", 224, 16, 0),
        _vision_family("BlipVisionModel", 480, 16, 1),
        _text_family("GPT2LMHeadModel", 128, gpt2, "n_layer"),
        _text_family("OPTForCausalLM", 128, opt),
        _text_family("LlamaForCausalLM", 256, WIDE),
        _text_family("MistralForCausalLM", 256, WIDE),
        _text_family("Qwen2ForCausalLM", 256, WIDE),
        _text_family("GemmaForCausalLM", 256, WIDE | {"head_dim": 64}),
    ]


def stored(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that the forward pass of a model stores for backward."""
    with SavedActivations(model) as saved:
        outputs = model(**inputs)
    assert outputs[0].requires_grad
    return saved.bytes


def per_layer(family: Family, prepare: Callable[[nn.Module], nn.Module]) -> float:
    """Units that a layer stores."""
    few, many = (
        stored(prepare(family.make(n_layers).bfloat16().train()), copy.copy(family.inputs)) for n_layers in (2, 4)
    )
    return (many - few) / 2 / (2 * BATCH * family.n_tokens * family.width)


def unfrozen_norms(model: nn.Module) -> nn.Module:
    """Train norms the stock way."""
    trained = set(norm_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print("| model | stock | fastln | stock / fastln |\n|---|---:|---:|---:|")
    for family in families():
        stock, ours = per_layer(family, unfrozen_norms), per_layer(family, fastln.prepare)
        print(f"| {family.name} | {stock:.1f} | {ours:.1f} | {stock / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
