"""The last block of whole models: what is computed of it, where that waits, and where stock code runs instead."""

import copy
import itertools

import pytest
import torch
import transformers
from family_models import MODELS, VISION_MODELS, batch, cut_dropout, make
from tiny import blip_config
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastln
from fastln.families.last_block import last_blocks
from fastln.late.rows import LazyRows
from fastln.late.when import may_be_late
from fastln.memory import SavedActivations
from fastln.methods import norm_parameters

# Rows of which something is read, where that is not every row with a label. Those of towers whose every token goes on
# are computed whole, beside.
READ = {name: {4} for name in MODELS} | {"vit": {2}, "deit": {2}, "clip": {2}}
READ |= {
    "bert, two losses": {2, 4, 24},  # the pooler has the first tokens, and then all are there
    "gpt2, two heads": {2, 4, 24},  # those with a label are picked from all, which are there
    "t5": {4, 24},
    "blip": {2, 4, 24, 34},
    "qwen2.5-vl": {4, 8},
    "dinov2": {2, 34},
    "dinov2, swiglu": {2, 34},
    "siglip": {2, 32},
    "llava": {2, 4},  # of its vision tower's last layer nobody reads more than the pooler
}


def step(model, inputs):
    """Return the loss and the gradients."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Square(torch.autograd.Function):
    """Its argument passes `__torch_function__` by."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.detach())
        return x.square()

    @staticmethod
    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0] * dy


@pytest.mark.slow(take=10)
@pytest.mark.parametrize("name", [*MODELS, *VISION_MODELS])
def test_what_is_read_is_computed(name, computed_rows):
    step(fastln.prepare(make(name)), batch(name))
    assert set(computed_rows) == READ[name]


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_less_is_stored(name):
    model, inputs = make(name), batch(name)
    stored = []
    for waits in (False, True):
        prepared = fastln.prepare(copy.deepcopy(model))
        if not waits:
            last_block(prepared).register_forward_hook(lambda *_: None)
        with SavedActivations(prepared) as saved:
            prepared(**inputs)
        stored.append(saved.bytes)
    n_tokens = 34 if name == "vit" else 24
    hidden = n_tokens * 64 * 4  # of an activation's input in float32; a gated one keeps two
    assert stored[0] - stored[1] > 0.7 * hidden


