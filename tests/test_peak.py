"""The memory of a whole step: by hand, by kind and by layer."""

import gc

import pytest
import torch
from family_models import batch, make
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import ModelOutput

from fastln.errors import FastLNError
from fastln.memory import Footprint, SavedActivations
from fastln.methods import norm_parameters
from fastln.peak import StepMemory, by_kind, by_layer, step_memory
from fastln.plan import apply, plan


class Chain(nn.Module):
    """A linear layer, exp, sin and a sum: 400 bytes for each result of 10 x 10 numbers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(10, 10, bias=False)

    def forward(self, x):
        return ModelOutput(loss=self.first(x).exp().sin().sum())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_chain_by_hand(device):
    got = step_memory(Chain().to(device), {"x": torch.ones(10, 10, device=device)})
    # Kept: exp's result. The layer's input is the batch. At the peak: cos, or its product with the expanded gradient.
    assert (got.weights, got.batch, got.optimizer) == (400, 400, 800)
    assert by_kind(got.kept) == {"exp": 400}
    assert got.phase == "backward"
    assert by_kind(got.saved) == {"exp": 400}
    assert got.workspace == 800 + 4 + 4  # the two, the loss and its gradient
    assert got.peak == 400 + 400 + 800 + 400 + 808


def test_the_step_changes_nothing_in_the_model():
    model = Chain()
    model.first.weight.grad = before = torch.ones(10, 10)
    value = model.first.weight.detach().clone()
    step_memory(model, {"x": torch.ones(10, 10)})
    assert model.first.weight.grad is before
    torch.testing.assert_close(before, torch.ones(10, 10), rtol=0, atol=0)
    torch.testing.assert_close(model.first.weight.detach(), value, rtol=0, atol=0)


def test_what_is_resized_in_place_counts_at_its_new_size():
    class Grows(Chain):
        def forward(self, x):
            y = self.first(x).exp()
            other = torch.empty(0, device=x.device)
            other.resize_(1000)
            return ModelOutput(loss=y.sum())

    got = step_memory(Grows(), {"x": torch.ones(10, 10)})
    assert got.phase == "forward"
    assert got.workspace == 4000 + 4  # and the sum


def test_the_optimizer_copies_gradients_of_lower_precision():
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False)).bfloat16()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return ModelOutput(loss=(self.inner[0].weight * x).sum())

    inputs = {"x": torch.ones(1, 1000, dtype=torch.bfloat16)}
    got = step_memory(Wrapped(), inputs)
    assert (got.phase, got.weights, got.gradients, got.optimizer) == ("optimizer", 2 * 10**6, 2 * 10**6, 12 * 10**6)
    assert 0 <= got.workspace - 4 * 10**6 <= 4  # the loss and its gradient
    without = step_memory(Wrapped(), inputs, optimizer=False)
    assert (without.phase, without.optimizer) == ("backward", 0)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "blip"])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_what_is_kept_between_forward_and_backward_is_the_count_of_saved_activations(name, is_prepared):
    model = make(name).to("meta")
    inputs = {key: value.to("meta") for key, value in batch(name).items()}
    if is_prepared:
        apply(plan(model, device="cpu"), model)
    else:
        trained = set(norm_parameters(model))
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in trained)
    got = step_memory(model, inputs)
    with SavedActivations(model) as saved:
        model(**inputs)
    own = sum(value.nbytes for value in inputs.values() if value.dtype == torch.int64)  # they are the batch
    assert got.footprint.saved <= saved.bytes
    if name != "blip":  # of which the loss does not need all
        assert got.footprint.saved >= saved.bytes - own
    assert got.saved_bytes <= saved.bytes


def test_kinds_and_layers_of_a_llama():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3)).train()
    apply(plan(model, device="cpu"), model)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    got = step_memory(model, {"input_ids": ids, "labels": ids})
    assert {"norm", "attention", "activation", "loss"} <= set(by_kind(got.kept))
    layers = by_layer(got.kept)
    assert [name for name in layers if "layers" in name] == [f"model.layers.{index}" for index in range(3)]
    assert layers["model.layers.1"] == layers["model.layers.2"]
    per_token = {part.kind: part.n_bytes // 32 for part in got.kept if part.layer == "model.layers.1"}
    assert per_token["activation"] == 4 * 2 * 128  # gate and up


def test_a_checkpointed_model_keeps_less_and_peaks_lower():
    peaks = []
    for checkpoints in (False, True):
        with torch.device("meta"):
            config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=8, vocab_size=100)
            model = LlamaForCausalLM(config).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        ids = torch.zeros(2, 64, dtype=torch.int64)
        peaks.append(step_memory(model, {"input_ids": ids, "labels": ids}, optimizer=False))
    assert peaks[1].footprint.saved < 0.3 * peaks[0].footprint.saved
    assert peaks[1].peak < 0.7 * peaks[0].peak


def test_nothing_is_left_behind():
    model, inputs = Chain(), {"x": torch.ones(10, 10)}
    step_memory(model, inputs)
    gc.collect()
    n_before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    step_memory(model, inputs)
    gc.collect()
    assert sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) <= n_before
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


class Returns(torch.nn.Module):
    """A model whose result has nothing to do with what trains."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x, {"more": x + 1}


def test_without_labels_the_loss_reads_what_the_model_returns():
    model, ids = make("bert"), batch("bert")["input_ids"]
    two, one = (step_memory(model, {"input_ids": part}).footprint.saved for part in (ids, ids[:1]))
    assert two > 1.9 * one


def test_errors_say_what_is_missing():
    with pytest.raises(FastLNError, match="depends on what trains"):
        step_memory(Returns(), {"x": torch.ones(2, 2)})
    with pytest.raises(FastLNError, match="nothing in this model trains"):
        step_memory(Chain().requires_grad_(False), {"x": torch.ones(10, 10)})


def test_a_step_in_words():
    got = StepMemory(2**30, 2**20, 2**21, 0, (), 2**22, "backward", (), Footprint(2**30, 2**20, 2**21, 0))
    assert got.describe() == (
        "peak 1,031.0 MiB in the backward, predicted: weights 1,024.0, gradients 1.0, optimizer 2.0, batch 0.0, "
        "saved for backward 0.0, workspace 4.0"
    )
