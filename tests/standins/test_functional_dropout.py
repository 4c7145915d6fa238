"""Layers that call dropout as a function and own no module for it: no mask is stored, and they stay what they are."""

import copy
import pickle

import pytest
import torch
import transformers
from family_models import OPT, batch
from torch.nn import functional as F
from transformers.models.opt.modeling_opt import OPTDecoderLayer

import fastln
from fastln.memory import SavedActivations
from fastln.standins.dropout import CallsDropout


def opt(p, n_layers=2):
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**{**OPT, "dropout": p, "num_hidden_layers": n_layers})
    ).train()


def bart(p, n_layers=2):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 160}
    sizes |= {"encoder_layers": n_layers, "decoder_layers": n_layers}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, dropout=p, activation_dropout=p, attention_dropout=p)
    ).train()


def bloom(p, n_layers=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "n_layer": n_layers, "n_head": 2, "vocab_size": 160}
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, hidden_dropout=p)).train()


def step(model, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**batch("opt")).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stored(make, p, n_layers):
    model = fastln.prepare(make(p, n_layers))
    with SavedActivations(model) as saved:
        loss = model(**batch("opt")).loss
    assert loss.requires_grad
    return saved.bytes


@pytest.mark.parametrize("make", [opt, bart, bloom])
def test_a_layer_stores_seeds_alone(make):
    with_dropout, without = (stored(make, p, 2) - stored(make, p, 1) for p in (0.2, 0.0))
    assert 0 < with_dropout - without <= 16 * 16


def test_what_is_dropped():
    model = fastln.prepare(opt(0.25))
    layer, seen = model.model.decoder.layers[0], {}
    layer.fc2.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    layer.final_layer_norm.register_forward_pre_hook(lambda module, args: seen.update(residual=args[0]))
    layer.register_forward_hook(lambda module, args, output: seen.update(output=output.flatten(0, 1)))
    model(**batch("opt"))
    branch = (seen["output"] - seen["residual"]).detach()
    torch.testing.assert_close(branch, (branch > 0.5) * (4 / 3), rtol=0, atol=1e-5)
    assert (branch < 0.5).float().mean().item() == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [opt, bart])
def test_checkpointed_layers_draw_again(make, use_reentrant):
    model = fastln.prepare(make(0.2))
    loss, gradients = step(model)
    assert step(model, seed=2)[0] != loss
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    again, recomputed = step(model)
    assert again == loss
    assert recomputed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_layers_stay_what_they_are():
    model = fastln.prepare(opt(0.2))
    layer = model.model.decoder.layers[0]
    assert isinstance(layer, CallsDropout)
    assert isinstance(layer, OPTDecoderLayer)
    assert (type(layer).__name__, type(layer).__module__) == (OPTDecoderLayer.__name__, OPTDecoderLayer.__module__)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.model.decoder.layers[0]) is type(layer)
        assert step(twin)[0] == step(model)[0]
        fastln.restore(twin)
        assert type(twin.model.decoder.layers[0]) is OPTDecoderLayer
    assert len(model(**batch("opt"), output_hidden_states=True).hidden_states) == 3


def test_evaluation_and_whole_rows_are_stock():
    model = opt(1.0)
    want = step(model)[0]
    assert step(fastln.prepare(model))[0] == pytest.approx(want, rel=1e-6)
    model.eval()
    with torch.no_grad():
        want = fastln.restore(model)(**batch("opt")).loss
        torch.testing.assert_close(fastln.prepare(model)(**batch("opt")).loss, want)


class Checkpointed(transformers.modeling_layers.GradientCheckpointingLayer):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Stack(torch.nn.Module):
    """Drops by itself, and has a layer that does."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = torch.nn.LayerNorm(8), Checkpointed()

    def forward(self, x):
        return self.layer(F.dropout(self.norm(x), 0.5, self.training))


def test_what_holds_layers_keeps_its_code():
    """Its mode would be at work in their forward, and not when the backward computes them again."""
    model = fastln.prepare(Stack())
    assert isinstance(model.layer, CallsDropout)
    assert type(model) is Stack
