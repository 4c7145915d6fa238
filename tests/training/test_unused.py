"""No setting that a run does not use is accepted without a word: an error or one line in the log says so."""

import logging

import pytest
import tiny
import torch
from small_run import llama

import fastln
from fastln import FastLNError
from fastln.data import DataOptions, load_source
from fastln.engines import put_method, save_trained_adapter
from fastln.training import TrainConfig
from fastln.training.merge_run import merge_into_base
from fastln.training.run import TrainRun, run_training
from fastln.training.tasks import apply_method
from fastln.training.train import tell_unused


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("tasks"), tiny.phantom(8)
    return lambda model: tiny.TASKS[model](folder / model, data)


@pytest.fixture
def told(caplog):
    def of(task, method="layernorm", data=None, engine=None, adapter_dtype=torch.float32, **settings):
        apply_method(task, method, engine)
        with caplog.at_level(logging.WARNING, "fastln"):
            tell_unused(task, data or tiny.phantom(8), TrainConfig(method, **settings), adapter_dtype)
        lines = [record.message for record in caplog.records if "has no effect" in record.message]
        caplog.clear()
        return lines

    return of


def test_weight_decay_where_nothing_decays(tasks, told):
    (line,) = told(tasks("blip"), weight_decay=0.1)
    assert line.startswith("weight_decay 0.1 has no effect: method layernorm trains only norms, biases and other vec")
    assert told(tasks("blip"), "bitfit", weight_decay=0.1)
    assert told(tasks("blip"), "vera", weight_decay=0.1)
    for model, method in (("dual", "layernorm"), ("blip", "lora"), ("blip", "full")):  # the dual encoder's head decays
        assert told(tasks(model), method, weight_decay=0.1) == []
    assert told(tasks("blip"), weight_decay=0.0) == []


def test_questions_per_image_where_no_vision_pass_is_shared(tasks, told):
    (line,) = told(tasks("blip"), questions_per_image=4)
    assert "shares no vision pass between questions" in line
    (line,) = told(tasks("dual"), "head", questions_per_image=4)
    assert "the towers' features are computed once for all epochs" in line
    data = tiny.phantom(8)
    data.samples = list({sample.image: sample for sample in data.samples}.values())
    (line,) = told(tasks("dual"), data=data, questions_per_image=4)
    assert "each image of" in line
    assert told(tasks("dual"), questions_per_image=4) == []


def test_head_epochs_where_no_head_trains_alone(tasks, told):
    (line,) = told(tasks("blip"), head_epochs=7)
    assert line.startswith("head_epochs 7 has no effect")
    assert told(tasks("dual"), head_epochs=7) == []


@pytest.mark.parametrize("method", ["bitfit", "full", "layernorm+bias", "layernorm+lora", "head", "LN-T"])
def test_the_dtype_of_an_adapter_that_no_norm_is_in(method, tasks, told):
    (line,) = told(tasks("dual"), method, adapter_dtype=torch.float16)
    assert line == f"adapter_dtype torch.float16 has no effect: no adapter holds the norms of method {method}"


def test_the_dtype_of_an_adapter_with_norms_in_it(tasks, told):
    assert told(tasks("dual"), adapter_dtype=torch.float16) == []
    assert told(tasks("blip"), "LN-F-LN", adapter_dtype=torch.float16) == []
    assert told(tasks("dual"), engine="torch", adapter_dtype=torch.float16)


def test_names_in_without_that_leave_nothing_out(caplog):
    with caplog.at_level(logging.WARNING, "fastln"):
        fastln.prepare(llama(), without=("gated_mlps", "post_norms", "dropout", "random_heads"))
    assert "without 'post_norms', 'dropout' has no effect on this model here" in caplog.text
    assert fastln.plan(llama(), without=("norms", "late_logits", "late_rows", "cache", "checkpointing")).notes == ()


def test_a_task_s_random_head_cannot_be_left_out(tasks):
    with pytest.raises(FastLNError, match="'random_heads' cannot be left out of a task: its random head trains"):
        apply_method(tasks("dual"), "layernorm", without=("random_heads",))


def test_a_scope_for_the_head_alone():
    with pytest.raises(
        FastLNError, match="method 'head' trains the task head, which is in no sub-model: leave out the"
    ):
        fastln.prepare(llama(), "head", scope="decoder", also="lm_head")


@pytest.mark.parametrize("words", [("train",), ("eval", "dual")])
def test_the_size_of_a_cache_that_is_not_there(words, command, capsys):
    command(*words, "--feature-cache-size", "1GiB", status=2)
    assert capsys.readouterr().err == (
        "error: feature_cache_size 1GiB: there is no feature_cache whose size it limits\n"
    )


def test_a_layout_for_data_that_comes_with_fastln():
    with pytest.raises(
        FastLNError, match="phantom comes with fastln and has no layout on disk; leave out layout 'plain'"
    ):
        load_source("phantom", DataOptions(layout="plain"))


def test_a_dry_run_tells_what_its_run_would(phantom, tmp_path, caplog, capsys):
    tiny.towers(tmp_path, tiny.phantom(12).samples)
    model = f"dual:{tmp_path / 'vision'},{tmp_path / 'text'}"
    run = TrainRun(phantom, model, None, TrainConfig("head", questions_per_image=4))
    with caplog.at_level(logging.WARNING, "fastln"):
        run_training(run, tmp_path / "out", dry_run=True, resume=True)
    assert "questions_per_image 4 has no effect" in caplog.text
    assert "a dry run reads and writes nothing in" in caplog.text
    assert "learning rates at their highest: task head 0.001" in capsys.readouterr().out


def test_the_check_of_a_base_that_an_adapter_of_peft_does_not_know(tmp_path, caplog):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    save_trained_adapter(put_method(model, "lora"), tmp_path / "adapter")
    with caplog.at_level(logging.WARNING, "fastln"):
        merge_into_base(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged", check_base=False)
    assert "check_base has no effect: peft writes no fingerprint of the base into a LORA adapter" in caplog.text
