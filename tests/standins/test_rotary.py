"""Rotary positions in models: who is recognised, and prepared models compute what stock ones do."""

import copy
import logging
import pickle
import types

import pytest
import torch
import transformers
from family_models import LLAMA, batch, make, of_kind
from only import prepare_only
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

import fastln
from fastln import ops
from fastln.families.rotary import rotary_function
from fastln.standins import rotary
from fastln.standins.rotary import Rotary
from fastln_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.why_not("rotary") is not None, reason=f"{library.why_not('rotary')}")

GROUPED = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
IDS = {"input_ids": torch.arange(1, 5)[None]}


def family(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**GROUPED)
    return getattr(transformers, f"{name}ForCausalLM")(config).train(), batch("llama")


def kind(name):
    model, inputs, labels = of_kind(name)
    return model, {**inputs, "labels": labels}


@pytest.fixture
def calls(monkeypatch):
    """The calls of the operation: the shapes of what was turned."""
    seen = []

    def counted(x, *args, **options):
        seen.append(tuple(x.shape))
        return ops.rotary(x, *args, **options)

    monkeypatch.setattr(rotary, "ops", types.SimpleNamespace(rotary=counted))
    return seen


def step(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    assert got[1].keys() == want[1].keys()
    whole = torch.stack([gradient.norm() for gradient in want[1].values()]).norm()
    assert torch.stack([(got[1][name] - want[1][name]).norm() for name in want[1]]).norm() <= 1e-5 * whole


# How a family turns, and how many tensors the operation turned in a step. Stock code turns the others.
FAMILIES = {
    "llama": (lambda: (make("llama"), batch("llama")), 4),
    "gemma2": (lambda: (make("gemma2"), batch("gemma2")), 4),
    "qwen2.5-vl": (lambda: (make("qwen2.5-vl"), batch("qwen2.5-vl")), 4),
    "groups of heads": (lambda: family("Mistral"), 4),
    "part of the columns": (lambda: family("Phi"), 4),
    "arguments by default": (lambda: kind("pre-norm encoder"), 4),
    "the function passes columns": (lambda: family("GPTNeoX"), 0),
    "neighbouring columns": (lambda: (make("cohere"), batch("cohere")), 0),
    "neighbouring columns of a part": (lambda: family("Glm"), 0),
    "halves of cosines": (lambda: kind("attention sinks"), 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_stocks(name, calls):
    made, n_calls = FAMILIES[name]
    model, inputs = made()
    want = step(model, inputs)
    prepare_only(model, "rotary")
    assert_same_step(step(model, inputs), want)
    assert len(calls) == n_calls


def test_the_plan_says_so_and_leaves_it_out():
    model = make("llama")
    changed = [change.name for change in fastln.plan(model).changes if change.trick == "rotary"]
    assert changed == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert "rotary positions" in str(fastln.plan(model))
    fastln.prepare(model, without=("rotary",))
    assert not any(isinstance(module, Rotary) for module in model.modules())


@pytest.mark.parametrize("where", [{"backend": "reference"}, {"device": "cuda"}], ids=str)
def test_without_kernels_it_stays(where):
    stays = [stay for stay in fastln.plan(make("llama"), **where).stays if stay.kind == "rotary positions"]
    assert len(stays) == 2


def test_a_replaced_forward_stays():
    model = make("llama")
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    (stay,) = (stay for stay in fastln.plan(model).stays if stay.name == "model.layers.0.self_attn")
    assert "forward is replaced" in stay.reason
    fastln.prepare(model)
    assert [isinstance(layer.self_attn, Rotary) for layer in model.model.layers] == [False, True]


def test_restore_and_copies(calls):
    model, inputs = fastln.prepare(make("llama")), batch("llama")
    want = step(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del calls[:]
        got = step(copied, inputs)
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(got[1][name], gradient) for name, gradient in want[1].items())
        assert len(calls) == 4
    fastln.restore(model)
    assert type(model.model.layers[0].self_attn) is LlamaAttention
    assert LlamaAttention.forward.__globals__ is vars(modeling_llama)
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


def test_a_compiled_model_calls_the_operator():
    model, inputs, graphs = fastln.prepare(make("llama")), batch("llama"), []
    torch.compiler.reset()

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    loss = torch.compile(model, backend=keep, fullgraph=True)(**inputs).loss
    torch.testing.assert_close(loss, model(**inputs).loss, rtol=1e-6, atol=0)
    (graph,) = graphs
    assert sum(node.target is torch.ops.fastln.rotary.default for node in graph.graph.nodes) == 4
    torch.compiler.reset()


def test_checkpointed_layers_turn_again(calls):
    model, inputs = prepare_only(make("llama"), "rotary", "checkpointing"), batch("llama")
    want = step(model, inputs)
    assert len(calls) == 4
    model.gradient_checkpointing_enable()
    assert_same_step(step(model, inputs), want)
    assert len(calls) == 4 + 8


def test_generation_with_a_cache(calls):
    model = family("Llama")[0].eval()
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**IDS, **options)
    got = prepare_only(model, "rotary").generate(**IDS, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-5)
    assert calls[:4] == [(1, 4, 4, 8), (1, 2, 4, 8)] * 2
    assert set(calls[4:]) == {(1, 4, 1, 8), (1, 2, 1, 8)}


def test_in_16_bits_results_are_rounded_once():
    model = make("llama").bfloat16()
    exact = step(copy.deepcopy(model).double(), batch("llama"))[0]
    stock, got = (step(m, batch("llama"))[0] for m in (copy.deepcopy(model), prepare_only(model, "rotary")))
    assert got.dtype == stock.dtype
    assert (got - exact).abs() <= 2.0**-7 * exact


def test_what_it_does_not_take_is_said_once(calls, caplog, monkeypatch):
    """Under autocast the cosines are float32, and stock code returns float32."""
    monkeypatch.setattr(rotary, "_told", set())
    model = prepare_only(make("llama"), "rotary")
    stock = fastln.restore(copy.deepcopy(model))
    with caplog.at_level(logging.INFO, rotary.logger.name), torch.autocast("cpu", torch.bfloat16):
        got, want = (step(m, batch("llama")) for m in (model, stock))
    assert_same_step(got, want)
    assert not calls
    (said,) = (record.message for record in caplog.records if record.name == rotary.logger.name)
    assert said.startswith("LlamaAttention.forward: rotary positions run stock code: cos must be torch.bfloat16")


def test_a_name_patched_later_is_found_by_the_next_model(monkeypatch):
    """Copies of stock code are made once, but not of code that was replaced since."""
    first = prepare_only(make("llama"), "rotary").model.layers
    assert first[0].self_attn._fastln.kind.forward is first[1].self_attn._fastln.kind.forward
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", lambda *args, **kwargs: 1 / 0)
    second = prepare_only(make("llama"), "rotary")
    second.set_attn_implementation("eager")
    with pytest.raises(ZeroDivisionError):
        second(**batch("llama"))


def turning(q, k, cos, sin):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def turning_back(q, k, cos, sin):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin)


def turning_queries(q, k, cos, sin):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)[0], k


def failing(q, k, cos, sin):
    raise RuntimeError


def cosines_first(cos, sin, q, k):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


@pytest.mark.parametrize(
    ("function", "is_known"),
    [
        (turning, True),
        (turning_back, False),
        (turning_queries, False),
        (failing, False),
        (cosines_first, False),
        (None, False),
        ("a string", False),
    ],
    ids=["turning", "back", "queries alone", "failing", "cosines first", "none", "a string"],
)
def test_a_function_is_known_by_what_it_returns(function, is_known):
    names = {"my_rotary": function}
    exec("def forward(self, q, k, cos, sin): return my_rotary(q, k, cos, sin)", names)
    module = type("Attention", (nn.Module,), {"forward": names["forward"]})()
    assert rotary_function(module) == ("my_rotary" if is_known else None)
