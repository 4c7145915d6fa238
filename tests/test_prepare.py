"""prepare() and restore(): same numbers as the stock model, float32 trained norms, and everything put back."""

import copy
import pickle

import family_models
import pytest
import tiny
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import fastln
from fastln.data import GroupedBatches
from fastln.engines import put_method
from fastln.errors import FastLNError
from fastln.methods import norm_parameters
from fastln.standins.norm import LayerNorm
from fastln.training import TrainConfig, build_optimizer
from fastln.training.tasks import apply_method, finish


def small_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**tiny.SIZES, vocab_size=64, max_position_embeddings=32), add_pooling_layer=False)


def losses(task, engine, n_steps, data, learning_rate=1e-3):
    model = apply_method(task, "layernorm", engine)
    optimizer = build_optimizer(model, task, TrainConfig(learning_rate=learning_rate))
    model.train()
    found = []
    sampler = GroupedBatches(data, 8, seed=0)
    while len(found) < n_steps:
        for indices in sampler:
            loss = model(**task.collate([data[index] for index in indices], data)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found[:n_steps]


@pytest.mark.parametrize("kind", tiny.TASKS)
def test_losses_equal_plain_unfreezing_for_20_steps(kind, tmp_path):
    data = tiny.phantom()
    stock = losses(tiny.TASKS[kind](tmp_path, data), "torch", 20, data, learning_rate=5e-3)
    fast = losses(tiny.TASKS[kind](tmp_path, data), "fastln", 20, data, learning_rate=5e-3)
    assert stock[-1] != pytest.approx(stock[0], rel=1e-2), "nothing was learnt, so nothing is compared"
    assert fast == pytest.approx(stock, rel=1e-5)


@pytest.mark.parametrize("kind", tiny.TASKS)
def test_in_bfloat16_the_norms_move(kind, tmp_path):
    data = tiny.phantom()
    task = tiny.TASKS[kind](tmp_path, data, torch.bfloat16)
    names = [name for name in norm_parameters(task.model) if name.endswith("weight")]
    before = {name: task.model.get_parameter(name).detach().float().clone() for name in names}
    losses(task, "fastln", 20, data)
    moved = torch.cat([task.model.get_parameter(name).detach() != before[name] for name in names])
    assert moved.float().mean() >= 0.99


@pytest.mark.parametrize(("engine", "moves"), [("torch", False), ("fastln", True)])
def test_in_bfloat16_the_stock_way_leaves_norms_where_they_are(engine, moves, tmp_path):
    """Plain bfloat16 parameters under torch's own AdamW, at a rate that is usual elsewhere: γ = 1 swallows the step.

    A step is at most rate (1 - β1)/√(1 - β2) = 3.2e-4. Below 1 bfloat16's values lie 2^-8 = 3.9e-3 apart and above it
    7.8e-3, so less than half of 3.9e-3 is rounded away, every time.
    """
    data = tiny.phantom()
    task = tiny.dual(tmp_path, data, torch.bfloat16)
    ones = {name for name in norm_parameters(task.model) if bool((task.model.get_parameter(name) == 1).all())}
    assert len(ones) == 10, "γ of every norm"
    model = apply_method(task, "layernorm", engine)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, weight_decay=0.0)
    batch = task.collate(data.samples[:8], data)
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = torch.cat([model.get_parameter(name).detach() != 1 for name in ones]).float().mean()
    assert moved >= 0.99 if moves else moved == 0


def test_state_dict_keys_and_shapes_stay_and_restore_gives_stock_modules():
    model = small_bert().to(torch.bfloat16)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    implementation = model.config._attn_implementation
    assert fastln.prepare(model) is model
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms
    assert all(isinstance(norm, LayerNorm) for norm in norms)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained == dict.fromkeys(norm_parameters(model), torch.float32)
    with torch.no_grad():
        norms[0].weight.fill_(1.5)
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).last_hidden_state.pow(4).mean().backward()
    assert norms[0].weight.grad is not None
    assert fastln.restore(model) is model
    assert all(parameter.grad is None for parameter in model.parameters()), "of another dtype than the parameter"
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert all(type(norm) is nn.LayerNorm for norm in norms)
    assert norms[0].weight.dtype == torch.bfloat16
    assert bool((norms[0].weight == 1.5).all())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.config._attn_implementation == implementation


def test_a_prepared_model_can_be_copied_and_the_copy_trains_alone():
    model = fastln.prepare(small_bert())
    twin = copy.deepcopy(model)
    twin(input_ids=torch.ones(1, 4, dtype=torch.long)).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())
    fastln.restore(twin)
    assert any(isinstance(module, LayerNorm) for module in model.modules())


