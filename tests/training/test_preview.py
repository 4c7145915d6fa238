"""What a dry run shows of the model: the plan that was carried out, or that it stays stock; and the memory."""

import re

import pytest
import tiny

from fastln.memory import SavedActivations, footprint
from fastln.state import prepared
from fastln.training import TrainConfig
from fastln.training.preview import preview

SHORT = {"epochs": 1, "batch_size": 4}


@pytest.mark.parametrize("method", ["layernorm", "layernorm+lora"])
def test_the_plan_that_was_carried_out_is_shown_whole(method, tmp_path):
    data = tiny.phantom(8)
    task = tiny.dual(tmp_path, data)
    shown = preview(task, data, TrainConfig(method, **SHORT), None)
    assert prepared(task.model).plan.table() in shown
    assert "becomes" in shown
    assert "LayerNorm" in shown


@pytest.mark.parametrize(("method", "engine"), [("layernorm", "torch"), ("layernorm", "peft"), ("lora", None)])
def test_other_engines_leave_the_model_stock(method, engine, tmp_path):
    data = tiny.phantom(8)
    task = tiny.dual(tmp_path, data)
    shown = preview(task, data, TrainConfig(method, **SHORT), engine)
    assert f"\nengine {engine or 'peft'}: fastln replaces nothing, the model stays stock\n" in shown
    assert "becomes" not in shown


def test_the_memory_is_the_footprint_of_the_model(tmp_path):
    data = tiny.phantom(4)
    task = tiny.dual(tmp_path, data)
    shown = preview(task, data, TrainConfig("layernorm", **SHORT), "torch")
    with SavedActivations(task.model) as saved:
        output = task.model(**task.collate([data[index] for index in range(4)], data))
    assert output.loss.requires_grad
    total, label = re.search(
        r"memory, predicted: ([\d.,]+ MiB: .*?), (stored for backward by .*\(measured\))", shown
    ).groups()
    assert footprint(task.model, saved.bytes).describe(label).startswith(total)