def peak_bytes(model, inputs):
    """The most that a step, after one to warm up, has allocated at once, from where it begins."""

    def step():
        model(**inputs).loss.backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    changes = (event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("labels", ["all", "few"])
def test_the_peak_is_no_higher_whatever_is_read(labels):
    """What is computed of the block on the way goes when it would in stock code."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=256)).train()
    ids = torch.randint(256, (2, 256))
    inputs = {"input_ids": ids, "labels": ids if labels == "all" else torch.where(torch.arange(256) > 250, ids, -100)}
    waits, hooked = (fastln.prepare(copy.deepcopy(stock)) for _ in range(2))
    last_block(hooked).register_forward_hook(lambda *_: None)
    peaks = [peak_bytes(model, inputs) for model in (waits, hooked)]
    assert peaks[0] <= (1.01 if labels == "all" else 0.85) * peaks[1]


def last_block(model):
    return [stack for stack in model.modules() if isinstance(stack, nn.ModuleList)][-1][-1]


def hooked(model):
    next(last_block(model).children()).register_forward_hook(lambda *_: None)


def moved(model):
    """Forward in the class's place, as `accelerate` has it where weights come and go."""
    module = next(last_block(model).children())
    module.forward = module.forward


def evaluated(model):
    model.eval()


@pytest.mark.parametrize("change", [hooked, moved, evaluated])
def test_stock_code_runs(change, computed_rows):
    model, inputs = make("llama"), batch("llama")
    stock = copy.deepcopy(model)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(name in norm_parameters(model))
    change(fastln.prepare(model))
    loss, gradients = step(model, inputs)
    assert not computed_rows
    want, expected = step(stock, inputs)
    assert loss == pytest.approx(want, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_stock_code_runs_without_autograd_and_in_the_definition(computed_rows):
    inputs = batch("llama")
    with torch.no_grad():
        fastln.prepare(make("llama"))(**inputs)
    fastln.prepare(make("llama"), backend="reference")(**inputs)
    assert not computed_rows


def test_a_frozen_tower_is_computed_whole(computed_rows):
    """As it is where its features come from a cache: the bits of a product may depend on the number of rows."""
    model, inputs = make("clip"), batch("clip")
    fastln.prepare(model, scope="text")
    model(**inputs)
    assert set(computed_rows) == {2}


@pytest.mark.parametrize(("name", "also"), [("bert", ("cls",)), ("llama", ("lm_head",)), ("gemma2", ())])
def test_heads_that_train_and_capped_ones(name, also):
    """They keep rows, of those that are there; and logits that autograd alone sees have their gradient."""
    model, inputs = make(name), batch(name)
    stock = copy.deepcopy(model)
    for key, parameter in stock.named_parameters():
        parameter.requires_grad_(key in norm_parameters(model) or key.startswith(also))
    want = stock(**inputs)
    (want.loss + want.logits.square().mean()).backward()
    fastln.prepare(model, also=also)
    with SavedActivations(model):
        got = model(**inputs)
    (got.loss + Square.apply(got.logits).mean()).backward()
    gradients = {key: parameter.grad for key, parameter in stock.named_parameters()}
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[key] is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6)


def test_restore_takes_it_away(computed_rows):
    model = fastln.restore(fastln.prepare(make("llama")))
    step(model, batch("llama"))
    assert not computed_rows


def test_outputs_are_those_of_stock():
    """Hidden states, whoever asks for them, and logits where no label is."""
    model, inputs = make("llama"), batch("llama")
    stock = model(**inputs, output_hidden_states=True)
    ours = fastln.prepare(model)(**inputs, output_hidden_states=True)
    ours.loss.backward()
    torch.testing.assert_close(ours.logits + 0, stock.logits, rtol=1e-5, atol=1e-5)
    for got, want in zip(ours.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(got + 0, want, rtol=1e-5, atol=1e-5)


def test_outputs_captured_once_change_nothing(computed_rows):
    """transformers leaves its hooks on the modules."""
    model, inputs = fastln.prepare(make("llama")), batch("llama")
    with torch.no_grad():
        model.eval()(**inputs, output_hidden_states=True, output_attentions=True)
    step(model.train(), inputs)
    assert set(computed_rows) == {4}


def test_a_classifier_reads_one_token_of_each_text(computed_rows):
    config = transformers.LlamaConfig(**make("llama").config.to_dict() | {"num_labels": 3})
    model = transformers.LlamaForSequenceClassification(config).train()
    inputs = {"input_ids": batch("llama")["input_ids"], "labels": torch.tensor([0, 2])}
    want = model(**inputs).loss
    fastln.prepare(model, also="score")
    torch.testing.assert_close(model(**inputs).loss, want)
    assert set(computed_rows) == {2}


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2"])
def test_checkpointing_with_dropout_is_the_same_step(name):
    """The rows are computed after their block's checkpoint and before its backward, with the same numbers."""
    model, inputs = make(name), batch(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    fastln.prepare(model)
    torch.manual_seed(1)
    want = step(model, inputs)
    model.activation_checkpointing_enable()
    torch.manual_seed(1)
    got = step(model, inputs)
    assert got[0] == want[0]
    for parameter, gradient in want[1].items():
        torch.testing.assert_close(got[1][parameter], gradient)


def test_a_batch_without_labels_has_gradients_of_zero():
    model, inputs = fastln.prepare(make("llama")), batch("llama")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss == 0
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or not parameter.grad.any(), name


def test_autocast(computed_rows):
    model, inputs = make("llama"), batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**inputs).loss
        got = fastln.prepare(model)(**inputs).loss
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    assert set(computed_rows) == {4}


def test_where_it_begins():
    """At the last linear layer of the last attention of each stack."""
    found = {}
    for model in (cut_dropout(transformers.BlipForQuestionAnswering(blip_config())), make("t5"), make("clip")):
        found[type(model).__name__] = [block.projection for block in last_blocks(model)]
    assert found == {
        "BlipForQuestionAnswering": [
            "vision_model.encoder.layers.1.self_attn.projection",
            "text_encoder.encoder.layer.1.crossattention.output.dense",
            "text_decoder.bert.encoder.layer.1.crossattention.output.dense",
        ],
        "T5ForConditionalGeneration": [
            "encoder.block.0.layer.0.SelfAttention.o",
            "decoder.block.0.layer.1.EncDecAttention.o",
        ],
        "CLIPModel": [
            "text_model.encoder.layers.1.self_attn.out_proj",
            "vision_model.encoder.layers.1.self_attn.out_proj",
        ],
    }


def test_what_may_be_late():
    x = torch.randn(2, 3, requires_grad=True)
    assert may_be_late(x)
    assert may_be_late(LazyRows.of(x))
    assert not may_be_late(x[0])
    assert not may_be_late(x.to("meta"))
    with torch.no_grad():
        assert not may_be_late(x)
