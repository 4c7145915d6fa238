"""A base whose weights 8-bit ones replaced is loaded again at the end, and gets what trained."""

import pytest
import tiny
import torch
from transformers import AutoModel

from fastln.errors import FastLNError
from fastln.training import TrainConfig, train, train_task

CONFIG = TrainConfig(epochs=1, head_epochs=1, batch_size=8, learning_rate=1e-2)


def trained(task, config=CONFIG):
    data = tiny.phantom(16)
    train_task(task, data, config, progress=False)
    return task


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("dual", "layernorm", torch.float32),
        pytest.param("dual", "layernorm+lora", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("blip", "layernorm", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:bfloat16 rounds")
def test_the_base_loaded_again_gets_the_same_bits(name, method, dtype, tmp_path, monkeypatch, caplog):
    """Nothing is in 8 bits here, so that what comes out is known."""
    config = TrainConfig(method, epochs=1, head_epochs=1, batch_size=8)
    expected = trained(tiny.TASKS[name](tmp_path, tiny.phantom(16), dtype), config).model.state_dict()
    monkeypatch.setattr(train, "can_restore", lambda model: False)
    freed = []
    load_task = train.reload.__globals__["load_task"]

    def loaded(*args, **kwargs):
        freed.append(all(parameter.is_meta for parameter in before.parameters()))
        return load_task(*args, **kwargs)

    monkeypatch.setitem(train.reload.__globals__, "load_task", loaded)
    with caplog.at_level("INFO", "fastln"):
        task = tiny.TASKS[name](tmp_path, tiny.phantom(16), dtype)
        before = task.model
        trained(task, config)
    assert freed == [True]  # so that memory never holds two of them
    assert caplog.text.count("it is loaded again, and saved and scored with exact products") == 1
    assert caplog.text.count("device cpu, backend") == 1, "the plan for the base that only takes the values is told"
    found = task.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert {parameter.dtype for parameter in task.model.parameters()} == {dtype}


def test_a_base_that_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    task = tiny.dual(tmp_path, tiny.phantom(16))
    tower = AutoModel.from_pretrained(tmp_path / "vision")
    next(parameter for parameter in tower.parameters() if parameter.dim() == 2).data += 1
    tower.save_pretrained(tmp_path / "vision")
    monkeypatch.setattr(train, "can_restore", lambda model: False)
    with pytest.raises(FastLNError, match=r"changed while it was trained on.*1 of \d+ frozen parameters differ"):
        trained(task)
