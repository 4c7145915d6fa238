"""What trains, counted."""

import inspect
import re
from dataclasses import fields

import family_models
import pytest
import tiny
import torch
from transformers import BlipConfig, BlipForQuestionAnswering

import fastln
from fastln.engines import put_method
from fastln.errors import FastLNError
from fastln.methods import METHODS, count_parameters, describe_parameters, get_method, norm_parameters
from fastln.settings import MethodSettings
from fastln.state import prepared
from fastln.training import TrainConfig
from fastln.training.tasks import apply_method, finish

PROMPTS = ("prefix", "p-tuning", "prompt")  # for language models
ON_TASKS = [method for method in METHODS if method not in PROMPTS]


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained(task):
    return trained_names(task.model)


def test_counts_of_the_published_small_model():
    """arXiv 2404.16385's small model: ViT-B/16 at 480 x 480, two 12-layer BERTs; 361.48M in all, 153,600 in norms."""
    with torch.device("meta"):
        model = BlipForQuestionAnswering(
            BlipConfig(
                vision_config={"image_size": 480},
                text_config={"num_attention_heads": 12, "vocab_size": 30524},
            )
        )
    model.tie_weights()
    fastln.prepare(model)
    n_trained, n_total = count_parameters(model)
    assert n_trained == 153_600
    assert round(n_total / 1e6, 2) == 361.48
    assert describe_parameters(model).startswith("153,600 of 361,478,972 parameters train (0.04249%): vision 38,400 of")


@pytest.mark.slow(take=10)
@pytest.mark.parametrize("kind", tiny.TASKS)
@pytest.mark.parametrize("method", ON_TASKS)
def test_every_engine_trains_as_many_parameters(kind, method, tmp_path):
    data = tiny.phantom()
    counts = set()
    for engine in METHODS[method].engines:
        task = tiny.TASKS[kind](tmp_path, data)
        counts.add(count_parameters(apply_method(task, method, engine))[0])
    assert len(counts) == 1
    assert counts.pop() > 0


@pytest.mark.slow(take=6)
@pytest.mark.parametrize("method", ON_TASKS)
def test_a_head_that_starts_random_trains_under_every_method(method, tmp_path):
    task = tiny.dual(tmp_path, tiny.phantom())
    n_head = count_parameters(task.model.fusion_head)[1]
    apply_method(task, method)
    assert count_parameters(task.model.fusion_head)[0] == n_head


def test_selections(tmp_path):
    data = tiny.phantom()

    def selection(method):
        task = tiny.dual(tmp_path, data)
        apply_method(task, method, "torch")
        return {name for name in trained(task) if not name.startswith("fusion_head.")}

    everything = selection("full")
    norms = set(norm_parameters(tiny.dual(tmp_path, data).model))
    assert selection("layernorm") == norms
    assert selection("bitfit") == {name for name in everything if name.endswith(".bias")}
    assert selection("head") == set()
    # Two norms per layer, two layers and one norm more, in each of two towers; a weight and a bias each.
    assert len(norms) == 2 * (2 * 2 + 1) * 2
    assert len(everything) > len(norms)


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(FastLNError, match=r"unknown method 'lra'; did you mean 'lora'\? \(valid: layernorm, "):
        get_method("lra")
    with pytest.raises(FastLNError, match=r"does not run on engine 'fastln' \(valid: peft\)"):
        get_method("dora", "fastln")


