"""Plans: pure, the same on meta, printed whole, and carried out whole or not at all."""

import copy
import logging

import pytest
import tiny
import torch
import transformers
from family_models import MODELS, VISION_MODELS, batch, make
from torch import nn

import fastln
from fastln.errors import FastLNError
from fastln.plan import Change, apply, plan
from fastln.standins.norm import LayerNorm, StockNorm
from fastln.standins.part import is_stand_in, stock_class
from fastln.standins.table import STAND_INS
from fastln.standins.tricks import TRICKS
from fastln.state import prepared

FAMILIES = [*MODELS, *VISION_MODELS]


def looks(model):
    """Everything that a plan carried out would change: classes, attributes, flags, dtypes, memory, hooks."""
    modules = [(name, id(module), type(module), dict(vars(module))) for name, module in model.named_modules()]
    hooks = [
        {kind: dict(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks")}
        for module in model.modules()
    ]
    children = [{key: id(child) for key, child in module._modules.items()} for module in model.modules()]
    parameters = [(name, p.requires_grad, p.dtype, p.data_ptr()) for name, p in model.named_parameters()]
    return modules, hooks, children, parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_changes_nothing_and_is_the_same_on_meta(name):
    model = make(name)
    before = looks(model)
    decided = plan(model)
    assert looks(model) == before
    assert prepared(model) is None
    with torch.device("meta"):
        assert plan(make(name), device="cpu") == decided
    changed = {change.name for change in decided.changes}
    assert {name.rpartition(".")[0] for name in decided.trained} <= changed


def test_what_a_plan_says_is_what_prepare_does():
    model = make("bert")
    decided = plan(model)
    fastln.prepare(model)
    assert prepared(model).plan == decided
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == decided.trained
    assert decided.n_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_plan_made_on_meta_is_carried_out_on_the_real_model():
    with torch.device("meta"):
        meta = make("llama")
    model, twin = make("llama"), make("llama")
    apply(plan(meta, device="cpu"), model)
    fastln.prepare(twin)
    losses = [m(**batch("llama")).loss for m in (model, twin)]
    assert torch.equal(*losses)


def test_a_plan_for_another_model_is_refused_and_changes_nothing():
    model = make("llama")
    before = looks(model)
    with pytest.raises(FastLNError, match="the plan is for another model: it expects 'bert"):
        apply(plan(make("bert")), model)
    assert looks(model) == before


class Stop(BaseException):
    """What no code of fastln's knows, as a KeyboardInterrupt."""


@pytest.mark.slow(take=3)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "blip", "llama"])
def test_whatever_raises_at_any_entry_leaves_the_model_as_it_was(name, late, monkeypatch):
    model = make(name).bfloat16()
    model.activation_checkpointing_enable()
    before, n_changes = looks(model), len(plan(model).changes)
    puts = {key: row.put for key, row in STAND_INS.items()}
    for stop_at in range(n_changes):
        calls = iter(range(n_changes))

        def put(place, key, calls=calls, stop_at=stop_at):
            if (stops := next(calls) == stop_at) and not late:
                raise Stop
            puts[key](place)
            if stops:
                raise Stop

        for key, row in STAND_INS.items():
            monkeypatch.setitem(STAND_INS, key, _with_put(row, put, key))
        with pytest.raises(Stop):
            fastln.prepare(model)
        monkeypatch.undo()
        assert looks(model) == before, stop_at
    fastln.restore(fastln.prepare(model))
    assert [types for _, _, types, _ in looks(model)[0]] == [types for _, _, types, _ in before[0]]


def _with_put(row, put, key):
    import dataclasses

    return dataclasses.replace(row, put=lambda place: put(place, key))


def test_restore_gives_checkpointing_and_the_gradients_of_embeddings_back():
    model, inputs = make("llama"), batch("llama")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    functions = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    fastln.prepare(model)
    model(**inputs).loss.backward()
    assert not model._require_grads_hooks
    now = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    assert now != functions
    fastln.restore(model)
    assert [vars(module).get("_gradient_checkpointing_func") for module in model.modules()] == functions
    assert len(model._require_grads_hooks) == 1
    assert model.get_input_embeddings()(inputs["input_ids"]).requires_grad


