"""Models with every storage mode against the same models with exact storage: losses, gradients, and what is stored."""

import copy
import functools

import pytest
import torch
from any_models import NAMES, any_model, check, step
from family_models import MODELS, VISION_MODELS, batch, make
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

import fastln
from fastln.memory import SavedActivations
from fastln.ops.settings import STORAGES

MODES = [name for name in STORAGES if name != "exact"]
AGAIN = [name for name in MODES if STORAGES[name].x_hat_bits is None]  # equal to exact storage, but for rounding


def gradients(model, inputs, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)  # what dropout draws
    with SavedActivations(model) as saved:
        loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, saved.bytes


@pytest.mark.slow(take=6)
@pytest.mark.parametrize("mode", AGAIN)
@pytest.mark.parametrize("name", [*MODELS, *VISION_MODELS])
def test_families_get_the_gradients_of_exact_storage(name, mode):
    exact, inputs = make(name), batch(name)
    model = copy.deepcopy(exact)
    want = gradients(fastln.prepare(exact), inputs)
    got = gradients(fastln.prepare(model, activations=mode), inputs)
    check(got, want)
    assert got[2] <= want[2]


@pytest.mark.slow(take=12)
@pytest.mark.parametrize("mode", AGAIN)
@pytest.mark.parametrize("name", NAMES)
def test_any_class_gets_the_gradients_of_exact_storage(name, mode):
    exact, inputs = any_model(name)
    model = copy.deepcopy(exact)
    want = step(fastln.prepare(exact), inputs)
    check(step(fastln.prepare(model, activations=mode), inputs), want)


SAVED = (torch.ops.fastln.norm.default, torch.ops.fastln.attention.default, torch.ops.aten.addmm.default)


def save_some(ctx, operation, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.slow(take=4)
@pytest.mark.parametrize("mode", ["exact", "recompute"])
@pytest.mark.parametrize("name", [*MODELS, *VISION_MODELS])
def test_selective_checkpoints_of_prepared_models(name, mode):
    exact, inputs = make(name), batch(name)
    model = copy.deepcopy(exact)
    want = gradients(fastln.prepare(exact), inputs)
    fastln.prepare(model, activations=mode)
    contexts = functools.partial(create_selective_checkpoint_contexts, save_some)
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    got = gradients(model, inputs)
    check(got, want)
    assert got[2] < want[2] or not layers