def test_a_float64_model_stays_one():
    model, tokens = small_bert().double().train(False), torch.arange(8).view(1, 8)
    want = model(input_ids=tokens).last_hidden_state
    fastln.prepare(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    got = model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    stock = torch.autograd.grad(want.pow(4).sum(), model.get_parameter("embeddings.LayerNorm.weight"))
    ours = torch.autograd.grad(got.pow(4).sum(), model.get_parameter("embeddings.LayerNorm.weight"))
    torch.testing.assert_close(ours, stock, rtol=1e-11, atol=1e-11)


class MarkedNorm(nn.LayerNorm):
    """A subclass with a method of its own and LayerNorm's forward."""

    def name(self):
        return self.mark


def marked() -> nn.ModuleDict:
    """Two names for one norm in bfloat16, with an attribute and a hook that doubles what comes out."""
    norm = MarkedNorm(8)
    norm.mark = "first"
    norm.register_forward_hook(_twice)
    return nn.ModuleDict({"norm": norm, "other": nn.Linear(8, 8), "again": norm}).to(torch.bfloat16)


def _twice(module, args, output):
    return 2 * output


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_of_a_prepared_model_computes_and_does_not_remember():
    model = fastln.prepare(small_bert()).eval()
    tokens, others = torch.arange(64).view(2, 32), torch.arange(64).flip(0).view(2, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, (tokens,), strict=False, check_trace=False)
        torch.testing.assert_close(traced(others)["last_hidden_state"], model(others).last_hidden_state)


@pytest.mark.parametrize("where", ["LayerNorm", "dense"])
def test_a_parametrization_of_a_stand_in_works_and_goes_before_restore(where):
    model = small_bert()
    module = model.get_submodule(f"encoder.layer.0.output.{where}")
    stock = type(module)
    fastln.prepare(model, backend="reference" if where == "LayerNorm" else "auto")
    stand_in, tokens = type(module), torch.arange(32)[None]
    plain = model.eval()(tokens).last_hidden_state
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    assert torch.equal(model(tokens).last_hidden_state, plain)
    parametrized = type(module)
    with pytest.raises(FastLNError, match=rf"0.output.{where}.parametrizations.weight.original: .*remove_parametriz"):
        fastln.restore(model)
    assert type(module) is parametrized, "the model stays as it was"
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert type(module) is stand_in
    assert type(fastln.restore(model).get_submodule(f"encoder.layer.0.output.{where}")) is stock


def test_restore_gives_the_very_modules_back():
    model = marked()
    norm, weight, attributes = model["norm"], model["norm"].weight, set(vars(model["norm"]))
    fastln.prepare(model)
    assert isinstance(norm, LayerNorm)
    model.eval()
    fastln.restore(model)
    assert model["norm"] is model["again"] is norm
    assert type(norm) is MarkedNorm
    assert set(vars(norm)) == attributes
    assert norm.name() == "first"
    assert norm.weight is weight
    assert not norm.training


def test_hooks_fire_on_prepared_norms():
    model = marked()
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    stock = model["norm"](x)
    fastln.prepare(model)
    torch.testing.assert_close(model["norm"](x), stock)
    fastln.restore(model)
    assert torch.equal(model["norm"](x), stock)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_duplicate_restores_to_its_own_parameters(duplicate):
    model = fastln.prepare(marked())
    twin = duplicate(model)
    weight = twin["norm"].weight
    with torch.no_grad():
        weight.fill_(1.5)
    fastln.restore(twin)
    assert type(twin["norm"]) is MarkedNorm
    assert twin["norm"].weight is weight
    assert twin["norm"].name() == "first"
    assert bool((model["norm"].weight == 1).all())
    assert isinstance(model["norm"], LayerNorm)


@pytest.mark.parametrize(("backend", "attention"), [("auto", "fastln"), ("cpu", "fastln"), ("reference", "sdpa")])
def test_backend_reaches_attention(backend, attention):
    model = fastln.prepare(small_bert(), backend=backend)
    module = model.encoder.layer[0].attention.self
    assert module.config._attn_implementation == attention
    fastln.restore(model)
    assert module.config is model.config
    assert model.config._attn_implementation == "sdpa"


class MeanAbsoluteNorm(nn.Module):
    def __init__(self, n_cols):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_cols))
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_a_norm_without_a_fast_form_trains_with_its_stock_code(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), MeanAbsoluteNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    stock = model(x)
    with caplog.at_level("INFO"):
        fastln.prepare(model)
    assert "1 (MeanAbsoluteNorm)" in caplog.text
    out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), stock.float(), rtol=2e-2, atol=2e-2)
    out.float().square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(grads) == 3
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    fastln.restore(model)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_scope_tunes_one_sub_model(tmp_path):
    model = tiny.dual(tmp_path, tiny.phantom()).model
    fastln.prepare(model, scope="vision", without="random_heads")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name in norm_parameters(model) if name.startswith("vision.")]


@pytest.mark.parametrize(
    ("scope", "inside"),
    [
        ("encoder.layer.1", lambda name: "layer.1." in name),
        ("*.attention.*", lambda name: ".attention." in name),
        (("encoder.layer.?", "not:*.attention"), lambda name: "layer" in name and ".attention." not in name),
        ("not:embeddings", lambda name: "embeddings" not in name),
        (
            ("not:embeddings", "not:encoder.layer.0.output.LayerNorm"),
            lambda name: "layer.1" in name or ".0.att" in name,
        ),
    ],
)
def test_a_scope_may_name_modules_by_pattern_and_leave_them_out(scope, inside):
    model = fastln.prepare(small_bert(), scope=scope)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name in norm_parameters(model) if inside(name)] != []


