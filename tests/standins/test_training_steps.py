"""Training steps of prepared models: no cache unless asked for, and checkpoints that lose no norm's gradient."""

import copy
import inspect

import pytest
import torch
import transformers
from family_models import batch, make

import fastln
from fastln.memory import SavedActivations
from fastln.methods import norm_parameters


def step(model, inputs):
    """Return the loss and the gradients."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(got, want):
    return got[0] == want[0] and all(torch.equal(got[1].get(name), gradient) for name, gradient in want[1].items())


@pytest.mark.parametrize("settings", [None, {"use_reentrant": True}], ids=["as transformers does", "reentrant"])
@pytest.mark.parametrize("first", ["prepare", "checkpoint"])
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "blip"])
def test_checkpointing_gives_the_same_gradients(name, first, settings):
    model, inputs = make(name), batch(name)
    want = step(fastln.prepare(copy.deepcopy(model)), inputs)
    assert len(want[1]) == len(norm_parameters(model))
    if first == "checkpoint":
        model.activation_checkpointing_enable(settings)
    fastln.prepare(model)
    if first == "prepare":
        model.activation_checkpointing_enable(settings)
    assert same(step(model, inputs), want)
    assert same(step(model, inputs), want)


def test_checkpointing_stores_less_and_keeps_its_other_settings():
    model, inputs = make("llama"), batch("llama")
    fastln.prepare(model)
    with SavedActivations(model) as everything:
        model(**inputs)
    model.activation_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": False}, every_n_layers=2)
    with SavedActivations(model) as less:
        model(**inputs)
    assert less.bytes < 0.8 * everything.bytes
    first, second = model.model.layers
    assert (first.gradient_checkpointing, second.gradient_checkpointing) == (True, False)
    assert first._gradient_checkpointing_func.keywords == {"use_reentrant": False, "preserve_rng_state": False}


def test_a_function_of_ones_own_checkpoints_as_it_is():
    model, calls = fastln.prepare(make("bert")), []
    model.activation_checkpointing_enable()

    def checkpoint(function, *args):
        calls.append(function)
        return function(*args)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = checkpoint
    step(model, batch("bert"))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
def test_a_cache_is_made_where_it_is_asked_for_or_may_be_of_use(name):
    model, inputs = make(name), batch(name)
    assert model(**inputs).past_key_values is not None
    fastln.prepare(model)
    assert model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None
    assert model.config.use_cache or name == "t5"
    with torch.no_grad():
        assert model(**inputs).past_key_values is not None
    assert model.eval()(**inputs).past_key_values is not None
    fastln.restore(model.train())
    assert model(**inputs).past_key_values is not None


def test_arguments_by_position_and_caches_of_ones_own_are_heeded():
    model, inputs = fastln.prepare(make("gpt2")), batch("gpt2")
    ids, others = (
        inputs["input_ids"],
        [None] * (list(inspect.signature(model.forward).parameters).index("use_cache") - 1),
    )
    assert model(ids, *others, False).past_key_values is None
    assert model(ids, *others, True).past_key_values is not None
    cache = transformers.DynamicCache()
    assert model(ids, past_key_values=cache).past_key_values is cache
    cache.reset()
    assert model(ids, cache).past_key_values is cache
    assert cache.get_seq_length() == ids.shape[1]


def test_a_copy_restores_alone():
    model, inputs = fastln.prepare(make("gpt2")), batch("gpt2")
    twin = fastln.restore(copy.deepcopy(model))
    assert twin(**inputs).past_key_values is not None
    assert model(**inputs).past_key_values is None
