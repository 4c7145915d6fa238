"""fastln train into a folder that holds a run: what resumes, with which weights, and what is refused."""

import copy
import dataclasses
import errno
import functools
import json
import os
import shutil

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastln.errors import FastLNError
from fastln.training import TrainConfig, TrainFiles, checkpoints, resumable, train_task
from fastln.training.eval_run import EvalRun, run_evaluation
from fastln.training.merge_run import merge_into_base
from fastln.training.run import TrainRun, run_training

CONFIG = TrainConfig(epochs=2, head_epochs=2, batch_size=8)


@pytest.mark.parametrize("kind", tiny.TASKS)
def test_a_stopped_run_resumes_to_the_same_weights(kind, tmp_path):
    data = tiny.phantom(24)

    def fresh():
        return tiny.TASKS[kind](tmp_path / kind if kind == "blip" else tmp_path, data)

    straight = fresh()
    whole = train_task(straight, data, CONFIG, TrainFiles(tmp_path / "a"), progress=False)

    class StoppedError(Exception):
        pass

    stopped = fresh()
    steps = 0

    def stop_in_the_second_epoch(module, arguments):
        nonlocal steps
        steps += module.training
        if steps > 4:
            raise StoppedError

    embeddings = stopped.model.get_submodule("text.embeddings" if kind == "dual" else "text_encoder.embeddings")
    # The head's own epochs run the towers in evaluation mode and do not count.
    handle = embeddings.register_forward_pre_hook(stop_in_the_second_epoch)
    with pytest.raises(StoppedError):
        train_task(stopped, data, CONFIG, TrainFiles(tmp_path / "b"), progress=False)
    handle.remove()
    resumed = fresh()
    rest = train_task(resumed, data, CONFIG, TrainFiles(tmp_path / "b", resume=True), progress=False)
    assert rest.losses == whole.losses[-6:]
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("a", "b")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == list(range(1, 7))


