"""Checkpoints are whole or not there; what is wrong with one is told, and the one before it serves."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import Sentences, arguments, llama
from transformers import TrainerCallback

from fastln import FastLNError, FastLNTrainer
from fastln.adapters import WEIGHTS
from fastln.training import checkpoints
from fastln.training.trained import load_trained


def trainer(folder, method="layernorm", **settings):
    return FastLNTrainer(llama(), arguments(folder, **settings), train_dataset=Sentences(), method=method)


@pytest.fixture
def run(tmp_path):
    """A run that ended with checkpoints 10 and 12."""
    done = trainer(tmp_path)
    done.train()
    return tmp_path, {name: p.detach().clone() for name, p in done.model.named_parameters()}


def test_a_checkpoint_holds_what_trains_and_every_state(run):
    folder, trained = run
    assert [path.name for path in checkpoints.checkpoints_in(folder)] == ["checkpoint-12", "checkpoint-10"]
    assert {path.name for path in (folder / "checkpoint-12").iterdir()} == {
        *("files.json", "adapter_model.safetensors", "adapter_config.json", "fastln.json", "training_args.bin"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    }
    model = trainer(folder).model
    load_trained(model, folder / "checkpoint-12")
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    assert (folder / "checkpoint-12" / "adapter_model.safetensors").stat().st_size < 3000


@pytest.mark.slow(take=1)
@pytest.mark.parametrize("name", ["files.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("how", ["cut", "missing"])
def test_a_checkpoint_cut_short_is_named_and_the_one_before_it_used(name, how, run, caplog):
    folder, trained = run
    path = folder / "checkpoint-12" / name
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    with pytest.raises(FastLNError, match=rf"checkpoint-12: .*{name}.*checkpoint-10 is whole"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-12"))
    again = trainer(folder)
    again.train(resume_from_checkpoint=True)
    assert any("checkpoint-12" in message and name in message for message in caplog.messages)
    assert all(torch.equal(p, trained[name]) for name, p in again.model.named_parameters())
    assert checkpoints.what_is_wrong(folder / "checkpoint-12") is None, "written anew"


def test_no_whole_checkpoint_is_an_error(run, tmp_path):
    folder, _ = run
    for path in checkpoints.checkpoints_in(folder):
        (path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(FastLNError, match=r"no whole checkpoint .*checkpoint-12: opt.*0 of .*checkpoint-10: opt"):
        trainer(folder).train(resume_from_checkpoint=True)
    with pytest.raises(FastLNError, match="there is no checkpoint to resume from"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(FastLNError, match="nowhere: there is no such folder"):
        trainer(folder).train(resume_from_checkpoint="nowhere")


def test_a_checkpoint_of_another_run_is_refused(run):
    folder, _ = run
    with pytest.raises(FastLNError, match=r"checkpoint-12: it is from another run: \d+ names differ"):
        trainer(folder, "attention").train(resume_from_checkpoint=True)
    other = FastLNTrainer(llama(), arguments(folder), train_dataset=Sentences())
    other.model.model.norm.weight = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(FastLNError, match=r"from another model: model.norm.weight has shape \(32,\) there and \(16,\)"):
        other.train(resume_from_checkpoint=True)


class Poison(TrainerCallback):
    """Makes one element of a norm NaN at the end of a step, before that step's checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.model.norm.weight.data[3] = float("nan")


def test_a_norm_that_turned_nan_comes_into_no_checkpoint(run, tmp_path):
    _, trained = run
    folder = tmp_path / "poisoned"
    poisoned = trainer(folder, logging_steps=50)
    poisoned.add_callback(Poison(10))
    with pytest.raises(FastLNError, match=r"^model\.norm\.weight turned NaN or infinite by step 10; try a lower"):
        poisoned.train()
    kept = checkpoints.checkpoints_in(folder)
    assert [path.name for path in kept] == ["checkpoint-8", "checkpoint-6"]
    assert not (folder / checkpoints.STAGING).exists()
    for path in kept:
        assert all(tensor.isfinite().all() for tensor in load_file(path / WEIGHTS).values())
    again = trainer(folder)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, trained[name]) for name, p in again.model.named_parameters())


@pytest.mark.parametrize("method", ["layernorm", "adalora"])
def test_a_checkpoint_beside_another_base_is_refused(method, tmp_path):
    trainer(tmp_path, method).train()
    other = trainer(tmp_path, method, max_steps=14)
    frozen = next(p for p in other.model.parameters() if not p.requires_grad)
    kept = frozen.detach().clone()
    with torch.no_grad():
        frozen += 1
    with pytest.raises(FastLNError, match=r"checkpoint-12: it is from another base model"):
        other.train(resume_from_checkpoint=True)
    with torch.no_grad():
        frozen.copy_(kept)
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 14


@pytest.mark.slow(take=1)
@pytest.mark.parametrize(
    ("module", "name", "at"),
    [(Path, "write_bytes", 1), (torch, "save", 1), (torch, "save", 3), (os, "fsync", 2)],
)
def test_a_full_disk_leaves_the_checkpoints_that_there_are(module, name, at, run, monkeypatch):
    folder, _ = run
    longer = trainer(folder, max_steps=16)
    calls, stock = 0, getattr(module, name)

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return stock(*args, **kwargs)

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, name, full)
    with pytest.raises(FastLNError, match=r"checkpoint-14 cannot be written .*No space left.* is .*checkpoint-12"):
        longer.train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    again = trainer(folder, max_steps=16)
    again.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints.checkpoints_in(folder)] == ["checkpoint-16", "checkpoint-14"]


def test_the_oldest_go_first_and_the_kept_never(tmp_path):
    for step in (2, 10, 4, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    checkpoints.rotate(tmp_path, None, [])
    assert len(checkpoints.checkpoints_in(tmp_path)) == 4
    checkpoints.rotate(tmp_path, 2, [tmp_path / "checkpoint-2"])
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-30", "checkpoint-2"]
    # A checkpoint just written stays, though an earlier run left one of a higher step.
    checkpoints.rotate(tmp_path, 1, [tmp_path / "checkpoint-2"])
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-best").is_dir()


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(run):
    folder, _ = run
    for name in (checkpoints.STAGING, checkpoints.LEAVING):
        (folder / name / "checkpoint-14").mkdir(parents=True)
    assert checkpoints.last_whole(folder).name == "checkpoint-12"
    trainer(folder, max_steps=14).train(resume_from_checkpoint=True)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-12", "checkpoint-14"}
