"""Models whose frozen linear layers are held in 8 bits: gradients, restore, adapters, copies, and what is noticed."""

import copy
import pickle

import pytest
import torch
from family_models import KINDS, of_kind
from int8_models import bert, gpt2, llama
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import fastln
from fastln import int8_rules
from fastln.errors import FastLNError
from fastln.fingerprint import fingerprint
from fastln.standins import int8
from fastln.standins.part import is_stand_in
from fastln_kernels import reference_int8
from fastln_kernels.cpu import products

WHY_NOT = products.why_not("int8")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def batch():
    return {
        "input_ids": torch.randint(9, 90, (2, 12), generator=torch.Generator().manual_seed(1)),
        "labels": torch.tensor([0, 1]),
    }


def step(model, **given):
    model.zero_grad()
    loss = model.train()(**(given or batch())).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cosine(got, want):
    assert got.keys() == want.keys()
    both = (torch.cat([grads[name].flatten().double() for name in want]) for grads in (got, want))
    return F.cosine_similarity(*both, dim=0).item()


def same(got, want):
    return got[0] == want[0] and all(torch.equal(got[1][name], grad) for name, grad in want[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_point_where_exact_ones_do(dtype):
    exact, rounded = fastln.prepare(bert()), fastln.prepare(bert(dtype), products="int8")
    want, got = step(exact), step(rounded)
    assert got[0] == pytest.approx(want[0], rel=0.02)
    assert cosine(got[1], want[1]) > 0.998


def test_a_layer_that_torch_s_encoder_reads_stays_exact():
    """In evaluation torch's encoder passes the weights of its layers to one operator, which knows no 8 bits."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 2, 256, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(128, 128)).eval()
    x = torch.randn(2, 5, 128)
    with torch.no_grad():
        want = model(x)
        fastln.prepare(model, products="int8")
        assert model[1].weight.dtype == torch.int8
        torch.testing.assert_close(model.eval()(x), want, rtol=0, atol=0.05)


class _StartsWithALayer(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.first, self.norm = nn.Linear(128, 128, bias=False), nn.LayerNorm(128)
        self.post_init()

    def forward(self, x):
        return self.norm(self.first(x.to(self.dtype)))


def test_a_model_whose_first_parameter_is_rounded_keeps_its_dtype():
    model = fastln.prepare(_StartsWithALayer(BertConfig()).to(torch.bfloat16), products="int8")
    assert [p.dtype for p in model.parameters()] == [torch.int8, torch.float32, torch.float32]
    assert model.dtype == torch.bfloat16
    assert model(torch.randn(2, 128)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [bert, gpt2])
def test_restore_gives_back_the_same_bits_if_they_were_kept(make):
    model, stock = make(), make()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    held = dict(model.named_parameters())
    fastln.prepare(model, products="int8", keep_weights=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int8}
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in model.state_dict().items())
    fastln.restore(model)
    assert all(p is held[name] and p.requires_grad == wanted[name] for name, p in model.named_parameters())
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in model.state_dict().items())
    assert not any(is_stand_in(module) for module in model.modules())


def test_restore_says_that_it_cannot_before_it_starts():
    model = fastln.prepare(bert(), products="int8")
    want = step(model)
    with pytest.raises(FastLNError, match="replaced 13 weights by their 8-bit form and did not keep them"):
        fastln.restore(model)
    with pytest.raises(FastLNError, match=r"already prepared, with products='int8', .* load the model anew"):
        fastln.prepare(model)
    assert same(step(model), want)


def test_a_failure_midway_leaves_the_model_as_it_was(monkeypatch):
    model = bert()
    held, calls = dict(model.named_parameters()), []

    def fails(*args, **more):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return put(*args, **more)

    put = int8.put
    monkeypatch.setattr(int8, "put", fails)
    with pytest.raises(KeyboardInterrupt):
        fastln.prepare(model, products="int8")
    assert all(p is held[name] for name, p in model.named_parameters())
    assert not any(is_stand_in(module) for module in model.modules())


def test_copies_and_casts():
    model = fastln.prepare(bert(), products="int8")
    want = step(model)
    assert same(step(copy.deepcopy(model)), want)
    assert same(step(pickle.loads(pickle.dumps(model))), want)
    layer = model.bert.encoder.layer[0].intermediate.dense
    scale = int8.weight_of(layer).scale
    narrow = step(model.to(torch.bfloat16))
    assert cosine(narrow[1], want[1]) > 0.99
    assert torch.equal(int8.weight_of(layer).scale, scale)  # no cast has rounded it
    assert int8.weight_of(layer).scale.dtype == torch.float32
    assert int8.dequantised(layer).dtype == torch.bfloat16


def test_adapters_know_the_original_base(tmp_path):
    base = fingerprint(bert())
    model = fastln.prepare(bert(), products="int8")
    assert fingerprint(model) == base
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight.mul_(1.5)
    fastln.save_adapter(model, tmp_path / "adapter")
    plain = bert()
    fastln.load_adapter(plain, tmp_path / "adapter")
    assert plain.bert.encoder.layer[0].output.LayerNorm.weight[0] == 1.5
    again = fastln.prepare(bert(), products="int8")
    fastln.load_adapter(again, tmp_path / "adapter")
    assert same(step(again), step(model))
    other = bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(1.01)
    with pytest.raises(FastLNError, match="frozen parameters differ"):
        fastln.load_adapter(fastln.prepare(other, products="int8"), tmp_path / "adapter")


def test_a_weight_that_is_changed_afterwards_is_noticed(tmp_path):
    model = fastln.prepare(bert(), products="int8")
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(FastLNError, match="was changed after"):
        step(model)
    with torch.no_grad():
        weight[0, 0] -= 1
    step(model)
    weight.data[0, 0] += 1  # autograd sees no write
    with pytest.raises(FastLNError, match="was changed after"):
        fastln.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("act", ["another parameter", "other data", "a written copy", "moved since", "merged"])
def test_a_weight_that_was_replaced_is_noticed(act):
    model = fastln.prepare(bert(), products="int8")
    if act == "a written copy":
        model = copy.deepcopy(model)
    layer = model.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        if act == "another parameter":
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape), requires_grad=False)
        elif act == "other data":
            layer.weight.data = torch.zeros_like(layer.weight)
        elif act == "merged":  # as peft does, which casts the sum to the weight's dtype
            layer.weight.data = (layer.weight.data + torch.randn(layer.weight.shape)).to(torch.int8)
        else:
            layer.weight.zero_()
    if act == "moved since":
        model.to("cpu")
    with pytest.raises(FastLNError, match=r"layer 'bert.encoder.layer.0.output.dense' was changed after"):
        step(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_own_state_dict_changes_nothing_and_the_base_stays_the_base(dtype):
    model = fastln.prepare(bert(dtype), products="int8")
    want, base = step(model), fingerprint(model)
    model.load_state_dict(model.state_dict())
    assert same(step(model), want)
    assert fingerprint(model) == base


def test_values_that_load_under_inference_mode_train():
    model, want = fastln.prepare(bert(), products="int8"), step(fastln.prepare(bert(), products="int8"))
    with torch.inference_mode():
        model.load_state_dict(bert().state_dict())
    assert same(step(model), want)


def test_what_is_kept_is_not_the_tensor_that_was_loaded():
    model, state = fastln.prepare(bert(), products="int8", keep_weights=True), bert().state_dict()
    model.load_state_dict(state)
    for value in state.values():
        value.zero_()
    fastln.restore(model)
    assert all(torch.equal(value, bert().state_dict()[name]) for name, value in model.state_dict().items())


def test_state_dicts_hold_floats_and_are_rounded_again(caplog):
    model, stock = fastln.prepare(bert(), products="int8"), bert()
    int8._told.clear()
    state = model.state_dict()
    assert "rounded to 8 bits: they are close to the original ones, not equal" in caplog.text
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in stock.state_dict().items()}
    for name, value in stock.state_dict().items():
        assert (state[name] - value).norm() <= 0.01 * value.norm() + 1e-9
    other = fastln.prepare(bert().apply(_shuffled), products="int8")
    assert not same(step(other), want := step(model))
    other.load_state_dict(stock.state_dict())
    assert same(step(other), want)
    assert fingerprint(other) == fingerprint(model)


def _shuffled(module):
    if isinstance(module, (nn.Linear, Conv1D)):
        nn.init.normal_(module.weight, std=0.05)


def test_biases_may_train_and_matrices_that_do_stay_exact():
    exact, rounded = (fastln.prepare(bert(), "bitfit", products=products) for products in ("exact", "int8"))
    assert cosine(step(rounded)[1], step(exact)[1]) > 0.99
    plan = fastln.plan(bert(), "LN", also=("bert.encoder.layer.0.output.dense",), products="int8")
    kinds = {change.name: change.products for change in plan.changes}
    assert kinds["bert.encoder.layer.1.output.dense"] == "int8"
    assert "bert.encoder.layer.0.output.dense" not in kinds


def test_a_head_is_rounded_again_after_its_weight_was_changed_in_any_way(monkeypatch):
    monkeypatch.setattr(int8_rules, "HEAD_GAIN", 0)
    head = fastln.prepare(gpt2(200), products="int8").lm_head
    held = head._rounded()
    assert head._rounded() is held
    for change in (lambda w: w.data.mul_(2), lambda w: w.mul_(0.25), lambda w: setattr(w, "data", w * 3)):
        with torch.no_grad():
            change(head.weight)
        now = reference_int8.dequantise_weight(head._rounded())
        assert (now - head.weight).abs().max() < head.weight.abs().max() / 100


def test_checkpointing_accumulation_and_late_rows_change_no_bit():
    labelled = {**batch(), "labels": batch()["input_ids"].clone()}
    labelled["labels"][:, :9] = -100
    want = step(fastln.prepare(gpt2(), products="int8", without="late_rows"), **labelled)
    late = step(fastln.prepare(gpt2(), products="int8"), **labelled)
    assert late[0] == pytest.approx(want[0], rel=1e-6)
    assert cosine(late[1], want[1]) > 0.999999
    model = fastln.prepare(bert(), products="int8")
    want = step(model)
    model.gradient_checkpointing_enable()
    assert same(step(model), want)
    twice = fastln.prepare(bert(), products="int8")
    for _ in range(2):
        twice(**batch()).loss.backward()
    grads = {name: p.grad / 2 for name, p in twice.named_parameters() if p.grad is not None}
    assert cosine(grads, want[1]) > 0.999999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [bert, llama])
def test_steps_on_one_and_two_threads_give_the_same_bits(make, dtype):
    ids = torch.randint(9, 90, (8, 40), generator=torch.Generator().manual_seed(2))  # enough rows for two threads
    given = {"input_ids": ids, "labels": torch.arange(8) % 2 if make is bert else ids}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = fastln.prepare(make(dtype), products="int8")
            step(model, **given)  # from now on kernels round the rows of the layers that follow
            found.append(step(model, **given))
    finally:
        torch.set_num_threads(before)
    assert same(*found)


def test_under_autocast_norms_still_get_float32_gradients():
    exact, rounded = fastln.prepare(bert()), fastln.prepare(bert(), products="int8")
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = step(rounded)
    want = step(exact)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert loss == pytest.approx(want[0], rel=0.02)
    assert cosine(grads, want[1]) > 0.99


def test_a_model_without_values_gets_them_rounded_as_they_load():
    with torch.device("meta"):
        model = bert()
    fastln.prepare(model, products="int8")
    model.load_state_dict(bert().state_dict(), strict=False, assign=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int8}
    assert not any(p.is_meta for p in model.parameters())
    layer, want = (m.bert.encoder.layer[0].output.dense for m in (model, fastln.prepare(bert(), products="int8")))
    torch.testing.assert_close(tuple(int8.weight_of(layer)), tuple(int8.weight_of(want)), rtol=0, atol=0)


@pytest.mark.slow(take=1)
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind(kind, monkeypatch):
    monkeypatch.setattr(int8_rules, "SMALLEST", 1)
    (model, *given), exact = of_kind(kind), fastln.prepare(of_kind(kind)[0])
    inputs = given[0] if given[1] is None else {**given[0], "labels": given[1]}
    rounded = fastln.prepare(model, products="int8", keep_weights=True)
    losses = []
    for prepared in (exact, rounded):
        torch.manual_seed(1)
        outputs = prepared(**inputs)
        results = [y for y in outputs.values() if isinstance(y, torch.Tensor) and y.requires_grad]
        loss = outputs["loss"] if "loss" in outputs and outputs["loss"] is not None else sum(y.sum() for y in results)
        loss.backward()
        losses.append({name: p.grad for name, p in prepared.named_parameters() if p.grad is not None})
    assert cosine(losses[1], losses[0]) > 0.97
    stock = dict(of_kind(kind)[0].named_parameters())
    fastln.restore(rounded)
    assert all(torch.equal(parameter, stock[name]) for name, parameter in rounded.named_parameters())


def test_heads_in_8_bits_follow_their_weight(monkeypatch):
    monkeypatch.setattr(int8_rules, "HEAD_GAIN", 0)
    labelled = {**batch(), "labels": batch()["input_ids"].clone()}
    exact, rounded = (fastln.prepare(gpt2(200), products=products) for products in ("exact", "int8"))
    heads = [c.products for c in fastln.plan(gpt2(200), products="int8").changes if c.kind == "lm_head"]
    assert heads == ["int8, turned"]
    want, got = step(exact, **labelled), step(rounded, **labelled)
    assert got[0] == pytest.approx(want[0], rel=0.01)
    assert cosine(got[1], want[1]) > 0.998
    with torch.no_grad():
        for model in (exact, rounded):
            model.lm_head.weight.mul_(3)  # and the embeddings', which share it
    assert step(rounded, **labelled)[0] == pytest.approx(step(exact, **labelled)[0], rel=0.02)
    for model in (exact, rounded):
        model.lm_head.weight.data = model.lm_head.weight.data / 9  # no write that autograd counts
    assert step(rounded, **labelled)[0] == pytest.approx(step(exact, **labelled)[0], rel=0.02)


def asked(model):
    """Return a model's loss and gradients on words as labels."""
    ids = batch()["input_ids"]
    return step(model, input_ids=ids, labels=ids)


def second_terms(model):
    return {name: held.rest for name, m in model.named_modules() if (held := m.__dict__.get(int8.WEIGHT)) and held.rest}


@pytest.mark.parametrize(("make", "n_terms"), [(llama, 7), (gpt2, 3)])
def test_second_terms_follow_their_layer_everywhere(make, n_terms):
    model, stock = fastln.prepare(make(), products="int8"), make()
    want, terms = asked(model), second_terms(model)
    assert len(terms) == n_terms
    assert same(asked(copy.deepcopy(model)), want)
    assert same(asked(pickle.loads(pickle.dumps(model))), want)
    state = model.state_dict()
    for name, value in stock.state_dict().items():
        bound = 1e-4 if name.removesuffix(".weight") in terms else 0.01
        assert (state[name] - value).norm() <= bound * value.norm() + 1e-9
    model.load_state_dict(state)  # its own, which changes nothing
    assert all(second_terms(model)[name] is rest for name, rest in terms.items())
    other = fastln.prepare(make().apply(_shuffled), products="int8")
    other.load_state_dict(stock.state_dict())
    assert same(asked(other), want)
    with torch.device("meta"):
        empty = make()
    fastln.prepare(empty, products="int8")
    empty.load_state_dict(stock.state_dict(), strict=False, assign=True)
    for name, rest in second_terms(empty).items():
        torch.testing.assert_close(tuple(rest), tuple(terms[name]), rtol=0, atol=0)
    model.to(torch.bfloat16)
    for name, rest in second_terms(model).items():
        torch.testing.assert_close(tuple(rest), tuple(terms[name]), rtol=0, atol=0)


def test_second_terms_that_were_changed_are_noticed(tmp_path):
    model = fastln.prepare(llama(), products="int8")
    next(iter(second_terms(model).values())).values[0, 0] += 1
    with pytest.raises(FastLNError, match="was changed after"):
        fastln.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_with_second_terms_are_merged_and_restored(make, tmp_path):
    model, stock = fastln.prepare(make(), products="int8", keep_weights=True), make().state_dict()
    assert second_terms(model)
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())
    norms = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        model.get_parameter(norms[0]).add_(0.5)
    fastln.merge_adapter(model, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").state_dict()
    assert torch.equal(merged[norms[0]], stock[norms[0]] + 0.5)
    assert all(torch.equal(value, stock[name]) for name, value in merged.items() if name != norms[0])
    fastln.restore(model)
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items() if name != norms[0])
    with torch.no_grad():
        model.get_parameter(norms[0]).sub_(0.5)
    assert same(asked(fastln.prepare(model)), asked(fastln.prepare(make())))
