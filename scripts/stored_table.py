"""Measure what a layer stores for backward when only norms train: stock against fastln, one row per family.

    python scripts/stored_table.py            # writes benchmarks/results/stored.json and prints the table

*Measured* as autograd's saved tensors (without parameters) in bfloat16, on models with random weights. A layer's figure
is half the difference between the bytes that 4 and 2 layers store, so that embeddings, heads and losses cancel. A unit
is one bfloat16 tensor of the layer's width for each token. Dropout has the default of each family's configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastln
from fastln.bench.provenance import settle
from fastln.memory import SavedActivations
from fastln.methods import norm_parameters
from fastln.models.shapes import FAMILIES, Family, vision_family

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "stored.json"
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
# Only BLIP's vision encoder, because the whole model has several kinds of layers.
ROWS = FAMILIES | {"BlipVisionModel": vision_family("BlipVisionModel", 16, 1)}


def stored(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the bytes that the forward pass of a model stores for backward."""
    with SavedActivations(model) as saved:
        outputs = model(**inputs)
    assert outputs[0].requires_grad
    return saved.bytes


def per_layer(family: Family, size: int, prepare: Callable[[nn.Module], nn.Module]) -> float:
    """Return the units that one layer stores, for samples of a given size."""
    inputs = family.batch(BATCH, size)
    inputs = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    few, many = (stored(prepare(family.make(size, n_layers).bfloat16().train()), dict(inputs)) for n_layers in (2, 4))
    return (many - few) / 2 / (2 * BATCH * family.n_tokens(size) * family.width)


def unfrozen_norms(model: nn.Module) -> nn.Module:
    """Unfreeze only the norms, with stock code."""
    trained = set(norm_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def measure() -> Iterator[dict[str, Any]]:
    """Yield a row for each family: its name, its input, and the units that a layer stores."""
    for name, size in SIZES.items():
        stock, ours = (per_layer(ROWS[name], size, prepare) for prepare in (unfrozen_norms, fastln.prepare))
        shape = f"{size}²" if "pixel_values" in ROWS[name].batch(1, size) else f"{size} tokens"
        yield {"model": name, "input": shape, "stock": stock, "fastln": ours}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Render the rows in Markdown."""
    lines = ["| model | stock | fastln | stock / fastln |", "|---|---:|---:|---:|"]
    for row in rows:
        stock, ours = row["stock"], row["fastln"]
        lines.append(f"| {row['model']}, {row['input']} | {stock:.1f} | {ours:.1f} | {stock / ours:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the rows")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = list(measure())
    report = {"provenance": settle("cpu", "bfloat16")[2] | {"argv": sys.argv}, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
