"""Models that chat through the command line: train, stop, resume, evaluate, merge; answers, reports, conversations."""

import json
import re

import pytest
import tiny_chat
import torch
from layouts import LAYOUTS
from PIL import Image
from safetensors.torch import load_file

import fastln
from fastln.data import load_dataset
from fastln.models import chat_task, load_task

QUESTIONS = (("What is shown?", "an mri"), ("Is it normal?", "no"), ("Which side?", "left"), ("How many?", "two"))


@pytest.fixture(autouse=True)
def short_answers(monkeypatch) -> None:
    monkeypatch.setattr(chat_task, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(chat_task, "LONG_ANSWER_TOKENS", 12)


def text_rows(folder) -> str:
    folder.mkdir()
    for split, first in (("train", ""), ("test", "And now: ")):
        rows = "".join(json.dumps({"question": f"{first}{q}", "answer": a}) + "\n" for q, a in QUESTIONS)
        (folder / f"{split}.jsonl").write_text(rows)
    return str(folder)


SHORT = ("--epochs", "2", "--batch-size", "4", "--dtype", "float32")


def weights(model):
    return load_file(model / "model.safetensors")


def test_llava_from_its_configuration_to_a_merged_model(command, phantom, tmp_path, stop_after):
    model = tiny_chat.config(tmp_path, "llava")
    train = ("train", "--model", model, "--data", phantom, *SHORT, "--method", "LN-F-LN")
    command(*train, "--out", tmp_path / "straight")
    go_on = stop_after(1)
    command(*train, "--out", tmp_path / "stopped", status=130)
    go_on()
    command(*train, "--out", tmp_path / "stopped", "--resume")
    straight, resumed = (weights(tmp_path / name / "model") for name in ("straight", "stopped"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    # An adapter of the run, merged into the base that it started from, is the run's model.
    data = load_dataset(phantom, "train")
    base, trained = load_task(model, data), load_task(str(tmp_path / "straight" / "model"), data).model.state_dict()
    moved = {name for name, tensor in base.model.state_dict().items() if not torch.equal(tensor, trained[name])}
    assert moved
    assert all("norm" in name and "projector" not in name for name in moved)
    base.save(tmp_path / "base")
    prepared = fastln.prepare(base.model, "LN-F-LN")
    prepared.load_state_dict(trained)
    fastln.save_adapter(prepared, tmp_path / "adapter")
    command("merge", tmp_path / "adapter", "--base", tmp_path / "base", "--out", tmp_path / "merged")
    merged = weights(tmp_path / "merged")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in straight.items())
    for name in ("straight", "merged"):
        written = ("--predictions", tmp_path / f"{name}.jsonl", "--metrics", tmp_path / f"{name}.json")
        command("eval", tmp_path / name, "--data", phantom, *written)
    assert (tmp_path / "straight.jsonl").read_text() == (tmp_path / "merged.jsonl").read_text()
    record = json.loads((tmp_path / "straight" / "run.json").read_text())
    assert json.loads((tmp_path / "straight.json").read_text())["all"] == record["test"]["all"]


@pytest.mark.parametrize(
    ("name", "n_images", "asked", "learned"),
    [
        ("iu-xray", 2, "write the radiology report .", "the heart is normal . no effusion . </s>"),
        ("llava-med", 1, "assistant : an mri of the knee . </s> user : is it", "an mri of the knee . </s> yes . </s>"),
    ],
)
def test_llava_writes_reports_and_talks(command, name, n_images, asked, learned, tmp_path, capsys):
    if name == "iu-xray":
        pytest.importorskip("pycocoevalcap")
    data = LAYOUTS[name].make(tmp_path / "data", train=[LAYOUTS[name].row(number) for number in range(3)])
    train = ("train", "--model", tiny_chat.config(tmp_path, "llava"), "--data", data, *SHORT)
    command(*train, "--out", tmp_path / "out", "--dry-run")
    shown = capsys.readouterr().out
    assert asked in shown
    assert f"learns {learned!r}" in shown
    assert f"pixel_values: ({3 * n_images}, 3, 28, 28)" in shown
    command(*train, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"]
    assert record["test"]
    command("eval", tmp_path / "out", "--data", data, "--predictions", tmp_path / "p.jsonl")
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 1


def test_a_dry_run_predicts_memory_of_the_largest_batch(command, tmp_path, capsys):
    """Most images, and of those the longest text, wherever they stand in the data; what is shown is the first batch."""
    rows = [{"id": f"{n}", "image": "small.png", "question": "Is it normal?", "answer": "no"} for n in range(12)]
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name, size in (("small.png", (60, 40)), ("large.png", (120, 160))):
        Image.new("L", size).save(tmp_path / "data" / "images" / name)
    train = ("train", "--model", tiny_chat.config(tmp_path, "qwen2_5_vl"), "--data", tmp_path / "data", *SHORT)
    stored, shown = [], []
    for at, change in ((0, {}), (7, {"answer": "no " * 30}), (4, {"image": "large.png"})):
        rows[at] |= change
        (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command(*train, "--batch-size", 1, "--out", tmp_path / "out", "--dry-run")
        text = capsys.readouterr().out
        stored.append(float(re.search(r"largest batch, 1 questions on 1 image\(s\) \(measured\) ([\d.]+)", text)[1]))
        shown.append(re.search(r"\n  (\d+): 'Is it normal\?'", text)[1])
    assert stored[0] < stored[1] < stored[2]
    assert (shown[1], shown[2]) != ("7", "4")


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llama"])
def test_other_families_train_and_answer(command, kind, phantom, tmp_path):
    data = text_rows(tmp_path / "text") if kind == "llama" else phantom
    model = tiny_chat.config(tmp_path, kind)
    command("train", "--model", model, "--data", data, *SHORT, "--out", tmp_path / "out")
    command("eval", tmp_path / "out", "--data", data, "--metrics", tmp_path / "scores.json")
    command("eval", tmp_path / "out", "--data", data, "--feature-cache", tmp_path / "features", status=2)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert json.loads((tmp_path / "scores.json").read_text())["all"] == record["test"]["all"]
