"""Every setting of a training run reaches it: another value gives other losses, the same one the same bits."""

from dataclasses import fields, replace

import pytest
import tiny

from fastln.errors import FastLNError
from fastln.state import prepared
from fastln.training import TrainConfig, train, train_task

CONFIG = TrainConfig(epochs=2, head_epochs=0, batch_size=8, questions_per_image=4, learning_rate=1e-3, warmup=0.2)
CHANGES = {
    "method": "bitfit",
    "scope": ("text",),
    "epochs": 3,
    "head_epochs": 1,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "norm_learning_rate": 4e-3,
    "head_learning_rate": 2e-2,
    "weight_decay": 0.5,
    "warmup": 0.6,
    "max_grad_norm": 1e-2,
    "questions_per_image": 1,
    "seed": 1,
}


def losses(folder, config):
    data = tiny.phantom(24)
    return train_task(tiny.dual(folder, data), data, config, progress=False).losses


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("usual"), CONFIG)


def test_the_same_settings_give_the_same_losses(usual, tmp_path):
    assert losses(tmp_path, CONFIG) == usual
    assert len(set(usual)) == len(usual) == 6


def test_no_setting_is_left_out():
    assert CHANGES.keys() | {"without", "activations", "memory_budget", "products", "keep_weights"} == {
        field.name for field in fields(TrainConfig)
    }


@pytest.mark.slow(take=3)
@pytest.mark.parametrize("name", CHANGES)
def test_another_value_gives_other_losses(name, usual, tmp_path):
    assert losses(tmp_path, replace(CONFIG, **{name: CHANGES[name]})) != usual


def test_what_is_to_be_left_out_is(tmp_path, monkeypatch):
    """It changes how the model computes, and at most the last bits of a loss."""
    left_out, finish = [], train.finish

    def finished(task, model):
        left_out.append(set(prepared(model).plan.without))
        finish(task, model)

    monkeypatch.setattr(train, "finish", finished)
    for without in (None, ("attention", "linears")):
        losses(tmp_path, replace(CONFIG, epochs=1, without=without))
    assert left_out[1] - left_out[0] == {"attention", "linears"}


@pytest.mark.parametrize("method", ["layernorm", "bitfit", "lora", "layernorm+lora", "full"])
@pytest.mark.parametrize("scope", ["visoin", "decoder", "not:vision.nothing"])
def test_a_scope_that_the_model_lacks_is_told_before_anything_trains(method, scope, tmp_path, monkeypatch):
    """A dual encoder's head trains alone first, for minutes on real data."""
    monkeypatch.setattr(train, "train_head", lambda *_, **__: pytest.fail("the head trained"))
    data = tiny.phantom(4)
    config = replace(CONFIG, method=method, scope=(scope,), head_epochs=3, weight_decay=0.0)
    with pytest.raises(FastLNError, match=f"scope '{scope.removeprefix('not:')}'"):
        train_task(tiny.dual(tmp_path, data), data, config, progress=False)