def test_a_notation_by_sub_model_may_leave_modules_out():
    whole = fastln.plan(small_bert(), "LN")
    some = fastln.plan(small_bert(), "LN", scope="not:encoder.layer.0")
    assert whole.trained - some.trained == {name for name in norm_parameters(small_bert()) if "layer.0" in name}


def test_bitfit_asks_a_norm_for_dbeta_alone():
    model = fastln.prepare(small_bert(), "bitfit")
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).last_hidden_state.square().sum().backward()
    norm = model.encoder.layer[0].output.LayerNorm
    assert norm.weight.grad is None
    assert norm.bias.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "layernrm"}, "did you mean 'layernorm'"),
        ({"method": "lora"}, "adds peft modules to the model"),
        ({"scope": "visoin"}, "did you mean 'vision'"),
        ({"scope": "decoder"}, r"matches nothing in BertModel \(it has no sub-models; name modules\)"),
        ({"scope": ()}, "scope is empty"),
        ({"scope": "encoder.layer.7"}, "unknown scope 'encoder.layer.7'; did you mean 'encoder.layer.[01]'"),
        ({"scope": "not:embeddings.dropout"}, "embeddings.dropout has no parameter of its own in BertModel"),
        ({"scope": ("vision", "not:encoder")}, "scope 'vision' matches nothing in BertModel"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_what_does_not_exist_is_named_and_leaves_the_model_alone(arguments, message):
    model = small_bert()
    with pytest.raises(FastLNError, match=message):
        fastln.prepare(model, **arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, LayerNorm) for module in model.modules())


def test_preparing_twice_and_restoring_nothing_are_errors():
    model = small_bert()
    with pytest.raises(FastLNError, match="not prepared"):
        fastln.restore(model)
    fastln.prepare(model)
    with pytest.raises(FastLNError, match="already prepared"):
        fastln.prepare(model)


FINISHING = ["layernorm/fastln", "layernorm/peft", "layernorm/torch", "lora/fastln", "lora/peft", "full/torch"]


@pytest.mark.parametrize("method", FINISHING)
def test_finish_gives_a_stock_model_that_answers_as_the_trained_one(method, tmp_path):
    data = tiny.phantom()
    task = tiny.dual(tmp_path, data)
    keys = set(task.model.state_dict())
    trained = apply_method(task, *method.split("/"))
    optimizer = build_optimizer(trained, task, TrainConfig(method=method.split("/")[0], learning_rate=1e-2))
    batch = task.collate(data.samples[:8], data)
    for _ in range(3):
        trained(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.eval()
    with torch.no_grad():
        expected = trained(**batch).logits
        finish(task, trained)
        task.model.eval()
        assert set(task.model.state_dict()) == keys
        torch.testing.assert_close(task.model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_model_inside_a_prepared_one_or_around_it_is_refused_and_restore_is_whole(inner_first):
    model = BertForMaskedLM(BertConfig(**tiny.SIZES, vocab_size=64, max_position_embeddings=32))
    before = [type(module) for module in model.modules()]
    first, second = (model.bert, model) if inner_first else (model, model.bert)
    fastln.prepare(first)
    with pytest.raises(FastLNError, match="already prepared"):
        fastln.prepare(second)
    fastln.restore(first)
    assert [type(module) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_restore_leaves_attention_as_the_user_set_it_since():
    model = fastln.prepare(small_bert())
    model.set_attn_implementation("eager")
    fastln.restore(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_cast_after_it_was_prepared_is_warned_of(recwarn):
    model, tokens = fastln.prepare(small_bert()), torch.arange(8).view(1, 8)
    model(input_ids=tokens)
    assert not [w for w in recwarn if "cast after" in str(w.message)]
    with pytest.warns(UserWarning, match="cast after fastln.prepare"):
        model.to(torch.bfloat16)(input_ids=tokens)


@pytest.mark.parametrize("engine", ["torch", "peft"])
@pytest.mark.parametrize(
    "given", [{"without": "arena"}, {"backend": "cpu"}, {"products": "int8"}, {"keep_weights": True}]
)
def test_what_other_engines_do_not_have_is_refused_and_leaves_the_model_alone(engine, given):
    model = small_bert()
    with pytest.raises(FastLNError, match=f"engine '{engine}' runs stock code"):
        put_method(model, "layernorm", engine, **given)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("to", [torch.float32, torch.float64])
def test_a_model_that_was_cast_after_it_was_prepared_runs_and_is_restored_in_its_new_dtype(name, to):
    stock = family_models.make(name).bfloat16().to(to).eval()
    model = fastln.prepare(family_models.make(name).bfloat16(), backend="reference").to(to).eval()
    with torch.no_grad():
        losses = [one(**family_models.batch(name)).loss for one in (model, stock)]
        model.get_parameter(norm_parameters(model)[0])[0] = 1.001
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    fastln.restore(model)
    assert {p.dtype for p in model.parameters()} == {to}
    assert model.get_parameter(norm_parameters(model)[0])[0].item() == pytest.approx(1.001, abs=1e-6)
