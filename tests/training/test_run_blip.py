"""BLIP-VQA through the command line on images of 480 x 480 pixels, for which its positions are interpolated."""

import json

import tiny
import torch
from safetensors.torch import load_file

from fastln.data import load_dataset
from fastln.models import load_task

SIZE = ("--image-size", 480)
SHORT = ("--epochs", 2, "--batch-size", 4, "--dtype", "float32", "--learning-rate", 0.02)


def test_blip_at_480_from_its_configuration_to_a_merged_model(command, phantom, tmp_path, stop_after, capsys):
    config = tiny.blip_config()
    config.vision_config.image_size, config.vision_config.patch_size = 64, 16
    config.to_json_file(tmp_path / "blip.json")
    base = f"blip:{tmp_path / 'blip.json'}"
    train = ("train", "--model", base, "--data", phantom, *SHORT, *SIZE)
    command(*train, "--out", tmp_path / "straight", "--dry-run")
    shown = capsys.readouterr().out
    for line in ("images: 480 x 480 pixels", "pixel_values: (4, 3, 480, 480)", "interpolate_pos_encoding: True"):
        assert line in shown
    command(*train, "--out", tmp_path / "straight")
    go_on = stop_after(1)
    command(*train, "--out", tmp_path / "stopped", status=130)
    go_on()
    command(*train[:-1], 64, "--out", tmp_path / "stopped", "--resume", status=2)
    command(*train, "--out", tmp_path / "stopped", "--resume")
    straight, resumed, written = (
        load_file(path)
        for path in (
            tmp_path / "straight" / "model" / "model.safetensors",
            tmp_path / "stopped" / "model" / "model.safetensors",
            tmp_path / "straight" / "adapter" / "adapter_model.safetensors",
        )
    )
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())

    # Nothing but norms differs from the base: its positions are as many as before.
    data = load_dataset(phantom, "train")
    task = load_task(base, data)
    task.save(tmp_path / "base")
    own = task.model.state_dict()
    moved = {name for name, tensor in straight.items() if not torch.equal(tensor, own[name])}
    assert len(moved) == len(written)
    assert all("norm" in name.lower() for name in moved)
    assert straight["vision_model.embeddings.position_embedding"].shape == (1, 17, tiny.WIDTH)

    # The run knows the size; its base and what is merged into that are told.
    assert load_task(str(tmp_path / "straight" / "model"), data).images.image_size == 480
    adapter = tmp_path / "straight" / "adapter"
    command("merge", adapter, "--base", tmp_path / "base", "--out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert straight.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in straight.items())
    scored = {
        "run": (tmp_path / "straight",),
        "adapter": (base, "--adapter", adapter, *SIZE),
        "merged": (tmp_path / "merged", *SIZE),
    }
    answers = set()
    for name, words in scored.items():
        files = ("--predictions", tmp_path / f"{name}.jsonl", "--metrics", tmp_path / f"{name}.json")
        command("eval", *words, "--data", phantom, "--dtype", "float32", *files)
        answers.add((tmp_path / f"{name}.jsonl").read_text())
        scores = json.loads((tmp_path / f"{name}.json").read_text())
        record = json.loads((tmp_path / "straight" / "run.json").read_text())
        assert scores["all"] == record["test"]["all"]
    assert len(answers) == 1
