"""What a run leaves can be used: its printed commands give its figures, its adapters and checkpoints need no more."""

import dataclasses
import json
import logging
import shlex
import shutil

import peft
import pytest
import tiny
import tiny_chat
import torch
from layouts import LAYOUTS
from transformers import AutoModelForCausalLM

import fastln
from fastln.data import DataOptions, Source, load_source
from fastln.engines import save_trained_adapter
from fastln.errors import FastLNError
from fastln.models import load_task
from fastln.origin import Origin, read_origin
from fastln.training import TrainConfig, eval_run
from fastln.training import run as run_module
from fastln.training.eval_run import EvalRun, run_evaluation
from fastln.training.merge_run import merge_into_base
from fastln.training.run import TrainRun, run_training
from fastln.training.tasks import apply_method

CONFIG = TrainConfig(epochs=2, head_epochs=1, batch_size=5)


@pytest.fixture
def few(monkeypatch) -> None:
    """Make every split of the phantom small."""

    def load(spec: str, options: DataOptions | None = None) -> Source:
        source = load_source(spec, options)
        return dataclasses.replace(source, splits={name: rows[:18] for name, rows in source.splits.items()})

    for module in (run_module, eval_run):
        monkeypatch.setattr(module, "load_source", load)


def spec_of(kind, folder):
    if kind == "blip":
        tiny.blip_config().to_json_file(folder / "tiny.json")
        return f"blip:{folder / 'tiny.json'}"
    if kind != "dual":
        return tiny_chat.config(folder, kind)
    tiny.towers(folder, tiny.phantom().samples)
    return f"dual:{folder / 'vision'},{folder / 'text'}"


CASES = [("dual", "bfloat16"), ("blip", "bfloat16"), ("llava", "float32")]
CASES += [
    pytest.param(kind, dtype, marks=pytest.mark.slow)
    for kind in ("dual", "blip", "llava")
    for dtype in ("bfloat16", "float32")
    if (kind, dtype) not in CASES
]


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:.* rounds ")
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_the_commands_that_a_run_prints_give_its_figures(kind, dtype, tmp_path, command, caplog, capsys):
    caplog.set_level(logging.INFO, "fastln")
    run = TrainRun("phantom", spec_of(kind, tmp_path), None, CONFIG, dtype=dtype, validation=0.3)
    run_training(run, tmp_path / "a run")
    printed = [line for line in capsys.readouterr().out.splitlines() if ": exact match" in line]
    commands = [m.partition("again with: ")[2] for m in caplog.messages if "again with: " in m]
    assert len(printed) == len(commands) == 2
    for line, again in zip(printed, commands, strict=True):
        words = shlex.split(again)
        assert words[0] == "fastln"
        metrics = tmp_path / "metrics.json"
        command(*words[1:], "--metrics", metrics)
        assert line in capsys.readouterr().out
        recorded = json.loads((tmp_path / "a run" / "run.json").read_text())
        scores = json.loads(metrics.read_text())
        assert recorded[scores["split"]].items() <= scores.items()
    assert f"dtype {dtype}, as the model is saved" in caplog.messages


@pytest.mark.filterwarnings("ignore:.* rounds ")
@pytest.mark.parametrize("layout", ["plain, jsonl", "slake"])
def test_so_do_those_for_data_in_files(layout, tmp_path, command, caplog, capsys):
    own = LAYOUTS[layout]
    rows = [own.answer(own.row(n % 4), answer) for n, answer in enumerate(["left", "right", "up", "down"] * 2)]
    if layout == "slake":
        data, held_out = own.make(tmp_path / "data", train=rows, validation=rows[:3]), 0.0
        options, words = DataOptions("slake", None, True), "--layout slake --device cpu --skip-bad-rows"
    else:
        data, held_out = own.make(tmp_path / "data", train=rows, test=rows[:3]), 0.5
        (tmp_path / "data" / "validation.jsonl").unlink()
        options, words = DataOptions(None, None, "5%", True), "--device cpu --keep-repeats --skip-bad-rows 5%"
    run = TrainRun(data, spec_of("dual", tmp_path), None, CONFIG, held_out, "bfloat16", "cpu", options)
    with caplog.at_level(logging.INFO, "fastln"):
        run_training(run, tmp_path / "out")
    printed = [line for line in capsys.readouterr().out.splitlines() if ": exact match" in line]
    commands = [m.partition("again with: ")[2] for m in caplog.messages if "again with: " in m]
    assert len(printed) == len(commands) >= 1
    for line, again in zip(printed, commands, strict=True):
        assert again.endswith(words)
        command(*shlex.split(again)[1:])
        assert line in capsys.readouterr().out


def test_what_a_low_precision_rounds_of_the_norms_is_told(tmp_path, monkeypatch):
    data = tiny.phantom(12)
    task = tiny.dual(tmp_path, data, torch.bfloat16)
    told = (
        r"bfloat16 rounds [\d,]+ of 640 tuned values, by up to .*; the whole model is saved and scored so; the adapter"
    )
    with pytest.warns(UserWarning, match=told):
        run_module.train_task(task, data, CONFIG, progress=False)


