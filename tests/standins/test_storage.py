"""Models with every storage mode against the same models with exact storage: losses, gradients, and what is stored."""

import copy
import functools

import pytest
import torch
import transformers
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


def vit(n_layers):
    config = transformers.ViTConfig(num_hidden_layers=n_layers, num_labels=10)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.empty(2, 3, 224, 224)}, 2 * 197 * 768


def bert(n_layers):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=n_layers))
    return model, {"input_ids": torch.empty(2, 128, dtype=torch.int64)}, 256 * 768


def llama(n_layers):
    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = transformers.LlamaConfig(
        vocab_size=64, num_hidden_layers=n_layers, bos_token_id=1, eos_token_id=2, **sizes
    )
    model = transformers.LlamaForSequenceClassification(config)
    return model, {"input_ids": torch.empty(1, 160, dtype=torch.int64)}, 160 * 1024


UNITS = {
    "exact": (10.1, 11.6),
    "again": (7.1, 8.6),
    "recompute": (3.3, 3.6),
    "compressed": (7.2, 8.0),
    "compressed-4": (6.2, 6.8),
    "compressed-2": (5.7, 6.8),
    "compressed-again": (4.2, 5.0),
    "compressed-4-again": (3.2, 3.8),
    "compressed-2-again": (2.7, 3.8),
    "compressed-recompute": (2.2, 2.4),
    "checkpoint": (1.05, 1.05),
}


def test_every_mode_has_a_bound_of_what_it_stores():
    assert UNITS.keys() == STORAGES.keys() - {"offload"}


@pytest.mark.slow(take=8)
@pytest.mark.parametrize("mode", UNITS)
@pytest.mark.parametrize("family", [vit, bert, llama])
def test_what_a_layer_stores_in_units(family, mode):
    """In tensors of 16 bits, tokens times width: what a further layer adds."""
    sizes = []
    for n_layers in (2, 3):
        with torch.device("meta"):
            model, inputs, unit = family(n_layers)
            model = model.bfloat16().train()
            inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
        model.config.pad_token_id = 0
        fastln.prepare(model, activations=mode, backend="cpu", without=("late_rows", "random_heads"))
        base = model.base_model
        with SavedActivations(model) as saved:
            base(**inputs)
        sizes.append(saved.bytes)
    assert (sizes[1] - sizes[0]) / (2 * unit) <= UNITS[mode][family is llama]
