"""The count of what is saved for backward, by hand and on the meta device; footprints; and the peak of a process."""

import copy
import itertools
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from family_models import BERT, LLAMA, batch, make, of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from fastln import int8_rules, ops
from fastln.memory import AsOnCPU, Footprint, SavedActivations, footprint
from fastln.methods import norm_parameters
from fastln.ops import OpSettings
from fastln.plan import apply, plan
from fastln.training import MasterAdamW
from fastln_kernels.cpu import products as kernels
from fastln_kernels.reference_int8 import quantise_weight

WHY_NOT = kernels.why_not("int8")


def test_a_chain_of_known_tensors():
    x = torch.randn(10, 100, requires_grad=True)
    with SavedActivations(nn.Module()) as saved:
        y = x.exp()  # saves its result: 4,000 bytes
        z = y.sin()  # saves its input: the same storage
        z.cos().sum()  # saves z: another 4,000
    assert saved.bytes == 8000


def test_parameters_and_buffers_do_not_count():
    model = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 5, bias=False))
    model.register_buffer("scale", torch.randn(5))
    x = torch.randn(7, 30)
    with SavedActivations(model) as saved:
        loss = (model(x) * model.scale).sum()
    # Weight gradients need the inputs: x (7 x 30) and the hidden layer (7 x 20); the product with the buffer saves
    # the buffer alone, as the buffer itself needs no gradient.
    assert saved.bytes == 4 * (7 * 30 + 7 * 20)
    loss.backward()
    assert model[0].weight.grad is not None


def test_frozen_layers_save_nothing():
    model = nn.Linear(30, 20).requires_grad_(False)
    x = torch.randn(7, 30, requires_grad=True)
    with SavedActivations(model) as saved:
        model(x)
    assert saved.bytes == 0


def test_views_count_once_and_as_the_whole_storage():
    x = torch.randn(100, requires_grad=True)
    y = x * 1.0
    with SavedActivations(nn.Module()) as saved:
        y[:10].sin()
        y[50:].sin()
    assert saved.bytes == 400


def test_a_graph_that_was_counted_is_freed_with_its_last_tensor():
    x = torch.randn(100, requires_grad=True)
    with SavedActivations(nn.Module()):
        y = x.exp()  # saves its own result
    gone = weakref.ref(y)
    del y
    assert gone() is None


