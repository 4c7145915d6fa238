"""Which layers run in 8 bits, in which form, and what the plan says of them and of those that stay exact."""

import logging

import pytest
import torch
from family_models import of_kind
from int8_models import SIZES, bert, gpt2, llama
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForQuestionAnswering,
    LlamaConfig,
    LlamaForCausalLM,
)

import fastln
from fastln import int8_rules
from fastln.ops import backends
from fastln.ops.backends import Choice, resolve
from fastln_kernels.cpu import products, units

WHY_NOT = products.why_not("int8")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def test_units_that_are_little_faster_are_told(monkeypatch):
    monkeypatch.setattr(units, "rates", lambda: {"float32": 1.1e12, "bfloat16": 1.4e12, "int8": 1.8e12})
    (note,) = fastln.plan(bert(), products="int8").notes
    assert note.startswith("products='int8' may make steps slower here: 8-bit units reach 1800 GFLOP/s a thread, ")
    assert "float32 ones 1100, and" in note
    monkeypatch.setattr(units, "rates", lambda: {"float32": 0.7e12, "bfloat16": 1.4e12, "int8": 1.8e12})
    assert fastln.plan(bert(), products="int8").notes == ()
    monkeypatch.setenv(units.VARIABLE, "bfloat16")
    (note,) = fastln.plan(bert(torch.bfloat16), products="int8").notes
    assert "bfloat16 ones 1400" in note


def test_the_plan_says_what_is_rounded_and_why_others_are_not():
    plan = fastln.plan(gpt2(), products="int8")
    table = plan.table()
    assert "products int8" in table
    layers = [change.products for change in plan.changes if change.stand_in == "int8_conv1d"]
    twice, once = "int8, twice, turned", "int8, turned"
    # c_attn comes first, c_proj of the MLP last; the last block's has two terms.
    assert layers == [twice, once, once, once, twice, once, once, twice]
    model = bert()
    model.bert.encoder.layer[0].attention.self.key.weight = model.bert.encoder.layer[1].attention.self.key.weight
    plan = fastln.plan(model, products="int8")
    exact = {c.name: c.why_exact for c in plan.changes if c.stand_in == "linear"}
    assert exact["bert.encoder.layer.0.attention.self.key"] == "another module shares its weight"
    assert "  2 linear layer: another module shares its weight" in plan.table()
    assert "classifier" not in {c.name for c in plan.changes if c.products == "int8"}  # it trains: it is random


def test_where_language_models_have_two_terms_and_encoders_none():
    def twice(model):
        return {c.name for c in fastln.plan(model, products="int8").changes if getattr(c.detail, "twice", False)}

    kinds = ("q_proj", "k_proj", "v_proj")
    scores = {f"model.layers.{n}.self_attn.{kind}" for n in range(2) for kind in kinds}
    assert twice(llama()) == scores | {"model.layers.1.mlp.down_proj"}
    assert not twice(bert())
    with torch.device("meta"):
        deep = LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 11}), vocab_size=64))
        ends = {name for name in twice(deep) if name.endswith("down_proj")}
        assert ends == {f"model.layers.{n}.mlp.down_proj" for n in (9, 10)}  # a tenth, rounded up
        blip = BlipForQuestionAnswering(BlipConfig())
    assert not twice(blip)


def test_scores_of_language_models_are_exact(monkeypatch):
    monkeypatch.setattr(int8_rules, "why_exact", lambda *given: None)  # as if this machine's units gained

    def products(model):
        changes = [c for c in fastln.plan(model, products="int8").changes if c.stand_in == "attention"]
        return {(c.products, c.why_exact) for c in changes}

    ((how, why),) = products(llama())
    assert how == "exact"
    assert why.startswith("where norms are RMSNorms")
    assert products(bert()) == {("int8 where it pays", None)}
    attention = fastln.prepare(llama(), products="int8").model.layers[0].self_attn
    assert attention.config._fastln_settings.products == "exact"
    monkeypatch.setenv("FASTLN_CPU_INT8_ATTENTION", "1")
    assert products(llama()) == {("int8 where it pays", None)}


