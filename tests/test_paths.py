"""A path with `~` or a variable leads to the same place through every option, every file of options and Python."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
import typer
from layouts import LAYOUTS
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

import fastln
from fastln import cli
from fastln.bench.runner import run_suite
from fastln.bench.suite import load_suite
from fastln.configured import expand
from fastln.data import load_source
from fastln.errors import FastLNError
from fastln.files import expanded, user_path
from fastln.models import load_task
from fastln.models.outline import outline
from fastln.models.sources import expanded_sources
from fastln.training import TrainConfig
from fastln.training.config import TrainFiles
from fastln.training.eval_run import EvalRun
from fastln.training.merge_run import merge_into_base
from fastln.training.run import TrainRun, run_training
from fastln.training.tensor_store import TensorStore

PLAIN = LAYOUTS["plain, jsonl"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, in a working directory that is another and must stay empty."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", str(tmp_path / "home"))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert not list((tmp_path / "work").iterdir()), "something was written to a folder called ~"


def test_what_a_name_means(home):
    assert expanded("~/a") == expanded("$RUNS/a") == expanded("${HOME}/a") == f"{home}/a"
    assert expanded("$NOWHERE/~/a~b") == "$NOWHERE/~/a~b"
    assert expanded("org/name") == "org/name"
    assert user_path(Path("~/a")) == home / "a"


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("~/x", "{home}/x"),
        ("dual:~/a,~/b", "dual:{home}/a,{home}/b"),
        ("dual:~/a, org/name", "dual:{home}/a,org/name"),
        ("chat:$RUNS/x.json", "chat:{home}/x.json"),
        ("blip:${RUNS}", "blip:{home}"),
        ("dual", "dual"),
        ("BertForMaskedLM:8x128", "BertForMaskedLM:8x128"),
    ],
)
def test_what_a_model_means(spec, meant, home):
    assert expanded_sources(spec) == meant.format(home=home)
    assert TrainRun("~/d", spec, None, TrainConfig()).model == meant.format(home=home)
    assert EvalRun(spec).model == meant.format(home=home)


def test_a_run_and_what_resumes_it_are_in_one_place(home, capsys):
    tiny.towers(home, tiny.phantom(4).samples)
    PLAIN.make(home / "data", train=[PLAIN.row(n) for n in (0, 1, 2)])
    config = TrainConfig(epochs=1, head_epochs=1, batch_size=4)
    run = TrainRun("~/data", "dual:~/vision,$RUNS/text", None, config)
    run_training(run, Path("~/out"), features=None)
    assert json.loads((home / "out" / "run.json").read_text())["run"]["data"] == str(home / "data")
    assert (home / "out" / "checkpoints" / "log.jsonl").is_file()
    assert run_training(run, Path("$RUNS/out"), resume=True) is None  # finished
    same = TrainRun(str(home / "data"), f"dual:{home}/vision,{home}/text", None, config)
    assert run_training(same, home / "out", resume=True) is None


def test_files_of_options_and_words(home, monkeypatch, capsys):
    (home / "there").mkdir()
    (home / "there" / "results.json").write_text("[]")
    (home / "run.yaml").write_text("out: ~/there\nmodel: 'dual:~/a,~/b'\n")
    command = typer.main.get_command(cli.app).commands["train"]
    words = expand(command, ["--config", "~/run.yaml", "data=~/d"])
    assert {"--out=~/there", "--model=dual:~/a,~/b", "--data=~/d"} == set(words)
    for arguments in (
        ["train", "--config", "~/run.yaml", "data=~/d"],
        ["train", "--out", "~/there", "--data=~/d"],
        ["eval", "~/m", "--data", "$RUNS/d"],
        ["bench", "--data", "~/d", "--model", "dual", "--out", "~/there"],
    ):
        monkeypatch.setattr(sys, "argv", ["fastln", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert f"{home}/" in capsys.readouterr().err.strip().splitlines()[-1]


def test_files_that_eval_writes(home):
    run = EvalRun("~/m", predictions=Path("~/p.jsonl"), metrics="~/m.json", adapter="~/a")
    assert (run.predictions, run.metrics, run.adapter) == (home / "p.jsonl", home / "m.json", home / "a")
    with pytest.raises(FastLNError, match=f"{home}: is a folder; name a file for the metrics"):
        EvalRun("~/m", metrics=Path("~"))


def test_python_reads_paths_alike(home):
    TensorStore("~/cache", "1GiB")
    assert (home / "cache").is_dir()
    assert TrainFiles("~/c", adapter=Path("~/a")) == TrainFiles(home / "c", adapter=home / "a")
    PLAIN.make(home / "data")
    assert load_source("$RUNS/data").name == "data"
    with pytest.raises(FastLNError, match=f"{home}/nowhere"):
        load_task("chat:~/nowhere", tiny.phantom(4))
    with pytest.raises(FastLNError, match=f"{home}/nowhere"):
        outline("~/nowhere")
    arguments = TrainingArguments(output_dir="~/trained", report_to="none", use_cpu=True)
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    trainer = fastln.FastLNTrainer(model=BertForMaskedLM(config), args=arguments, train_dataset=[{"input_ids": [1]}])
    with pytest.raises(FastLNError, match=f"{home}/trained/checkpoint-1: there is no such folder"):
        trainer.train(resume_from_checkpoint="~/trained/checkpoint-1")


def test_adapters_and_merged_models(home):
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    torch.manual_seed(0)
    base = BertForMaskedLM(config)
    base.save_pretrained(home / "base")
    model = fastln.prepare(base)
    fastln.save_adapter(model, "~/adapter")
    assert (home / "adapter" / "adapter_config.json").is_file()
    fastln.load_adapter(model, "$RUNS/adapter")
    fastln.merge_adapter(model, "~/merged")
    assert (home / "merged" / "config.json").is_file()
    merge_into_base("~/base", Path("~/adapter"), Path("~/again"))
    assert (home / "again" / "model.safetensors").is_file()


def test_suites(home):
    (home / "mine.yaml").write_text("data: ~/d\nmodels: ['dual:~/a,~/b']\nmethods: [full/torch]\n")
    suite = load_suite("~/mine.yaml", {})
    assert (suite.name, suite.data, suite.models) == ("mine", f"{home}/d", (f"dual:{home}/a,{home}/b",))
    (home / "results.json").write_text("[]")
    with pytest.raises(FastLNError, match=f"{home}: already holds a run"):
        run_suite(suite, Path("~"))
