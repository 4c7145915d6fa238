"""Every setting of a training run reaches it: another value gives other losses, the same one the same bits."""

from dataclasses import fields, replace

import pytest
import tiny

from fastln.training import TrainConfig, train_task

CONFIG = TrainConfig(epochs=2, head_epochs=0, batch_size=8, questions_per_image=4, learning_rate=1e-3, warmup=0.2)
CHANGES = {
    "method": "bitfit",
    "scope": ("text",),
    "epochs": 3,
    "head_epochs": 1,
    "batch_size": 4,
    "learning_rate": 2e-3,
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
    assert CHANGES.keys() == {field.name for field in fields(TrainConfig)}


@pytest.mark.parametrize("name", CHANGES)
def test_another_value_gives_other_losses(name, usual, tmp_path):
    assert losses(tmp_path, replace(CONFIG, **{name: CHANGES[name]})) != usual
