"""Triton's kernels, interpreted, round the rows that they make for layers in 8 bits; no bit changes."""

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import fastln
from fastln import ops
from fastln.ops import rounded
from fastln.ops.rounded import Reader
from fastln_kernels import int8, launch

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(8).view(1, 8)
MODELS = {
    "bert": (lambda: BertModel(BertConfig(**SIZES, vocab_size=64), add_pooling_layer=False), {"input_ids": IDS}),
    "vit": (
        lambda: ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False),
        {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
    ),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, num_key_value_heads=2)),
        {"input_ids": IDS, "labels": IDS},
    ),
}
# Passes over inputs and over gradients in one step: in the first, whose backward already knows who takes its gradients,
# from the second on, and where the layers do it all. What is left: results of attention and its gradients, also
# past rotary positions, sums with the residual, and embeddings with dropout.
PASSES = {
    "bert": ((4, 3), (2, 3), (4, 6)),
    "vit": ((4, 5), (1, 5), (4, 6)),
    "llama": ((4, 5), (1, 5), (4, 7)),
}


@pytest.fixture
def passes(monkeypatch):
    """Count the passes over rows, for their inputs or gradients: a layer's own, or one after a kernel."""
    counts = [0, 0]
    quantise = int8.quantise

    def counted(x, factors=None, **options):
        counts[factors is not None] += 1
        return quantise(x, factors, **options)

    monkeypatch.setattr(int8, "quantise", counted)
    return counts


def step(passes, model, inputs):
    model.zero_grad()
    torch.manual_seed(0)
    passes[:] = 0, 0
    outputs = model(**inputs)
    loss = outputs.loss if "loss" in outputs else outputs.last_hidden_state.square().mean()
    loss.backward()
    return tuple(passes), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.slow(take=1)
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_rounded_where_they_are_made(name, passes, monkeypatch):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    model = fastln.prepare(model, products="int8", backend="triton", without=("late_rows",)).train()
    found = []
    for fuses in (True, True, False):
        monkeypatch.setattr(rounded, "_fuses", fuses)
        found.append(step(passes, model, inputs))
    assert tuple(counts for counts, _ in found) == PASSES[name]
    apart = found[-1][1]
    assert apart
    for _, gradients in found[:-1]:
        assert all(map(torch.equal, gradients, apart))
    assert not rounded._at_hand.gradients


@pytest.mark.parametrize("holds", [True, False], ids=["registers hold the rows", "rows too wide"])
def test_a_gated_activation_rounds_for_the_layers_on_both_sides(holds, passes, monkeypatch):
    if not holds:
        monkeypatch.setattr(launch, "activation_tile", lambda *_, **__: None)
    settings, reader = ops.OpSettings("triton"), Reader()
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (
        int8.quantise_weight(torch.randn(shape, generator=generator), turned=True)
        for shape in ((128, 64), (128, 64), (64, 128))
    )
    results = []
    for fuses in (True, True, False):
        monkeypatch.setattr(rounded, "_fuses", fuses)
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        passes[:] = 0, 0
        hidden = [ops.int8_linear(x, weight, settings=settings) for weight in (gate, up)]
        y = ops.int8_linear(
            ops.gated_activation(*hidden, "silu", settings=settings, reader=reader), down, settings=settings
        )
        y.square().sum().backward()
        results.append((tuple(passes), y.detach(), x.grad))
    # x and the gradient of y have passes of their own. Rows too wide have one for each result, after the kernel.
    assert [counts for counts, *_ in results] == ([(2, 1), (1, 1), (2, 3)] if holds else [(2, 3)] * 3)
    for _, y, dx in results[:-1]:
        assert torch.equal(y, results[-1][1])
        assert torch.equal(dx, results[-1][2])
