"""Storage modes beside what else a training has: dropout, autocast, graphs used twice, copies, compilers, adapters."""

import copy
import io
import logging

import pytest
import torch
import transformers
from family_models import BERT, batch, make

import fastln
from fastln import budget, merge_adapter
from fastln.families.parts import blocks_of
from fastln.memory import SavedActivations
from fastln.ops import again
from fastln.ops.settings import STORAGES
from fastln.peak import step_memory
from fastln.standins import whole_block
from fastln.standins.whole_block import WholeBlock
from fastln.state import prepared

MODES = [name for name in STORAGES if name not in ("exact", "offload")]
EQUAL = ("again", "recompute", "checkpoint")  # what they keep is not rounded


def bert():
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT | dropout)).train()


def model_and_batch(name):
    return (bert() if name == "bert" else make(name)), batch(name)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model, inputs, dtype=None, forward=None):
    torch.manual_seed(1)  # what dropout draws
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return (model if forward is None else forward)(**inputs).loss


def step(model, inputs, dtype=None, forward=None):
    """Return the loss, the gradients and what was saved for backward."""
    model.zero_grad()
    with SavedActivations(model) as saved:
        loss = loss_of(model, inputs, dtype, forward)
    loss.backward()
    return loss.item(), [parameter.grad for parameter in trained(model)], saved.bytes


def distance(got, want):
    got, want = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (got, want))
    return ((got - want).norm() / want.norm()).item()


# Rows are 32 wide here, so what 4 and 2 bits leave out does not average out as in real models.
WORST = {"kept": 0, 8: 0.05, 4: 0.25, 2: 0.5, "again": 0.05}


def check(got, want, mode):
    """Same loss, and the gradients as far as the mode rounds."""
    assert got[0] == want[0]
    if mode in EQUAL:
        assert distance(got[1], want[1]) == 0
    else:
        assert 0 < distance(got[1], want[1]) < WORST[STORAGES[mode].hidden]
    assert got[2] < want[2]


@pytest.mark.slow(take=5)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
@pytest.mark.parametrize("mode", MODES)
def test_dropout_and_autocast(mode, name, dtype):
    exact, inputs = model_and_batch(name)
    model = copy.deepcopy(exact)
    want = step(fastln.prepare(exact), inputs, dtype)
    check(step(fastln.prepare(model, activations=mode), inputs, dtype), want, mode)


