"""TaskTrainer: what it has in common with FastLNTrainer, in one process and in two."""

import json
import re

import pytest
import tiny
import torch
from launch import HERE, TWO, script
from small_run import Sentences, arguments, llama
from transformers import TrainingArguments

from fastln import FastLNError, FastLNTrainer
from fastln.training import TrainConfig, TrainFiles, train_task
from fastln.training.task_trainer import TaskTrainer
from fastln.training.tasks import apply_method
from fastln.training.train import OneDeviceArguments


def task_trainer(folder):
    data = tiny.phantom(16)
    task = tiny.dual(folder, data)
    args = arguments(folder / "out", remove_unused_columns=False, save_strategy="no", max_steps=3)
    return TaskTrainer(task, apply_method(task, "layernorm"), data, TrainConfig(batch_size=4), args=args)


def fastln_trainer(folder):
    return FastLNTrainer(llama(), arguments(folder, save_strategy="no", max_steps=3), train_dataset=Sentences())


@pytest.mark.parametrize("make", [task_trainer, fastln_trainer])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_nan_loss_of_one_process_stops_every_trainer(make, where, tmp_path, monkeypatch):
    trainer = make(tmp_path)
    loss, asked = type(trainer).compute_loss, []

    def compute_loss(self, *args, **kwargs):
        factor = torch.nan if where == "here" and self.state.global_step == 1 else 1.0
        return loss(self, *args, **kwargs) * factor

    def reduce(tensor, reduction):
        asked.append(tensor.item())
        assert reduction == "sum"
        return tensor + (where == "elsewhere" and trainer.state.global_step == 1)

    monkeypatch.setattr(type(trainer), "compute_loss", compute_loss)
    monkeypatch.setattr(trainer.accelerator, "reduce", reduce)
    which = {"here": r"in the batch of samples \S+, ", "elsewhere": "in the batch of another process"}[where]
    with pytest.raises(FastLNError, match=f"the loss is not a number at step 2 {which}"):
        trainer.train()
    assert asked == [0.0, where == "here"], "every process tells the others of its own loss, in every step"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_nan_loss_of_one_process_stops_both(tmp_path):
    script(HERE / "task_run.py", tmp_path, python=TWO)
    patterns = [
        "the loss is not a number at step 2 in the batch of another process",
        r"the loss is not a number at step 2 in the batch of samples phantom-train-\S+, ",
    ]
    for rank, pattern in enumerate(patterns):
        error = json.loads((tmp_path / f"{rank}.json").read_text())
        assert re.match(pattern, error), error


def test_a_process_uses_one_gpu_of_several(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    settings = {"per_device_train_batch_size": 4, "use_cpu": True}
    batches = [cls(str(tmp_path), **settings).train_batch_size for cls in (TrainingArguments, OneDeviceArguments)]
    assert batches == [8, 4]


def test_a_task_s_norms_are_watched_too(tmp_path):
    data = tiny.phantom(16)
    task = tiny.dual(tmp_path, data)
    config = TrainConfig(epochs=1, head_epochs=0, batch_size=4, warmup=0.0)
    train_task(task, data, config, TrainFiles(tmp_path / "out"), progress=False)
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    shifts = [row["gamma_shift"] for row in rows]
    assert len(shifts) == 4
    assert 0 < shifts[0] < shifts[-1]
    assert all(row["samples_per_second"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    task = tiny.dual(tmp_path, data, torch.bfloat16)
    trainer = TaskTrainer(
        task, apply_method(task, "layernorm"), data, config, args=arguments(tmp_path / "stuck", save_strategy="no")
    )
    norm = task.model.vision.layernorm.weight
    for group in trainer.optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not norm]
    with pytest.raises(FastLNError, match=r"^vision.layernorm.weight \(float32\) did not move in 3 optimizer steps"):
        trainer.train()