def test_what_has_no_effect_is_told(caplog, monkeypatch):
    tiny = bert()
    assert "too small to gain" in "".join(fastln.plan(of_kind("pre-norm encoder")[0], products="int8").notes)
    assert "its weight is float64" in "".join(fastln.plan(bert(torch.float64), products="int8").notes)
    monkeypatch.setattr(int8_rules, "why_exact", lambda *_: None)
    # Attention still multiplies in 8 bits, so that "no effect" would be false.
    (note,) = fastln.plan(tiny, method="full", products="int8").notes
    assert note.endswith("reaches no linear layer of this model here, only attention: the weight trains")
    (note,) = fastln.plan(tiny, products="int8", without="linears").notes
    assert note.endswith("only attention: left out: without='linears'")
    (note,) = fastln.plan(tiny, products="int8", without=("linears", "attention")).notes
    assert "has no effect on this model here" in note
    assert "keep_weights has no effect" in "".join(fastln.plan(tiny, keep_weights=True).notes)
    monkeypatch.setattr(int8_rules, "resolve", lambda *_: _no_kernels())
    monkeypatch.setattr(int8_rules, "why_exact", lambda *_: "no VNNI")
    plan = fastln.plan(tiny, products="int8")
    assert not any(change.products == "int8" for change in plan.changes)
    with caplog.at_level(logging.WARNING):
        fastln.prepare(tiny, products="int8")
    assert "products='int8' has no effect on this model here, so its products are exact: no VNNI" in caplog.text


def test_gpus_that_gain_nothing_stay_exact(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, is_exact in (((9, 0), False), ((10, 3), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, it=capability: it)
        plan = fastln.plan(bert(), products="int8", device="cuda")
        assert any("GPUs of compute capability 10" in note for note in plan.notes) == is_exact
        assert any("int8" in (change.products or "") for change in plan.changes) != is_exact


@pytest.mark.parametrize("rates", [{}, {"float32": 2e11, "bfloat16": 1e11}])
def test_heads_stay_exact_where_no_unit_was_measured(rates, monkeypatch):
    monkeypatch.setattr(units, "rates", lambda: rates)
    assert int8_rules._why_no_head(torch.bfloat16) == "this processor has no units for products in 8 bits"


def _no_kernels():
    return Choice("reference", "plain PyTorch; no VNNI", "reference_int8", "no VNNI")


def test_a_cause_that_keeps_layers_from_exact_kernels_too_is_told_once(monkeypatch):
    monkeypatch.setattr(backends, "_no_library", lambda kernels: "/nonexistent --version: no such file")
    monkeypatch.setattr(int8_rules, "why_exact", lambda *_: "no kernels")
    resolve.cache_clear()
    try:
        plan = fastln.plan(bert(), products="int8")
    finally:
        resolve.cache_clear()
    cause = "no compiled CPU kernels: /nonexistent --version: no such file"
    reasons = {stay.reason for stay in plan.stays if stay.kind == "linear layer"}
    assert reasons == {f"not in 8 bits: {cause}; torch's linear, all that runs here"}
    assert plan.notes == (f"products='int8' has no effect on this model here, so its products are exact: {cause}",)


def test_a_device_without_kernels_is_the_reason():
    (note,) = fastln.plan(bert(), products="int8", device="mps").notes
    assert note.endswith("so its products are exact: no kernels multiply in 8 bits on device 'mps'")


def test_a_head_whose_bias_trains_stays_exact_in_the_plan_too(monkeypatch):
    monkeypatch.setattr(int8_rules, "HEAD_GAIN", 0)
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**SIZES, vocab_size=200, is_decoder=True))
    found = []
    for method in ("LN", "bitfit"):
        (head,) = (c for c in fastln.plan(model, method, products="int8").changes if c.kind == "lm_head")
        found.append((head.products, head.why_exact))
    assert found == [("int8, turned", None), ("exact", "it trains")]