@pytest.mark.usefixtures("few")
@pytest.mark.slow(take=1)
@pytest.mark.parametrize("folder", ["adapter", "model"])
def test_a_disk_that_is_full_at_the_end_loses_nothing(folder, tmp_path, monkeypatch):
    run, out = TrainRun("phantom", tiny.dual_spec(tmp_path), None, CONFIG), tmp_path / "out"
    stock = os.rename

    def full(source, target):
        if out / folder in (target, *target.parents):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stock(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(FastLNError, match=rf"{folder}.* cannot be written.*No space left"):
            run_training(run, out)
    assert not (out / folder).exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert not json.loads((out / "run.json").read_text())["finished"]
    resumed = run_training(run, out, resume=True)
    assert (out / folder).is_dir()
    run_training(run, tmp_path / "straight")
    weights = [load_file(path / "model" / "model.safetensors") for path in (out, tmp_path / "straight")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert resumed.test is not None


@pytest.mark.usefixtures("few")
def test_a_full_disk_or_a_cut_checkpoint_leaves_the_one_before_it_to_resume_from(tmp_path, monkeypatch, caplog):
    config = dataclasses.replace(CONFIG, epochs=3)
    run, out = TrainRun("phantom", tiny.dual_spec(tmp_path), None, config), tmp_path / "out"
    stock, n_saved = resumable.save_trained, 0

    def full(*args):
        nonlocal n_saved
        n_saved += 1
        if n_saved == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stock(*args)

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "save_trained", full)
        with pytest.raises(FastLNError, match=r"checkpoint-9 cannot be written .*No space left.* checkpoint is .*-6"):
            run_training(run, out)
    kept = checkpoints.checkpoints_in(out / "checkpoints")
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-3"]
    os.truncate(kept[0] / "optimizer.pt", 10)
    run_training(run, out, resume=True)
    assert "checkpoint-6: optimizer.pt is cut short" in caplog.text
    run_training(run, tmp_path / "straight")
    weights = [load_file(path / "model" / "model.safetensors") for path in (out, tmp_path / "straight")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.usefixtures("few")
def test_an_output_folder_that_holds_a_run_is_kept(tmp_path):
    run = TrainRun("phantom", tiny.dual_spec(tmp_path), None, CONFIG)
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("mine")
    with pytest.raises(FastLNError, match="already holds a run"):
        run_training(run, out)
    assert (out / "run.json").read_text() == "mine"
    with pytest.raises(FastLNError, match="no checkpoint to resume from"):
        run_training(run, out, resume=True)
    with pytest.raises(FastLNError, match="exclude each other"):
        run_training(run, out, resume=True, overwrite=True)


@pytest.mark.usefixtures("few")
def test_resuming_with_other_options_is_refused(tmp_path):
    source = tiny.dual_spec(tmp_path)
    run_training(TrainRun("phantom", source, None, CONFIG), tmp_path / "out")
    record = (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(FastLNError, match="the run to resume had data 'phantom', not 'elsewhere'"):
        run_training(TrainRun("elsewhere", source, None, CONFIG), tmp_path / "out", resume=True)
    int8 = TrainRun("phantom", source, None, dataclasses.replace(CONFIG, products="int8"))
    with pytest.raises(FastLNError, match="the run to resume had products 'exact', not 'int8'"):
        run_training(int8, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "run.json").read_text() == record
    earlier = json.loads(record)
    del earlier["run"]["config"]["products"]  # as earlier versions wrote it
    (tmp_path / "out" / "run.json").write_text(json.dumps(earlier))
    assert run_training(TrainRun("phantom", source, None, CONFIG), tmp_path / "out", resume=True) is None


CHANGES = [
    (lambda rows, images: rows["train"][3].update(answer="maybe"), "train"),
    (lambda rows, images: rows["train"].reverse(), "train"),
    (lambda rows, images: rows["test"].pop(), "test"),
    (lambda rows, images: rows["test"][0].update(image="1.png"), "test"),
    (lambda rows, images: Image.effect_noise((8, 8), 50).save(images / "0.png"), "test and train"),
]


def test_resuming_on_data_that_changed_is_refused_and_a_copy_is_not(tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for name in ("0.png", "1.png"):
        Image.new("L", (8, 8)).save(data / "images" / name)
    row = {"image": "0.png"}
    rows = {
        split: [row | {"id": f"{split}{n}", "question": q, "answer": ("yes", "no")[n % 2]} for n in range(8)]
        for split, q in (("train", "is it bright?"), ("test", "is it dark?"))
    }

    def write(rows):
        for split, own in rows.items():
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))

    write(rows)
    run, out = TrainRun(str(data), tiny.dual_spec(tmp_path / "towers"), None, CONFIG), tmp_path / "out"
    run_training(run, out)
    record = (out / "run.json").read_text()
    data.rename(tmp_path / "before")
    copy_data = functools.partial(shutil.copytree, tmp_path / "before", data, copy_function=shutil.copyfile)
    copy_data()  # with new times
    run_training(run, out, resume=True)
    assert json.loads((out / "run.json").read_text())["digests"] == json.loads(record)["digests"]
    for change, which in CHANGES:
        changed = copy.deepcopy(rows)
        change(changed, data / "images")
        write(changed)
        with pytest.raises(FastLNError, match=rf"its {which} questions or images are not those that the run to resume"):
            run_training(run, out, resume=True)
        shutil.rmtree(data)
        copy_data()


@pytest.mark.usefixtures("few")
def test_a_run_that_came_to_nothing_can_be_started_again(tmp_path):
    out = tmp_path / "out"
    run = TrainRun("phantom", tiny.dual_spec(tmp_path), None, TrainConfig(epochs=1, head_epochs=0, batch_size=8))
    weights = tmp_path / "vision" / "model.safetensors"
    good = load_file(weights)
    broken = {name: tensor * float("nan") if tensor.is_floating_point() else tensor for name, tensor in good.items()}
    save_file(broken, weights, metadata={"format": "pt"})
    with pytest.raises(FastLNError, match="not a number"):
        run_training(run, out)
    with pytest.raises(FastLNError, match="did not finish"):
        run_evaluation(EvalRun(str(out), "phantom", "test"))
    with pytest.raises(FastLNError, match="out: this run did not finish"):
        merge_into_base(str(out), tmp_path, tmp_path / "merged")
    save_file(good, weights, metadata={"format": "pt"})
    assert run_training(run, out).test.n_all == 24


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    data = tiny.phantom(24)
    train_task(tiny.dual(tmp_path, data), data, CONFIG, TrainFiles(tmp_path / "a"), progress=False)
    with pytest.raises(FastLNError, match="it is from another run"):
        train_task(
            tiny.dual(tmp_path, data),
            data,
            TrainConfig("bitfit", epochs=2, batch_size=8),
            TrainFiles(tmp_path / "a", resume=True),
            progress=False,
        )


@pytest.mark.usefixtures("few")
def test_a_finished_run_is_left_alone_and_a_dry_run_beside_it_shows(tmp_path, capsys):
    run, out = TrainRun("phantom", tiny.dual_spec(tmp_path), None, CONFIG), tmp_path / "out"
    run_training(run, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run_training(run, out, resume=True) is None
    assert run_training(run, out, dry_run=True) is None
    assert "first batch" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