def test_an_activation_that_transformers_holds_for_every_model_stays_there():
    config = transformers.OpenAIGPTConfig(n_embd=32, n_layer=1, n_head=2, vocab_size=50, afn="gelu")
    first, second = (transformers.OpenAIGPTLMHeadModel(config) for _ in range(2))
    shared = first.transformer.h[0].mlp.act
    assert shared is second.transformer.h[0].mlp.act
    classes = type(shared)
    fastln.prepare(first)
    fastln.prepare(second)
    assert type(shared) is classes
    assert first.transformer.h[0].mlp.act is not shared
    fastln.restore(first)
    assert first.transformer.h[0].mlp.act is shared


@pytest.mark.parametrize("trick", TRICKS)
def test_each_trick_can_be_left_out_and_is_then_said_to_be(trick):
    for name in ("bert", "llama", "gpt2"):
        model = make(name)
        whole, decided = plan(model), plan(model, without=trick)
        assert not [change for change in decided.changes if change.trick == trick]
        n_left = sum(change.trick == trick for change in whole.changes)
        n_owed = sum(change.trick is None for change in decided.changes)
        said = sum(stay.reason == f"left out: without={trick!r}" for stay in decided.stays)
        assert n_left == said + n_owed
        loss = fastln.prepare(copy.deepcopy(model), without=trick)(**batch(name)).loss
        torch.testing.assert_close(loss, model(**batch(name)).loss, rtol=1e-5, atol=0)


def test_with_everything_left_out_only_what_trains_changes():
    model, inputs = make("bert").bfloat16(), batch("bert")
    decided = plan(model, without=TRICKS)
    assert {change.stand_in for change in decided.changes} == {"slow_norm"}
    classes = [type(module) for module in model.modules()]
    fastln.prepare(model, without=TRICKS)
    assert [stock_class(module) for module in model.modules()] == classes
    assert {isinstance(m, StockNorm) for m in model.modules() if is_stand_in(m)} == {True}
    model(**inputs).loss.backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_reference_is_plain_pytorch_throughout():
    decided = plan(make("llama"), backend="reference")
    assert {change.trick for change in decided.changes} == {
        "norms",
        "activations",
        "gated_mlps",
        "cache",
        "checkpointing",
    }
    stays = {stay.kind for stay in decided.stays}
    assert {"attention", "linear layer", "lm_head", "last block", "memory of large tensors"} <= stays
    decided = plan(make("blip"), backend="reference")
    assert not {"attention", "linears", "late_logits", "late_rows", "arena"} & {c.trick for c in decided.changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": "late_logit"}, "did you mean 'late_logits'"),
        ({"without": ("norms", "nothing")}, r"unknown name 'nothing' in `without` \(valid: norms, "),
        ({"activations": "recalculate"}, "unknown activations 'recalculate'.*valid: exact, again, recompute"),
        ({"products": "int4"}, "unknown"),
    ],
)
def test_what_does_not_exist_is_named(arguments, message):
    model = make("vit")
    for door in (plan, fastln.prepare):
        with pytest.raises(FastLNError, match=message):
            door(model, **arguments)


def test_the_table_groups_what_changes_and_what_stays():
    model = nn.Sequential(make("llama"), nn.GroupNorm(1, 4), nn.Tanh())
    model[0].model.layers[0].self_attn.config = copy.deepcopy(model[0].config)
    model[0].model.layers[0].self_attn.config._attn_implementation = "eager"
    decided = plan(model)
    assert str(decided) == decided.table()
    table = decided.table().splitlines()
    assert "160 of 28,840 parameters train" in table[0]
    assert any(line.split()[:4] == ["5", "RMSNorm", "fastln,", "float32"] for line in table)
    assert any("without='late_logits'" in line and "computed late" in line for line in table)
    stays = table[table.index("stays stock:") + 1 :]
    assert "  1 attention: its attention is set to 'eager'" in stays
    assert any(line.startswith("  1 GroupNorm: ") for line in stays)
    assert len(decided.changes) == sum(int(line.split()[0]) for line in table[2 : table.index("stays stock:")])