def test_two_encoders_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    task = tiny.dual(tmp_path, tiny.phantom(12), torch.float32)
    trained = apply_method(task, "lora")
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", lambda *_: pytest.fail("asked"))
    save_trained_adapter(trained, tmp_path / "adapter", origin=Origin(f"dual:{tmp_path},{tmp_path}"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow(take=1)
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", ["dual", "blip"])
@pytest.mark.parametrize("size", [None, 64])
def test_an_adapter_and_a_checkpoint_need_nothing_else(kind, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = spec_of(kind, tmp_path).replace(str(tmp_path), ".")
    outcome = run_training(TrainRun("phantom", spec, None, CONFIG, validation=0.3, image_size=size), tmp_path / "out")
    monkeypatch.chdir("/")
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-6"
    model = load_task(str(tmp_path / "out"), tiny.phantom(18)).model.state_dict()
    for folder in (tmp_path / "out" / "adapter", checkpoint):
        origin, _ = read_origin(folder)
        assert origin.model == spec_of(kind, tmp_path)
        assert origin.image_size == size
        for run in (EvalRun(None, adapter=folder, batch_size=5), EvalRun(str(folder), batch_size=5)):
            assert run_evaluation(run) == outcome.test
        merged = tmp_path / f"merged {folder.name}"
        merge_into_base(None, folder, merged)
        assert run_evaluation(EvalRun(str(merged), batch_size=5)) == outcome.test
        again = load_task(str(merged), tiny.phantom(18)).model.state_dict()
        assert all(torch.equal(tensor, model[name]) for name, tensor in again.items())
    assert not any((checkpoint / name).exists() for name in ("trained.safetensors", "config.json"))


@pytest.mark.usefixtures("few")
def test_a_dual_encoders_adapter_meets_other_data_with_its_own_answers(tmp_path):
    spec = spec_of("dual", tmp_path)
    run_training(TrainRun("phantom", spec, None, CONFIG), tmp_path / "out")
    own = LAYOUTS["plain, jsonl"]
    data = own.make(tmp_path / "data", train=[own.row(n) for n in (0, 1)], test=[own.row(2)])
    files = [tmp_path / "whole.jsonl", tmp_path / "adapted.jsonl"]
    run_evaluation(EvalRun(str(tmp_path / "out"), data, "train", predictions=files[0]))
    run_evaluation(EvalRun(spec, data, "train", adapter=tmp_path / "out" / "adapter", predictions=files[1]))
    assert files[0].read_text() == files[1].read_text()
    merge_into_base(spec, tmp_path / "out" / "adapter", tmp_path / "merged")
    for name in ("fastln.json", "tokenizer.json"):  # as an earlier version left it
        (tmp_path / "out" / "adapter" / name).unlink(missing_ok=True)
    with pytest.raises(FastLNError, match=r"it does not hold the answers .*: give the folder that the run wrote"):
        merge_into_base(spec, tmp_path / "out" / "adapter", tmp_path / "merged again")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("method", ["bitfit", "layernorm+lora", "full"])
def test_checkpoints_of_methods_without_an_adapter_are_scored_and_merged(method, tmp_path):
    spec, out = spec_of("dual", tmp_path), tmp_path / "out"
    config = dataclasses.replace(CONFIG, method=method, epochs=1)
    outcome = run_training(TrainRun("phantom", spec, None, config), out)
    assert not (out / "adapter").exists()
    checkpoint = out / "checkpoints" / "checkpoint-4"
    assert run_evaluation(EvalRun(str(checkpoint), batch_size=5)) == outcome.test
    merge_into_base(None, checkpoint, tmp_path / "merged")
    assert run_evaluation(EvalRun(str(tmp_path / "merged"), batch_size=5)) == outcome.test


@pytest.mark.usefixtures("few")
def test_a_base_that_is_gone_or_was_never_named_is_told(tmp_path):
    spec, out = spec_of("dual", tmp_path), tmp_path / "out"
    run_training(TrainRun("phantom", spec, None, dataclasses.replace(CONFIG, epochs=1)), out)
    shutil.move(tmp_path / "vision", tmp_path / "elsewhere")
    with pytest.raises(FastLNError, match=r"its base was dual:.*, and .*/vision is not there: name the base where it"):
        run_evaluation(EvalRun(str(out / "adapter")))
    run_evaluation(EvalRun(f"dual:{tmp_path / 'elsewhere'},{tmp_path / 'text'}", adapter=out / "adapter"))
    fastln.save_adapter(fastln.prepare(tiny_llama(), backend="reference"), tmp_path / "unnamed")
    with pytest.raises(FastLNError, match="unnamed: it does not say what its base is"):
        merge_into_base(None, tmp_path / "unnamed", tmp_path / "merged")
    with pytest.raises(FastLNError, match="this is an adapter or a checkpoint, not a whole model"):
        load_task(str(out / "adapter"), tiny.phantom(6))
    with pytest.raises(FastLNError, match="give a model, or an adapter"):
        EvalRun(None)


def tiny_llama():
    from transformers import LlamaConfig

    return AutoModelForCausalLM.from_config(LlamaConfig(**tiny.SIZES, vocab_size=64))
