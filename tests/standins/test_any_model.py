"""Models of a hundred classes that fastln knows nothing of in particular: prepared against stock, and back."""

import copy

import pytest
from any_models import NAMES, any_model, check, step

import fastln
from fastln.methods import norm_parameters


@pytest.mark.slow(take=30)
@pytest.mark.parametrize("name", NAMES)
def test_prepared_is_stock(name):
    model, inputs = any_model(name)
    stock, trained = copy.deepcopy(model), set(norm_parameters(model))
    for key, parameter in stock.named_parameters():
        parameter.requires_grad_(key in trained)
    want, types = step(stock, inputs), [type(module) for module in model.modules()]
    fastln.prepare(model)
    check(step(model, inputs), want)
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable()
        check(step(model, inputs), want)
        model.activation_checkpointing_disable()
    assert [type(module) for module in fastln.restore(model).modules()] == types