def test_prepare_logs_the_plan_in_five_lines_or_fewer(caplog):
    with caplog.at_level(logging.INFO, "fastln.prepare"):
        fastln.prepare(make("bert"))
    assert 2 <= len(caplog.messages) <= 5
    assert "6 LayerNorms → fastln, float32" in caplog.text
    assert "1 lm_head → computed late" in caplog.text


def test_stand_ins_are_what_they_were_to_isinstance_and_repr():
    model = make("llama")
    printed, classes = repr(model), [type(module) for module in model.modules()]
    fastln.prepare(model)
    assert repr(model) == printed
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    bert = fastln.prepare(make("bert"))
    assert isinstance(bert.bert.embeddings.LayerNorm, LayerNorm)


def test_a_changed_entry_is_another_plan():
    decided = plan(make("vit"))
    assert isinstance(decided.changes[0], Change)
    assert decided != plan(make("vit"), without="linears")
    assert decided == plan(make("vit"))


def test_tasks_plan_too(tmp_path):
    task = tiny.dual(tmp_path, tiny.phantom())
    assert plan(task.model, also=["fusion_head"]).also == ("fusion_head",)


def test_memory_that_stays_full_leaves_the_model_as_it_was(monkeypatch):
    model = make("llama").bfloat16()
    before, to, calls = looks(model), torch.Tensor.to, []

    def full(tensor, *args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("no memory is left")
        return to(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            fastln.prepare(model)
    assert len(calls) > 2
    assert looks(model) == before


def test_an_undoing_that_fails_does_not_keep_the_others_from_being_undone(monkeypatch):
    model = make("llama")
    classes = [type(module) for module in model.modules()]
    fastln.prepare(model)
    undo = prepared(model).undo
    monkeypatch.setattr(undo[len(undo) // 2], "remove", lambda: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        fastln.restore(model)
    assert prepared(model) is None
    assert sum(type(a) is not b for a, b in zip(model.modules(), classes, strict=True)) <= 1


def test_a_plan_for_another_dtype_or_eps_is_refused():
    with torch.device("meta"):
        decided = plan(make("llama"), device="cpu")
    model = make("llama").bfloat16()
    with pytest.raises(FastLNError, match=r"another dtype: model.layers.0.input_layernorm.weight is torch.float32"):
        apply(decided, model)
    model = make("llama")
    model.model.norm.variance_epsilon = 1e-2
    with pytest.raises(FastLNError, match=r"the norm 'model.norm' has eps .* in it, and 0.01 here"):
        apply(decided, model)


def test_a_plan_for_another_device_is_told_of(caplog):
    model = make("llama")
    apply(plan(model, device="cuda"), model)
    assert "the plan is for device cuda, and this model is on cpu: move it there" in caplog.text


def test_on_a_gpu_without_flash_attention_what_stays_is_said(monkeypatch):
    stays = {(stay.kind, stay.reason) for stay in plan(make("llama"), device="cuda").stays}
    assert any(kind == "attention" and "torch's scaled_dot_product_attention" in reason for kind, reason in stays)
    assert any(kind == "linear layer" and "torch's linear" in reason for kind, reason in stays)


def test_what_is_no_model_is_named():
    with pytest.raises(FastLNError, match=r"must be a torch.nn.Module, such as a transformers model; it is 'bert'"):
        fastln.prepare("bert")


def test_only_models_that_make_a_cache_or_can_checkpoint_are_told_about_it():
    kinds = [change.kind for change in plan(make("vit")).changes]
    assert "key-value cache" not in kinds
    assert "activation checkpoints" in kinds
    assert "key-value cache" in [change.kind for change in plan(make("llama")).changes]
