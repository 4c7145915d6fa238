"""A model given twice, as from a notebook's cell that ran again: it goes on, or gets another method; peft's too."""

import logging

import peft
import pytest
import torch
from small_run import Sentences, arguments, llama

import fastln
from fastln import FastLNError, FastLNTrainer
from fastln.methods import norm_parameters
from fastln.standins.part import is_stand_in
from fastln.state import prepared


@pytest.fixture
def trainer(tmp_path):
    args = arguments(tmp_path, save_strategy="no", max_steps=3)
    return lambda model, **settings: FastLNTrainer(model, args, train_dataset=Sentences(), **settings)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *(("layernorm", torch.float32), ("lora", torch.float32), ("layernorm", torch.bfloat16)),
        *(pytest.param(method, torch.float32, marks=pytest.mark.slow) for method in ("layernorm+lora", "prompt")),
        *(
            pytest.param(method, torch.bfloat16, marks=pytest.mark.slow)
            for method in ("layernorm+lora", "lora", "prompt")
        ),
    ],
)
def test_the_same_method_goes_on(method, dtype, trainer, caplog):
    model = llama().to(dtype)
    first = trainer(model, method=method)
    first.train()
    tuned = values(first.model)
    with caplog.at_level(logging.INFO, "fastln"):
        second = trainer(model, method=method)
    assert caplog.text.count(f"the model has method {method} already, and goes on from its tuned values") == 1
    assert values(second.model).keys() == tuned.keys()
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in values(second.model).items())
    second.train()
    assert any(not torch.equal(tensor, tuned[name]) for name, tensor in values(second.model).items())
    third = trainer(second.model, method=method)  # what trained, in place of what was given
    assert third.model is second.model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("layernorm", "lora"), ("lora", "layernorm"), ("prompt", "layernorm")),
        pytest.param("layernorm", "bitfit", marks=pytest.mark.slow),
        pytest.param("ia3", "lora", marks=pytest.mark.slow),
    ],
)
def test_another_method_takes_its_place_and_tuned_values_stay(one, other, trainer, caplog):
    model = llama(attention_bias=True)
    first = trainer(model, method=one)
    first.train()
    first.model.eval()
    ids = torch.arange(8)[None]
    before = model(ids).logits
    with caplog.at_level(logging.WARNING, "fastln"):
        second = trainer(model, method=other)
    assert caplog.text.count(f"the model had method {one}: ") == 1
    assert f"gets method {other}" in caplog.text
    if one != "prompt":  # its tokens are no part of a model, as the log says
        torch.testing.assert_close(second.model.eval()(ids).logits, before, rtol=1e-4, atol=1e-5)
    else:
        assert "its virtual tokens are dropped" in caplog.text
    fresh = trainer(llama(attention_bias=True), method=other)
    assert values(second.model).keys() == values(fresh.model).keys()
    second.train()


def test_a_prepared_model_may_be_given(trainer, caplog):
    model = fastln.prepare(llama())
    with caplog.at_level(logging.INFO, "fastln"):
        trainer(model)
    assert "the model has method layernorm already, and goes on" in caplog.text
    trainer(model, scope=None, without="dropout")
    said = "the model had method layernorm: its tuned values stay, and it gets method layernorm with other settings"
    assert said in caplog.text
    assert prepared(model).plan.without == ("dropout",)


def test_engine_torch_gets_a_stock_model(trainer):
    model = llama()
    trainer(model)
    trainer(model, engine="torch")
    assert prepared(model) is None
    assert not any(is_stand_in(module) for module in model.modules())
    assert values(model).keys() == set(norm_parameters(model))


@pytest.mark.parametrize("settings", [{"method": "layernrm"}, {"scope": "vision"}, {"also": "nowhere"}])
def test_a_method_that_cannot_be_put_on_leaves_the_model_as_it_was(settings, trainer):
    model = llama().bfloat16()
    trainer(model).train()
    tuned, plan = values(model), prepared(model).plan
    with pytest.raises(FastLNError):
        trainer(model, **settings)
    assert prepared(model).plan == plan
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in values(model).items())


def test_layers_of_peft_that_others_put_there_are_refused(trainer):
    model = llama()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for given in (wrapped, model):
        with pytest.raises(FastLNError, match=r"holds layers of peft already, and method 'lora' needs a stock model"):
            trainer(given, method="lora")
    trainer(wrapped.merge_and_unload(), method="lora")


def test_a_wrapper_whose_layers_are_gone_is_forgotten(trainer):
    model = llama()
    first = trainer(model, method="lora")
    first.model.merge_and_unload()
    second = trainer(model, method="lora")
    assert second.model is not first.model
    second.train()