@pytest.mark.slow(take=3)
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("mode", MODES)
def test_graphs_that_are_used_more_than_once_or_in_part(mode, name):
    model, inputs = model_and_batch(name)
    fastln.prepare(model, activations=mode)
    norms = trained(model)
    loss = loss_of(model, inputs)
    some = torch.autograd.grad(loss, [norms[0], norms[-1]], retain_graph=True)
    first = torch.autograd.grad(loss, norms, retain_graph=True)
    second = torch.autograd.grad(loss, norms)
    assert distance(second, first) == 0
    assert distance(some, [first[0], first[-1]]) == 0
    # Two graphs at once, and one after the other.
    (loss_of(model, inputs) + loss_of(model, inputs)).backward()
    assert distance([norm.grad for norm in norms], [2 * gradient for gradient in first]) < 1e-6
    for _ in range(2):
        loss_of(model, inputs).backward()
    assert distance([norm.grad for norm in norms], [4 * gradient for gradient in first]) < 1e-6
    # A backward pass that runs under autocast, as the forward pass did or did not.
    for dtype in (None, torch.bfloat16):
        want = [gradient.clone() for gradient in step(model, inputs, dtype)[1]]
        model.zero_grad()
        loss = loss_of(model, inputs, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        assert distance([norm.grad for norm in norms], want) < 1e-2


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("name", ["bert", "llama", "blip"])
@pytest.mark.parametrize("mode", MODES)
def test_copies_pickles_adapters_merged_models_and_restore(mode, name, tmp_path):
    stock, inputs = model_and_batch(name)
    model = fastln.prepare(copy.deepcopy(stock), activations=mode)
    with torch.no_grad():
        for norm in trained(model):
            norm += 0.01 * torch.randn_like(norm)
    want = step(model, inputs)
    twin, pickled = copy.deepcopy(model), io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    fastln.save_adapter(model, tmp_path / "adapter")
    merge_adapter(model, tmp_path / "merged")
    others = {
        "copied": twin,
        "pickled": torch.load(pickled, weights_only=False),
        "with an adapter": fastln.prepare(copy.deepcopy(stock), activations=mode),
        "merged": fastln.prepare(type(stock).from_pretrained(tmp_path / "merged").train(), activations=mode),
    }
    fastln.load_adapter(others["with an adapter"], tmp_path / "adapter")
    for how, other in others.items():
        got = step(other, inputs)
        assert got[0] == want[0], how
        assert distance(got[1], want[1]) == 0, how
        assert got[2] == want[2], how
    exact = type(stock).from_pretrained(tmp_path / "merged").train()
    for other in (fastln.restore(twin), fastln.restore(model)):
        assert step(other, inputs)[2] == step(exact, inputs)[2]
        assert not other.is_activation_checkpointing


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("name", ["llama", "vit", "opt"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_and_logits_that_wait(mode, name):
    stock, inputs = model_and_batch(name)
    found = []
    for without in ((), ("late_logits", "late_rows")):
        model = fastln.prepare(copy.deepcopy(stock), activations=mode, without=without)
        outputs = model(**inputs)
        outputs.loss.backward()
        found.append((outputs.loss.item(), [norm.grad for norm in trained(model)], outputs.logits.detach() + 0))
    (loss, gradients, logits), (want_loss, want_gradients, want_logits) = found
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert distance(gradients, want_gradients) < 1e-5
    torch.testing.assert_close(logits, want_logits)


@pytest.fixture
def _compiled_anew():
    torch.compiler.reset()
    for say in (again._say, budget._say):
        say.cache_clear()
    yield
    torch.compiler.reset()


CASES = [  # in the pools of tests/standins/test_compiled_models.py
    pytest.param(name, mode, backend, marks=pytest.mark.slow(pool=backend))
    for backend in ("aot_eager", "inductor")
    for name in ("bert", "vit", "llama")
    for mode in ("again", "recompute", "compressed", "compressed-recompute", "checkpoint")
]


@pytest.mark.usefixtures("_compiled_anew")
@pytest.mark.parametrize(("name", "mode", "backend"), CASES)
def test_compiled_steps(name, mode, backend, caplog):
    stock, inputs = make(name), batch(name)
    model, exact = (fastln.prepare(copy.deepcopy(stock), activations=own) for own in (mode, "exact"))
    want = step(model, inputs)
    compiled, plain = (torch.compile(one, backend=backend, fullgraph=True) for one in (model, exact))
    step(model, inputs, forward=compiled)
    got = step(model, inputs, forward=compiled)
    step(exact, inputs, forward=plain)
    kept = step(exact, inputs, forward=plain)[2]
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    # Modes that make rows again from codes read rounded rows there; compiled, they keep the rows.
    assert distance(got[1], want[1]) < (1e-2 if mode == "compressed-recompute" else 1e-5)
    if mode in ("again", "recompute"):
        assert caplog.text.count("the compiler decides itself what its code keeps") == 1
        assert got[2] == kept
    else:
        assert got[2] < kept


@pytest.mark.usefixtures("_compiled_anew")
@pytest.mark.slow(pool="aot_eager")
def test_a_budget_waits_for_no_compiled_batch(caplog):
    model = fastln.prepare(make("vit"), memory_budget="8GiB")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(model, batch("vit"), forward=compiled)
    assert caplog.text.count("the first batch cannot decide in compiled code") == 1


def checkpointed(model):
    return [layer.gradient_checkpointing for layer in model.modules() if hasattr(layer, "_gradient_checkpointing_func")]


def test_gradient_checkpointing_says_which_mode_it_is(caplog):
    model, inputs = make("llama"), batch("llama")
    fastln.prepare(model)
    want = step(model, inputs)
    model.activation_checkpointing_enable()
    got = step(model, inputs)
    step(model, inputs)
    line = (
        "in 2 of 2 blocks that is the storage mode activations='checkpoint', without reentry; activations='recompute'"
    )
    assert caplog.text.count(line) == 1
    assert got[2] < want[2]
    assert distance(got[1], want[1]) == 0
    assert got[2] == step(fastln.prepare(make("llama"), activations="checkpoint"), inputs)[2]
    assert caplog.text.count(line) == 1  # our own mode needs no explanation
    # A mode of ours inside counts only where rows wait, which is outside of checkpoints.
    both = fastln.prepare(make("llama"), activations="compressed-recompute")
    both.activation_checkpointing_enable()
    assert step(both, inputs)[2] <= got[2]
    model.activation_checkpointing_disable()
    assert step(model, inputs)[2] == want[2]


@pytest.mark.parametrize("how", ["checkpoint", "offload"])
def test_transformers_switch_leaves_a_mode_of_whole_blocks_as_it_is(how, caplog):
    """In offload the host keeps what is saved; on a CPU that is memory of the same size."""
    whole_block._say_that_it_stays.cache_clear()
    model, inputs = fastln.prepare(make("llama")), batch("llama")
    want = step(model, inputs)[1]
    blocks = [
        WholeBlock([model.get_submodule(name) for name in layers], how, model) for layers in blocks_of(model).values()
    ]
    for block in blocks:
        block.put()
        prepared(model).undo.append(block)
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert distance(step(model, inputs)[1], want) == 0
    model.activation_checkpointing_enable()
    assert distance(step(model, inputs)[1], want) == 0
    model.activation_checkpointing_disable()
    assert "keep that" not in caplog.text
    assert distance(step(model, inputs)[1], want) == 0
    assert caplog.text.count(f"blocks whose storage mode is '{how}' keep that") == 1
    assert checkpointed(model)[-2:] == [True, True]
    now = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert [function.func for function in now] == [function.func for function in functions]
    fastln.restore(model)
    assert not model.is_activation_checkpointing
    assert not model._forward_pre_hooks
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing


def test_a_mode_of_whole_blocks_where_there_are_none_says_so():
    layers = [torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU()]
    plan = fastln.plan(torch.nn.Sequential(*layers), activations="checkpoint")
    assert any("no block of this model is known" in note for note in plan.notes)
    assert not fastln.plan(make("vit"), activations="checkpoint").notes


def test_copies_of_a_model_with_a_budget_decide_too(caplog):
    caplog.set_level(logging.WARNING)
    inputs = batch("llama")
    exact, least = (
        step_memory(fastln.prepare(budget.outline_of(make("llama")), activations=mode), inputs).peak
        for mode in ("exact", "compressed-recompute")
    )
    model = fastln.prepare(make("llama"), memory_budget=(exact + least) // 2)
    before, pickled = copy.deepcopy(model), io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    want = step(model, inputs)
    others = [before, torch.load(pickled, weights_only=False), copy.deepcopy(model)]
    for other in others:
        got = step(other, inputs)
        assert got[2] == want[2]
        assert distance(got[1], want[1]) == 0
    assert caplog.text.count("predicted peak") == 3  # the last copy knows what was decided
    plain = step(fastln.restore(fastln.prepare(make("llama"))), inputs)
    for other in (model, *others):
        assert step(fastln.restore(other), inputs)[2] == plain[2]


def test_a_batch_that_does_not_fit_does_not_fit_the_second_time():
    inputs = batch("llama")
    model = fastln.prepare(make("llama"), memory_budget=150_000)
    for _ in range(2):
        with pytest.raises(fastln.FastLNError, match="is too little for this batch"):
            model(**inputs)
