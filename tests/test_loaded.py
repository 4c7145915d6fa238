"""Models whose parameters cannot train as they are: refused in one line, and left alone."""

import copy

import accelerate
import pytest
import torch
from family_models import batch, make
from torch import nn

import fastln
from fastln import int8_rules
from fastln.errors import FastLNError
from fastln.fingerprint import fingerprint
from fastln.memory import SavedActivations
from fastln.standins import values
from fastln.standins.part import is_stand_in


def untouched(model):
    return not any(is_stand_in(module) for module in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize("trains", [True, False])
def test_parameters_made_in_inference_mode_are_refused_and_refused_again(trains):
    with torch.inference_mode():
        model = make("bert").requires_grad_(trains)
    for _ in range(2):
        with pytest.raises(FastLNError, match=r"word_embeddings\.weight was made under torch\.inference_mode"):
            fastln.prepare(model)
        assert not any(is_stand_in(module) for module in model.modules())
        assert {parameter.requires_grad for parameter in model.parameters()} == {trains}


def test_a_model_can_be_prepared_in_inference_mode():
    model = make("bert").bfloat16()
    with torch.inference_mode():
        fastln.prepare(model)
    model(**batch("bert")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Stubborn(nn.Parameter):
    """A parameter whose flag cannot be set: an error in the middle of `prepare`, and of undoing it."""

    def requires_grad_(self, requires_grad=True):
        raise RuntimeError("cannot set the flag")


def test_an_error_in_the_middle_leaves_a_model_that_is_not_prepared():
    model = make("bert")
    model.cls.predictions.bias = Stubborn(torch.zeros(160))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot set the flag"):
            fastln.prepare(model)
        assert untouched(model)
        with pytest.raises(FastLNError, match="not prepared"):
            fastln.restore(model)


def partly_on_meta():
    model = make("llama")
    model.model.layers[1].to("meta")
    return model


def offloaded():
    return accelerate.cpu_offload(make("llama"), execution_device="cpu")


@pytest.mark.parametrize("load", [partly_on_meta, offloaded])
def test_layers_without_values_are_refused_by_all_that_need_them(load, tmp_path):
    fastln.save_adapter(fastln.prepare(make("llama")), tmp_path / "adapter")
    model = load()
    with pytest.raises(FastLNError, match=r"parameters that would train have no values, .*offloaded") as refused:
        fastln.prepare(model)
    assert "\n" not in str(refused.value)
    assert untouched(model)
    for call in (
        lambda: fastln.load_adapter(model, tmp_path / "adapter", check_base=False),
        lambda: fastln.merge_adapter(model, tmp_path / "merged"),
        lambda: fingerprint(model),
    ):
        with pytest.raises(FastLNError, match=r"has no values: it is offloaded") as refused:
            call()
        assert "\n" not in str(refused.value)


def test_a_model_with_frozen_layers_offloaded_trains():
    model, inputs = make("llama"), batch("llama")
    want = model(**inputs).loss.item()
    for layer in model.model.layers:
        accelerate.cpu_offload(layer.mlp, execution_device="cpu")
    loss = fastln.prepare(model)(**inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_that_is_wholly_on_meta_can_get_its_values_later():
    with torch.device("meta"):
        model = make("llama")
    fastln.prepare(model)
    assert untouched(fastln.restore(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_whose_forward_is_replaced_keep_it(dtype):
    """As accelerate's hooks replace it: `module.forward = partial(new_forward, module)`."""
    model, inputs = make("llama").to(dtype), batch("llama")
    norm = model.model.layers[0].input_layernorm
    stock = norm.forward
    norm.forward = lambda x: 3 * stock(x)
    accelerate.hooks.attach_align_device_hook(model.model.layers[1], execution_device="cpu")
    want = model(**inputs).loss
    stays = [stay.name for stay in fastln.plan(model).stays if "its forward is replaced" in stay.reason]
    assert "model.layers.1.mlp.down_proj" in stays
    loss = fastln.prepare(model)(**inputs).loss
    torch.testing.assert_close(loss, want, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def checked(model):
    """The modules that check at their next call whether they have values."""
    hooks = {name: module._forward_pre_hooks.values() for name, module in model.named_modules()}
    return [name for name, all_of_it in hooks.items() if any(isinstance(hook, values._Check) for hook in all_of_it)]


@pytest.mark.parametrize("call", ["model", "forward"])
@pytest.mark.parametrize("products", ["exact", "int8"])
@pytest.mark.parametrize(("name", "lacks"), [("llama", "rotary_emb.inv_freq"), ("bert", "embeddings.position_ids")])
def test_buffers_without_values_are_an_error_at_the_first_forward(name, lacks, products, call, monkeypatch):
    monkeypatch.setattr(int8_rules, "SMALLEST", 1)
    stock, inputs = make(name), batch(name)
    want = fastln.prepare(copy.deepcopy(stock), products=products)(**inputs).loss.item()
    with torch.device("meta"):
        model = make(name)
    fastln.prepare(model, products=products)
    with SavedActivations(model):  # real inputs alone are refused
        model(**{key: value.to("meta") for key, value in inputs.items()})
    with pytest.raises(FastLNError, match=r"buffers .* and \d+ parameters"):
        model(**inputs)
    model.load_state_dict(stock.state_dict(), strict=False, assign=True)
    model = copy.deepcopy(model)
    with pytest.raises(FastLNError, match=rf"{lacks}.*still on the meta device.*init_empty_weights"):
        (model if call == "model" else model.forward)(**inputs)
    for path, buffer in stock.named_buffers():
        owner, _, own = path.rpartition(".")
        model.get_submodule(owner).register_buffer(own, buffer, persistent=False)
    assert (model if call == "model" else model.forward)(**inputs).loss.item() == pytest.approx(want, rel=1e-5)
    model(**inputs)
    assert not checked(model)


def test_a_model_made_under_init_empty_weights_needs_its_weights_alone(monkeypatch):
    monkeypatch.setattr(int8_rules, "SMALLEST", 1)
    stock, inputs = make("llama"), batch("llama")
    with accelerate.init_empty_weights():
        model = make("llama")
    fastln.prepare(model, products="int8")
    model.load_state_dict(stock.state_dict(), strict=False, assign=True)
    want = fastln.prepare(stock, products="int8")(**inputs).loss.item()
    assert model(**inputs).loss.item() == pytest.approx(want, rel=1e-5)


def test_restore_takes_the_checks_for_values_away():
    with torch.device("meta"):
        model = make("bert")
    assert checked(fastln.prepare(model)) == ["", "bert.embeddings"]
    assert not checked(fastln.restore(model))
