"""What a training loop reads of a model's outputs after `optimizer.step()`: the values of the forward pass."""

import copy

import pytest
import torch
from family_models import batch, make

import fastln
from fastln.errors import FastLNError


def run(model, settings, *, read_after, **inputs):
    """Train a step with norms alone; return the logits and all hidden states, read before or after the step."""
    norms = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(norms, lr=0.1, **settings)
    outputs = model(**inputs, output_hidden_states=True)
    read = (outputs.logits, *outputs.hidden_states)
    if not read_after:
        return [x.detach().clone() for x in read]
    outputs.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert outputs.logits.argmax(-1).shape == outputs.logits.shape[:-1]
    return [x.detach() for x in read]


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "vit"])
def test_outputs_are_those_of_the_forward_pass(name, settings):
    model, inputs = make(name), batch(name)
    want = run(copy.deepcopy(model), settings, read_after=False, **inputs)
    got = run(fastln.prepare(model), settings, read_after=True, **inputs)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_matrix_that_trains_is_an_error_that_says_what_to_write(name, settings):
    model, inputs = fastln.prepare(make(name), "full"), batch(name)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    outputs = model(**inputs)
    outputs.loss.backward()
    optimizer.step()
    with pytest.raises(FastLNError, match=r"read it before optimizer.step\(\), or use fastln.prepare"):
        outputs.logits.argmax(-1)


def test_gradients_of_a_models_logits_are_those_of_stock():
    """They are asked for once the model has computed the loss past them, as attribution methods do."""
    model, inputs = make("llama"), batch("llama")
    outputs = copy.deepcopy(model)(**inputs)
    (want,) = torch.autograd.grad(outputs.loss, outputs.logits)
    outputs = fastln.prepare(model)(**inputs)
    (got,) = torch.autograd.grad(outputs.loss, outputs.logits, retain_graph=True)
    torch.testing.assert_close(got, want)
    outputs.logits.retain_grad()
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits.grad, want)