@pytest.mark.slow(take=6)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "head"])
def test_every_method_trains_a_language_model(method):
    """A step by peft's or our own parts; biases are the one thing that this Llama does not have."""
    model = family_models.make("llama")
    if method == "bitfit":
        with pytest.raises(FastLNError, match="'bitfit' matches nothing in the model of LlamaForCausalLM"):
            put_method(model, method)
        return
    model = put_method(model, method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # low-rank updates begin with one factor at 0
        optimizer.zero_grad()
        model(**family_models.batch("llama")).loss.backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained_names(model)


def test_norms_and_lora_train_fused_projections():
    names = trained_names(put_method(family_models.make("gpt2"), "layernorm+lora"))
    assert sum(".c_attn.lora_" in name for name in names) == 2 * 2
    assert sum(".ln_" in name for name in names) == 5 * 2


@pytest.mark.parametrize("method", PROMPTS)
def test_virtual_tokens_need_a_language_model(method):
    with pytest.raises(FastLNError, match="sequence-classification language model, which BlipForQuestionAnswering is"):
        put_method(family_models.make("blip"), method)
    with pytest.raises(FastLNError, match="leave out the scope 'decoder'"):
        put_method(family_models.make("opt"), method, scope="decoder")


def test_norms_and_lora_train_together_and_merge(tmp_path):
    data = tiny.phantom()
    task = tiny.blip(tmp_path, data)
    keys = set(task.model.state_dict())
    model = apply_method(task, "layernorm+lora")
    batch = task.collate([data[0], data[1]], data)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = model.eval()(**batch).loss
    names = trained(task)
    assert {name for name in names if "lora_" not in name} == set(norm_parameters(task.model))
    finish(task, model)
    assert set(task.model.state_dict()) == keys
    torch.testing.assert_close(task.model.eval()(**batch).loss, expected)


def test_scope_holds_for_peft():
    names = trained_names(put_method(family_models.make("blip"), "lora", scope="text"))
    assert names
    assert all(".text_encoder." in name for name in names)


def test_a_module_to_train_also_must_exist(tmp_path):
    model = tiny.dual(tmp_path, tiny.phantom()).model
    with pytest.raises(FastLNError, match="has no module 'fusion_haed' with parameters"):
        fastln.prepare(model, also=["fusion_haed"])


def test_a_method_that_trains_nothing_says_so(tmp_path):
    model = tiny.dual(tmp_path, tiny.phantom()).model
    with pytest.raises(FastLNError, match="list the task head's modules in `also`"):
        fastln.prepare(model, "head", without="random_heads")
    fastln.prepare(model, "head")
    assert count_parameters(model)[0] == count_parameters(model.fusion_head)[1]


@pytest.mark.parametrize("method", ["layernorm", "layernorm+lora"])
def test_what_is_left_out_stays_stock(method):
    model = put_method(family_models.make("llama"), method, without="late_logits")
    base = model.get_base_model() if method == "layernorm+lora" else model
    assert prepared(base).plan.without == ("late_logits",)
    changed = {change.trick for change in prepared(base).plan.changes}
    assert "norms" in changed
    assert "late_logits" not in changed


@pytest.mark.parametrize("engine", ["torch", "peft"])
def test_other_engines_have_nothing_to_leave_out(engine):
    with pytest.raises(FastLNError, match=f"engine '{engine}' runs stock code.*without cache, norms is for engine 'fa"):
        put_method(family_models.make("llama"), "layernorm", engine, without=["cache", "norms"])
    message = (
        f"engine '{engine}' runs stock code: products 'int8' is for engine 'fastln', which runs this method too: "
        "say so (engine='fastln', or --engine fastln)"
    )
    with pytest.raises(FastLNError, match=re.escape(message)):
        MethodSettings.of("layernorm", engine, products="int8")
    if engine == "peft":  # LoRA's first engine, which nobody has named here
        with pytest.raises(FastLNError, match=re.escape(message)):
            MethodSettings.of("lora", products="int8")
        with pytest.raises(FastLNError, match=r"is for engine 'fastln'$"):  # which does not run that method
            MethodSettings.of("vera", products="int8")


def test_the_settings_have_the_arguments_of_every_door():
    """An argument that one of them lacks would be lost on its way to the plan."""
    own = {field.name for field in fields(MethodSettings)}
    assert own == inspect.signature(put_method).parameters.keys() - {"model"}
    assert own == inspect.signature(MethodSettings.of).parameters.keys()
    assert own <= inspect.signature(fastln.FastLNTrainer.__init__).parameters.keys()
    of_plan = MethodSettings("layernorm", "fastln").of_plan.keys()
    assert of_plan == own - {"engine"}
    assert of_plan == inspect.signature(fastln.plan).parameters.keys() - {"model", "device", "batch"}
    assert of_plan == inspect.signature(fastln.prepare).parameters.keys() - {"model", "batch"}
    assert own - {"engine", "also", "backend"} <= {field.name for field in fields(TrainConfig)}
