"""Models with 8-bit products: kernels round the rows that they make, from the second step on, and no bit changes."""

import copy
import gc

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

import fastln
from fastln import ops
from fastln.ops import rounded
from fastln.ops.rounded import MOST_UNREAD, Reader
from fastln_kernels.cpu import library, native_int8, products

WHY_NOT = products.why_not("int8") or library.why_not("activation") or library.why_not("norm")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
BART = {  # its layers call dropout as a function
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1),
    **dict.fromkeys(("dropout", "activation_dropout"), 0.1),
    **{"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "vocab_size": 64},
}
LLAMA = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2}
IDS = torch.arange(24).view(2, 12)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
MODELS = {
    "bert": (lambda: BertModel(BertConfig(**SIZES, vocab_size=64), add_pooling_layer=False), {"input_ids": IDS}),
    "vit": (
        lambda: ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8), add_pooling_layer=False),
        {"pixel_values": IMAGES},
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), {"input_ids": IDS, "labels": IDS}),
    "bart": (lambda: BartModel(BartConfig(**BART)), {"input_ids": IDS}),
}
# Passes that round the rows of one forward and one backward: where the layers do it all, and where the kernels help.
# The rest are sums with the residual, embeddings behind stock dropout, and the encoder's rows where the decoder reads
# them. Rotary positions round the gradients of queries and keys.
PASSES = {
    "bert": ((8, 12), (0, 0)),
    "vit": ((8, 12), (0, 4)),
    "llama": ((8, 14), (0, 4)),
    "bart": ((11, 16), (3, 0)),
}


@pytest.fixture
def passes(monkeypatch):
    """Count the passes over rows, for their inputs or gradients."""
    counts = [0, 0]
    quantise = native_int8.quantise

    def counted(x, factors=None, *, turned=False):
        counts[factors is not None] += len(x) > 0
        return quantise(x, factors, turned=turned)

    monkeypatch.setattr(native_int8, "quantise", counted)
    return counts


def prepared(name):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    return fastln.prepare(make().bfloat16(), products="int8", without=("late_rows",)).train(), inputs


def step(model, inputs, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(**inputs)
    loss = outputs.loss if "loss" in outputs else outputs.last_hidden_state.float().square().mul(IDS.numel()).mean()
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def counted_step(passes, *args):
    passes[:] = 0, 0
    gradients = step(*args)
    return tuple(passes), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_rounded_where_they_are_made(name, checkpointing, passes, monkeypatch):
    model, inputs = prepared(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
    step(model, inputs)
    with_kernels, gradients = counted_step(passes, model, inputs)
    monkeypatch.setattr(rounded, "_fuses", False)
    without, others = counted_step(passes, model, inputs)
    if not checkpointing:
        assert (without, with_kernels) == PASSES[name]
    assert sum(with_kernels) < sum(without)
    assert gradients
    assert all(map(torch.equal, gradients, others))
    assert not rounded._at_hand.gradients


def test_a_copy_of_a_model_learns_by_itself(passes):
    model, inputs = prepared("vit")
    step(model, inputs)
    copied = copy.deepcopy(model)
    first, gradients = counted_step(passes, copied, inputs)
    second, again = counted_step(passes, copied, inputs)
    assert (first, second) == ((8, 4), PASSES["vit"][1])
    assert all(map(torch.equal, gradients, again))


def test_evaluation_rounds_as_training_does(passes):
    model, inputs = prepared("vit")
    step(model, inputs)
    model.eval()
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            assert torch.equal(model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    with torch.no_grad():
        passes[0] = 0
        model(**inputs)
    assert passes[0] == 0


def layer(n_cols, n_inner, turned=False):
    weight = torch.randn(n_cols, n_inner, generator=torch.Generator().manual_seed(n_cols))
    return native_int8.quantise_weight(weight, turned=turned)


def activated(x, reader, more):
    """A layer, an activation and a layer; `more` does more with the first layer's result, the activation's and ours."""
    hidden = ops.int8_linear(x, layer(128, 64))
    y = ops.activation(hidden, "gelu", reader=reader)
    return more(hidden, y, lambda y: ops.int8_linear(y, layer(64, 128)))


CASES = {
    "plain": lambda hidden, y, next: next(y),
    "two read the activation's input": lambda hidden, y, next: next(y) + hidden[:, :64],
    "the same, the other way round": lambda hidden, y, next: hidden.square()[:, :64] + next(y),
    "the result is written to": lambda hidden, y, next: next(y.mul_(3)),
    "and after it was read": lambda hidden, y, next: next(y) + next(y.mul_(3)),
    "its gradient is changed": lambda hidden, y, next: (y.register_hook(lambda dy: 2 * dy), next(y))[1],
    "its input's gradient is written to": lambda hidden, y, next: (
        hidden.register_hook(lambda d: d.mul_(2)),
        next(y),
    )[1],
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_else_happens_the_bits_are_the_same(case, monkeypatch):
    reader, results = Reader(), []
    for fuses in (False, True, True):
        monkeypatch.setattr(rounded, "_fuses", fuses)
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = activated(x, reader, CASES[case])
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert (reader.form is None) == (case == "the result is written to")
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


def test_one_result_for_two_forms_is_rounded_for_the_first():
    reader, x = Reader(), torch.randn(20, 64, requires_grad=True)
    for _ in range(2 * MOST_UNREAD):
        y = ops.activation(x, "silu", reader=reader)
        a, b = (ops.int8_linear(y, layer(64, 64, turned)) for turned in (True, False))
        assert reader.form.turned
    plain = ops.activation(x, "silu")
    assert torch.equal(a, ops.int8_linear(plain, layer(64, 64, True)))
    assert torch.equal(b, ops.int8_linear(plain, layer(64, 64)))


def test_rows_that_nobody_takes_are_not_rounded_for_ever():
    reader, x = Reader(), torch.randn(20, 64, requires_grad=True)
    ops.int8_linear(ops.activation(x, "relu", reader=reader), layer(64, 64))
    for _ in range(MOST_UNREAD):
        y = ops.activation(x, "relu", reader=reader)
        assert rounded._at_hand.inputs
    ops.activation(x, "relu", reader=reader)
    assert reader.form is None
    del y
    gc.collect()
    assert not rounded._at_hand.inputs  # they live no longer than their tensor
