"""Storage modes of trainings that several processes share, and of trainings that stop and go on."""

import copy
import json
import logging

import pytest
import storage_run
import tiny
import torch
from launch import HERE, TWO, script
from resuming import same, state, straight_and_resumed
from small_run import Sentences, arguments, llama
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.utils.data import Dataset

import fastln
from fastln import FastLNTrainer, budget
from fastln.errors import FastLNError
from fastln.ops.settings import STORAGES
from fastln.peak import step_memory
from fastln.training import TrainConfig, TrainFiles, train_task
from fastln.training.resumable import waits_for_batches

MODES = [name for name in STORAGES if name not in ("exact", "offload")]


@pytest.mark.slow(pool="processes", take=2)
@pytest.mark.timeout(900)
def test_two_processes_have_the_gradients_of_one(tmp_path):
    script(HERE / "storage_run.py", tmp_path, *MODES, python=TWO)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert len(found[0]) == len(MODES) * len(storage_run.WAYS)
    for apart in found:
        assert max(apart.values()) < 1e-4, apart


@pytest.fixture(scope="module")
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["recompute", "compressed-again"])
def test_a_single_layer_that_is_sharded_is_refused_where_it_would_be_needed_again(mode, mesh):
    model = storage_run.prepared(mode)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            fully_shard(layer.self_attn.get_submodule(name), mesh=mesh, reshard_after_forward=True)
    ids = torch.arange(3, 15)[None]
    loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(FastLNError, match=r"freed after the forward: shard whole blocks \(fully_shard\(block\)\)"):
        loss.backward()


class Shrinking(Dataset):
    """Sentences of which the first four are the longest."""

    def __getitem__(self, index):
        return {name: value[: 12 if index < 4 else 6] for name, value in Sentences()[index].items() if name != "id"}

    def __len__(self):
        return 24


def trainer(folder, **settings):
    args = arguments(folder, train_sampling_strategy="sequential", max_steps=5)
    return FastLNTrainer(llama(attention_dropout=0.1), args, train_dataset=Shrinking(), **settings)


def between(model, inputs, also=()):
    """Return a budget between what a step takes with exact storage and the least."""
    outline = budget.outline_of(model).train()
    peaks = [
        step_memory(fastln.prepare(copy.deepcopy(outline), also=also, activations=mode), inputs).peak
        for mode in ("exact", "compressed-recompute")
    ]
    return sum(peaks) // 2


def test_a_training_with_a_budget_goes_on_as_it_was_decided(tmp_path, caplog):
    ids = torch.zeros(4, 12, dtype=torch.int64)
    tight = between(llama(), {"input_ids": ids, "labels": ids, "attention_mask": ids})
    straight, resumed = straight_and_resumed(lambda folder: trainer(folder, memory_budget=tight), tmp_path)
    decided = [waits_for_batches(one.model).decision for one in (straight, resumed)]
    assert decided[0] == decided[1]
    assert set(decided[0]["storages"].values()) - {"exact"}
    assert caplog.text.count("predicted peak") == 2  # the resumed one did not decide
    assert same(resumed.model, state(straight.model))
    # Another budget decides anew, and says so.
    other = trainer(tmp_path / "b", memory_budget=2 * tight)
    other.args.max_steps = 6
    other.train(resume_from_checkpoint=True)
    assert caplog.text.count("decides anew what blocks keep") == 1
    assert not waits_for_batches(other.model).storages


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("mode", MODES)
def test_a_training_in_a_mode_goes_on_bit_for_bit(mode, tmp_path, caplog):
    straight, resumed = straight_and_resumed(lambda folder: trainer(folder, activations=mode), tmp_path)
    assert same(resumed.model, state(straight.model))
    assert "other arithmetic" not in caplog.text
    exact = trainer(tmp_path / "b")
    exact.args.max_steps = 6
    exact.train(resume_from_checkpoint=True)
    assert f"was trained with activations '{mode}', and this training goes on with activations 'exact'" in caplog.text


@pytest.mark.slow(take=1)
@pytest.mark.parametrize(
    "settings", [{"activations": "recompute"}, {"activations": "compressed"}, {"memory_budget": 0}]
)
def test_a_task_that_was_stopped_resumes_to_the_same_weights(settings, tmp_path, stop_after):
    data = tiny.phantom(24)
    task = tiny.dual(tmp_path, data)
    if "memory_budget" in settings:
        batches = task.batches(data, 8, seed=0, questions_per_image=TrainConfig.questions_per_image)
        inputs = [task.collate([data[index] for index in samples], data) for samples in batches]
        settings = {"memory_budget": max(between(task.model, batch, task.head_under("layernorm")) for batch in inputs)}
    config = TrainConfig(epochs=2, head_epochs=0, batch_size=8, **settings)
    whole = train_task(task, data, config, TrainFiles(tmp_path / "a"), progress=False)
    again = stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        train_task(tiny.dual(tmp_path, data), data, config, TrainFiles(tmp_path / "b"), progress=False)
    again()
    resumed = tiny.dual(tmp_path, data)
    rest = train_task(resumed, data, config, TrainFiles(tmp_path / "b", resume=True), progress=False)
    assert rest.losses == whole.losses
    assert same(resumed.model, state(task.model))
    modes = {path.parent.name: path for path in (tmp_path / "b").rglob("memory_budget_0.json")}
    assert bool(modes) == ("memory_budget" in settings)
    for path in modes.values():
        assert json.loads(path.read_text())["storages"]


@pytest.mark.parametrize("settings", [{}, {"activations": "compressed-again"}, {"activations": "checkpoint"}])
def test_the_trainers_switch_of_checkpoints(settings, tmp_path, caplog):
    """It says which mode that is, and changes no step."""
    caplog.set_level(logging.INFO)
    found = []
    for checkpoints in (False, True):
        args = arguments(tmp_path / str(checkpoints), max_steps=2, gradient_checkpointing=checkpoints)
        one = FastLNTrainer(llama(), args, train_dataset=Sentences(), **settings)
        one.train()
        found.append(state(one.model))
    line = "gradient checkpointing is on: in 2 of 2 blocks that is the storage mode activations='checkpoint'"
    assert caplog.text.count(line) == 1
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-2, atol=1e-3)