def test_what_is_counted_still_gives_its_gradients():
    x = torch.randn(100, requires_grad=True)
    with SavedActivations(nn.Module()):
        y = x.exp().sin().sum()
    (gradient,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(gradient, x.exp().cos() * x.exp())


def test_only_what_is_saved_inside_the_context_counts():
    x = torch.randn(100, requires_grad=True)
    saved = SavedActivations(nn.Module())
    x.exp()
    with saved:
        pass
    x.exp()
    assert saved.bytes == 0


def test_memory_that_is_freed_and_used_again_counts_again():
    memory = np.zeros(100, np.float32)

    class SavesTheSameMemory(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(torch.from_numpy(memory))  # another storage each time, at one address
            return x.clone()

    x = torch.randn(100, requires_grad=True)
    with SavedActivations(nn.Module()) as saved:
        for _ in range(20):
            SavesTheSameMemory.apply(x)
    assert saved.bytes == 20 * memory.nbytes


def test_the_count_keeps_no_memory():
    x = torch.randn(100, requires_grad=True)
    with SavedActivations(nn.Module()) as saved:
        y = x.exp()
    storage = StorageWeakRef(y.untyped_storage())
    assert not storage.expired()
    del y
    assert storage.expired()
    assert saved.bytes == 400


def test_on_the_meta_device_storages_are_told_apart_and_views_are_not():
    model = nn.Linear(30, 20, device="meta")
    x = torch.empty(7, 30, device="meta", requires_grad=True)
    with SavedActivations(model) as saved:
        y = model(x).sin()  # saves x for the weight's gradient, and the layer's result
        y[:3].cos()
        y[3:].cos()
    assert saved.bytes == 4 * (7 * 30 + 7 * 20 + 7 * 20)


def on_meta(inputs):
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def norms_alone(model):
    trained = set(norm_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def prepared_all_at_once(model):
    """On the meta device nothing waits."""
    apply(plan(model, device="cpu", without=("late_logits", "late_rows")), model)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("change", [norms_alone, prepared_all_at_once])
@pytest.mark.parametrize(
    "name", ["bert", "llama", "gemma2", "gpt2", "opt", "t5", "blip", "llava", "dinov2, swiglu", "clip"]
)
def test_a_model_on_meta_saves_what_it_does_on_a_cpu(name, change, dropout):
    model = make(name)
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and key != "layerdrop" and (key == "p" or "drop" in key):
                setattr(module, key, dropout)
    counted = []
    for each, inputs in ((model, batch(name)), (copy.deepcopy(model).to("meta"), on_meta(batch(name)))):
        change(each)
        with SavedActivations(each) as saved:
            output = each(**inputs)
        assert output.loss.requires_grad
        counted.append(saved.bytes)
    assert counted[0] == counted[1]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_on_meta_what_waits_on_a_cpu_counts_whole(name):
    model = make(name).to("meta")
    late, at_once = copy.deepcopy(model), model
    apply(plan(late, device="cpu"), late)
    prepared_all_at_once(at_once)
    counted = []
    for each in (late, at_once):
        with SavedActivations(each) as saved:
            each(**on_meta(batch(name)))
        counted.append(saved.bytes)
    assert counted[0] == counted[1]


ATTENTION = [{}, {"scale": 0.3}, {"enable_gqa": True}, {"dropout_p": 0.1}]


@pytest.mark.parametrize(
    ("mask", "options"),
    [(None, {"is_causal": True}), *itertools.product((None, torch.bool, torch.float32), ATTENTION)],
)
def test_torch_s_own_attention_on_meta_saves_what_a_cpu_does(mask, options):
    counted = []
    for device in ("cpu", "meta"):
        n_keys = 1 if "enable_gqa" in options else 4
        q, k, v = (torch.ones(2, n, 12, 8, device=device, requires_grad=True) for n in (4, n_keys, n_keys))
        seen = None if mask is None else torch.ones(2, 1, 12, 12, dtype=mask, device=device)
        with SavedActivations(nn.Linear(1, 1, device=device)) as saved:
            scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)
        counted.append(saved.bytes)
    assert counted[0] == counted[1]


def test_questions_about_values_are_answered_on_meta_alone():
    mask = torch.zeros(3, dtype=torch.bool)
    with AsOnCPU():
        assert not mask.all()
        assert mask.to("meta").all()
        assert mask.to("meta").all().item() is True
        with pytest.raises(RuntimeError, match="meta"):
            torch.ones(1, device="meta").item()
    with pytest.raises(RuntimeError, match="meta"):
        bool(mask.to("meta").all())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_footprint(device):
    model = nn.Sequential(nn.Linear(30, 20, bias=False), nn.LayerNorm(20)).to(device)
    model[0].requires_grad_(False).bfloat16()
    model.register_buffer("scale", torch.ones(5, device=device))
    model[1].bias = nn.Parameter(torch.zeros(20, device=device, dtype=torch.bfloat16))
    got = footprint(model, saved=2**20)
    # Of the optimizer 8 bytes a trained number, and 4 more where it is not float32.
    want = Footprint(weights=2 * 600 + 4 * 20 + 2 * 20 + 4 * 5, gradients=6 * 20, optimizer=20 * (8 + 12), saved=2**20)
    assert got == want
    assert got.total == 1200 + 80 + 40 + 20 + 120 + 400 + 2**20


def test_a_footprint_in_words():
    sizes = Footprint(weights=2**31, gradients=2**20, optimizer=2**21, saved=2**19)
    assert sizes.describe() == ("2,051.5 MiB: weights 2,048.0, gradients 1.0, optimizer 2.0, stored for backward 0.5")
    assert sizes.describe("saved by one batch").endswith("optimizer 2.0, saved by one batch 0.5")


PEAKS = """
import torch
from fastln.memory import peak_bytes, reset_peak
cpu = torch.device("cpu")
reset_peak(cpu)
print(peak_bytes(cpu))
torch.ones(64 * 2**20)  # gone at once
print(peak_bytes(cpu))
reset_peak(cpu)
print(peak_bytes(cpu))
"""


def test_peak_sees_memory_that_is_gone_and_forgets_what_was_before():
    # In a process of its own: this one may keep what other tests have freed.
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert during - before == pytest.approx(256 * 2**20, rel=0.1)
    assert after < during - 128 * 2**20


def live_bytes(profile):
    """What was allocated while the profiler ran, and not freed."""
    nodes, events = list(profile.profiler.kineto_results.experimental_event_tree()), []
    for node in nodes:
        nodes += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    live = {}
    for _, pointer, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            live[pointer] = size
        else:
            live.pop(pointer, None)  # None: it was there before, such as what an earlier test left to Python
    return sum(live.values())


WIDE = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2000, "num_attention_heads": 4}
WIDER = {
    "bert": of("BertForMaskedLM", "BertConfig", **BERT | WIDE),
    "llama": of("LlamaForCausalLM", "LlamaConfig", **LLAMA | WIDE),
}
CASES = [("exact", False), ("int8", False), ("int8", True)]


@pytest.mark.parametrize(("products", "keep"), CASES)
@pytest.mark.parametrize("name", WIDER)
def test_a_prediction_on_meta_is_what_lives_between_forward_and_backward(name, products, keep):
    settings = {"products": products, "keep_weights": keep, "without": ("late_logits", "late_rows")}
    inputs = batch(name)
    with torch.device("meta"):
        on_paper = WIDER[name]().bfloat16()
    apply(plan(on_paper, device="cpu", **settings), on_paper)
    with SavedActivations(on_paper) as saved:
        on_paper(**on_meta(inputs))
    predicted = footprint(on_paper, saved.bytes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        model = WIDER[name]().bfloat16()
        apply(plan(model, **settings), model)
        optimizer = MasterAdamW([p for p in model.parameters() if p.requires_grad])
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        output = model(**inputs)
    # Gradients are not there while the rest is saved; the test holds the logits.
    assert live_bytes(traced) == pytest.approx(predicted.total - predicted.gradients + output.logits.nbytes, rel=0.01)


def test_rows_in_8_bits_count_while_they_are_at_hand():
    x, weight = torch.randn(16, 128, requires_grad=True), quantise_weight(torch.randn(64, 128))
    settings = OpSettings(backend="reference")
    ops.int8_linear(x, weight, settings=settings)  # before the context
    with SavedActivations(nn.Module()) as exact:
        x.exp()
    with SavedActivations(nn.Module()) as saved:
        y = ops.int8_linear(x, weight, settings=settings)
    assert y.requires_grad
    own = sum(part.nbytes for part in weight if isinstance(part, torch.Tensor))
    assert exact.bytes == 4 * 16 * 128
    assert saved.bytes == own + 16 * 128 + 4 * 16  # no module has the weight here


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_head_in_8_bits_counts_before_it_is_made(monkeypatch):
    monkeypatch.setattr(int8_rules, "HEAD_GAIN", 0)
    model = WIDER["llama"]()
    exact = footprint(copy.deepcopy(model), saved=0).weights
    apply(plan(model, products="int8"), model)
    before = footprint(model, saved=0).weights
    head = model.lm_head.weight
    assert sum(part.nbytes for part in model.lm_head.tensors_beside()) == head.numel() + 8 * len(head) + 4 * 256
    model(**batch("llama"))
    assert "_fastln_rounded" in vars(model.lm_head)
    assert footprint(model, saved=0).weights == before < exact
