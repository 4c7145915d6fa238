"""What a layer stores for backward while norms alone train: stock against fastln, one row for each family.

    python scripts/stored_table.py

*Measured* by autograd's saved tensors (parameters excluded) in bfloat16, on models with random weights: what 4 layers
store less what 2 layers do, halved, so that embeddings, heads and losses are not in it. A unit is one bfloat16 tensor
of a layer's width for each token. Dropout is as each family's configuration has it by default.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastln
from fastln.memory import SavedActivations
from fastln.methods import norm_parameters
from fastln.models.shapes import FAMILIES, Family, vision_family

BATCH = 2
SIZES = {
    "BertForMaskedLM": 128,
    "RobertaForMaskedLM": 128,
    "ViTForImageClassification": 224,
    "DeiTForImageClassification": 224,
    "Dinov2ForImageClassification": 224,
    "CLIPForImageClassification": 224,
    "SiglipForImageClassification": 224,
    "BlipVisionModel": 480,
    "GPT2LMHeadModel": 128,
    "OPTForCausalLM": 128,
    "LlamaForCausalLM": 256,
    "MistralForCausalLM": 256,
    "Qwen2ForCausalLM": 256,
    "GemmaForCausalLM": 256,
}
# BLIP's vision encoder alone: of the whole model no one layer could be told.
ROWS = FAMILIES | {"BlipVisionModel": vision_family("BlipVisionModel", 16, 1)}


def stored(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that the forward pass of a model stores for backward."""
    with SavedActivations(model) as saved:
        outputs = model(**inputs)
    assert outputs[0].requires_grad
    return saved.bytes


def per_layer(family: Family, size: int, prepare: Callable[[nn.Module], nn.Module]) -> float:
    """Units that a layer stores, of samples of one size."""
    inputs = family.batch(BATCH, size)
    inputs = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    few, many = (stored(prepare(family.make(size, n_layers).bfloat16().train()), dict(inputs)) for n_layers in (2, 4))
    return (many - few) / 2 / (2 * BATCH * family.n_tokens(size) * family.width)


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
    for name, size in SIZES.items():
        stock, ours = (per_layer(ROWS[name], size, prepare) for prepare in (unfrozen_norms, fastln.prepare))
        shape = f"{size}²" if "pixel_values" in ROWS[name].batch(1, size) else f"{size} tokens"
        print(f"| {name}, {shape} | {stock:.1f} | {ours:.1f} | {stock / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
