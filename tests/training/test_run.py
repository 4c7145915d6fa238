"""fastln train and fastln eval: what lands in the folder, and what bad options get."""

import dataclasses
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from fastln.adapters import load_adapter
from fastln.errors import FastLNError
from fastln.models import load_task
from fastln.state import prepared
from fastln.training import TrainConfig, evaluate, tasks, train_task
from fastln.training.eval_run import EvalRun, run_evaluation
from fastln.training.head import train_head
from fastln.training.merge_run import merge_into_base
from fastln.training.preview import preview
from fastln.training.run import TrainRun, run_training

CONFIG = TrainConfig(epochs=2, head_epochs=2, batch_size=8)


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:float16 rounds")
def test_an_adapter_in_half_precision(tmp_path):
    source = tiny.dual_spec(tmp_path)
    config = TrainConfig(epochs=1, head_epochs=1)
    run_training(TrainRun("phantom", source, None, config, adapter_dtype="float16"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "ln_tuning" in name} == {torch.float16}
    run_evaluation(EvalRun(source, "phantom", "test", adapter=tmp_path / "out" / "adapter"))
    with pytest.raises(FastLNError, match=r"unknown dtype 'int8' of an adapter \(valid: float32, float16\)"):
        TrainRun("phantom", "dual", None, CONFIG, adapter_dtype="int8")
    for method, engine in (("lora", None), ("layernorm", "peft")):
        with pytest.raises(FastLNError, match=f"peft writes the adapter of method '{method}' in its own dtype"):
            TrainRun("phantom", "dual", engine, TrainConfig(method), adapter_dtype="float16")


@pytest.mark.usefixtures("few")
@pytest.mark.slow(take=3)
@pytest.mark.parametrize("method", ["layernorm", "lora", "head", "LN-F", "layernorm+lora", "adalora"])
def test_train_then_eval(method, tmp_path, capsys):
    run = TrainRun(
        "phantom", tiny.dual_spec(tmp_path), None, TrainConfig(method, epochs=1, head_epochs=1), validation=0.2
    )
    outcome = run_training(run, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"]
    assert record["test"]["n_all"] == 24
    assert record["test"]["all"] == outcome.test.all
    assert record["validation"]["n_all"] > 0
    assert "synthetic" in capsys.readouterr().out
    predictions = tmp_path / "predictions.jsonl"
    score = run_evaluation(EvalRun(str(tmp_path / "out"), "phantom", "test", predictions=predictions))
    assert score == outcome.test
    adapter = tmp_path / "out" / "adapter"
    assert record["adapter_bytes"] == (sum(f.stat().st_size for f in adapter.iterdir()) if adapter.exists() else None)
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 24
    right = sum(row["prediction"] == row["answer"].lower() for row in rows)
    assert 100 * right / 24 == pytest.approx(score.all)


def test_training_lowers_the_loss_and_moves_only_norms_and_head(tmp_path):
    data = tiny.phantom()
    task = tiny.dual(tmp_path, data)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    result = train_task(task, data, TrainConfig(epochs=6, head_epochs=3, batch_size=8), progress=False)
    assert sum(result.losses[-6:]) < 0.8 * sum(result.losses[:6])
    changed = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])}
    norms = {name for name in before if "norm" in name.lower()}
    head = {name for name in before if name.startswith("fusion_head.")}
    assert changed == norms | head


def test_what_a_run_leaves_out_stays_stock_in_the_training_and_in_the_preview(tmp_path, monkeypatch):
    data, plans = tiny.phantom(12), []
    put = tasks.put

    def watched(*args, **kwargs):
        model = put(*args, **kwargs)
        plans.append(prepared(model).plan)
        return model

    monkeypatch.setattr(tasks, "put", watched)
    config = TrainConfig(epochs=1, head_epochs=0, batch_size=12, without=("dropout", "cache"))
    train_task(tiny.dual(tmp_path, data), data, config, progress=False)
    preview(tiny.dual(tmp_path, data), data, config, None)
    assert [plan.without for plan in plans] == [(*config.without, "random_heads")] * 2  # the task names its head
    with pytest.raises(FastLNError, match="without dropout, cache is for engine 'fastln'"):
        train_task(tiny.dual(tmp_path, data), data, config, engine="peft", progress=False)
    with pytest.raises(FastLNError, match="without dropout, cache is for engine 'fastln'"):
        TrainRun("phantom", "dual", "torch", config)


def test_the_head_trains_on_the_features_that_the_model_computes(tmp_path):
    data = tiny.phantom()
    task = tiny.dual(tmp_path, data)
    task.model.eval()
    with torch.no_grad():
        expected = [task.model(**task.collate([data[i] for i in range(j, j + 8)], data)).loss for j in range(0, 48, 8)]
    config = TrainConfig(batch_size=48, head_learning_rate=1e-3, weight_decay=0.0, warmup=0.0)
    first, *_, last = train_head(task, data, config, epochs=20)
    assert first == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert last < first
    assert not any(parameter.grad is not None for parameter in task.model.vision.parameters())


@pytest.mark.usefixtures("few")
@pytest.mark.slow(take=3)
@pytest.mark.parametrize(
    "method", ["layernorm/fastln", "layernorm/peft", "LN-F/fastln", "lora/peft", "lora/fastln", "ia3/peft"]
)
def test_the_adapter_on_its_base_scores_as_the_whole_model_and_is_small(method, tmp_path, caplog):
    method, _, engine = method.partition("/")
    base, out = tiny.dual_spec(tmp_path), tmp_path / "out"
    with caplog.at_level("INFO", "fastln"):
        outcome = run_training(TrainRun("phantom", base, engine, TrainConfig(method, epochs=1, head_epochs=1)), out)
    size = json.loads((out / "run.json").read_text())["adapter_bytes"]
    assert f"the adapter is in {out / 'adapter'}: {size:,} bytes" in caplog.text
    assert size < (out / "model" / "model.safetensors").stat().st_size  # most of it is the head of the tiny model
    if method == "LN-F":
        assert not any(key.startswith("text") for key in load_file(out / "adapter" / "adapter_model.safetensors"))
    predictions = [tmp_path / "whole.jsonl", tmp_path / "adapted.jsonl"]
    run_evaluation(EvalRun(str(out), "phantom", "test", predictions=predictions[0]))
    score = run_evaluation(EvalRun(base, "phantom", "test", adapter=out / "adapter", predictions=predictions[1]))
    assert score == outcome.test
    assert predictions[0].read_text() == predictions[1].read_text()
    if method in ("layernorm", "LN-F"):
        merge_into_base(str(out), out / "adapter", tmp_path / "merged")
        assert run_evaluation(EvalRun(str(tmp_path / "merged"), "phantom", "test")) == score


@pytest.mark.usefixtures("few")
@pytest.mark.slow(take=2)
@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("full/fastln", "an adapter holds norms and the modules named in `also`"),
        ("layernorm+lora/fastln", "an adapter holds either norms or peft's layers, and here both train"),
        ("layernorm/torch", "this model is not prepared"),
        ("head/fastln", "no norm of this model trains"),
    ],
)
def test_what_no_adapter_holds_is_told(method, why, tmp_path, caplog):
    method, _, engine = method.partition("/")
    run = TrainRun("phantom", tiny.dual_spec(tmp_path), engine, TrainConfig(method, epochs=1, head_epochs=1))
    with caplog.at_level("INFO", "fastln"):
        run_training(run, tmp_path / "out")
    assert f"no adapter, only the whole model: {why}" in caplog.text
    assert json.loads((tmp_path / "out" / "run.json").read_text())["adapter_bytes"] is None
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.usefixtures("few")
def test_an_adapter_meets_no_other_base_and_no_other_answers(tmp_path):
    base, out = tiny.dual_spec(tmp_path), tmp_path / "out"
    run_training(TrainRun("phantom", base, None, CONFIG), out)
    model = load_task(base, tiny.phantom(24)).model
    model.config.answers = model.config.answers[::-1]
    with pytest.raises(FastLNError, match="the answers that the model chooses from differ"):
        load_adapter(model, out / "adapter")
    vision = AutoModel.from_pretrained(tmp_path / "vision")
    with torch.no_grad():
        vision.embeddings.cls_token += 1
    vision.save_pretrained(tmp_path / "vision")
    with pytest.raises(FastLNError, match="the adapter was trained on another base"):
        run_evaluation(EvalRun(base, "phantom", "test", adapter=out / "adapter"))
    with pytest.raises(FastLNError, match=r"there is no adapter_config\.json"):
        run_evaluation(EvalRun(base, "phantom", "test", adapter=out))


@pytest.mark.usefixtures("few")
def test_the_saved_file_holds_the_stock_keys(tmp_path):
    source = tiny.dual_spec(tmp_path)
    run_training(TrainRun("phantom", source, "peft", CONFIG), tmp_path / "peft")
    run_training(TrainRun("phantom", source, "fastln", CONFIG), tmp_path / "fastln")
    keys = [set(load_file(tmp_path / engine / "model" / "model.safetensors")) for engine in ("peft", "fastln")]
    assert keys[0] == keys[1]


def test_lora_counts_the_model_and_not_its_copies(tmp_path):
    data = tiny.phantom(24)
    totals = {
        method: train_task(
            tiny.dual(tmp_path, data), data, TrainConfig(method, epochs=1, head_epochs=0), progress=False
        )
        for method in ("lora", "full")
    }
    assert totals["lora"].total_parameters == totals["full"].total_parameters == totals["full"].trainable_parameters


def test_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    data_and_model = ("phantom", tiny.dual_spec(tmp_path))
    with pytest.raises(FastLNError, match="file/out: cannot be written to"):
        run_training(TrainRun(*data_and_model, None, CONFIG), tmp_path / "file" / "out")
    with pytest.raises(FastLNError, match="the folder for the predictions does not exist"):
        run_evaluation(EvalRun("dual", "phantom", "test", predictions=tmp_path / "no" / "such"))


def test_options_out_of_range_are_named():
    with pytest.raises(FastLNError, match="seed is -1; it must be from 0"):
        TrainConfig(seed=-1)
    with pytest.raises(FastLNError, match="epochs is 0; it must be at least 1"):
        TrainConfig(epochs=0)
    with pytest.raises(FastLNError, match="learning_rate is -1; it must be greater than 0"):
        TrainConfig(learning_rate=-1)
    with pytest.raises(FastLNError, match=r"max_grad_norm is 0\.0; it must be greater than 0"):
        TrainConfig(max_grad_norm=0.0)
    with pytest.raises(FastLNError, match="weight_decay is nan; it must be at least 0"):
        TrainConfig(weight_decay=float("nan"))
    with pytest.raises(FastLNError, match="warmup is 5; it is a share of the steps, from 0 to 1"):
        TrainConfig(warmup=5)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("blip", "layernorm", r"is for a task head that starts random, and blip:\S+ has none; leave it out"),
        ("dual", "head", "method 'head' trains the head at learning_rate; give that in place of head_learning_rate"),
    ],
)
def test_a_head_learning_rate_without_effect_is_an_error(kind, method, message, tmp_path):
    data = tiny.phantom(24)
    config = TrainConfig(method, head_learning_rate=1e-3)
    with pytest.raises(FastLNError, match=message):
        train_task(tiny.TASKS[kind](tmp_path, data), data, config, progress=False)
    model = f"blip:{tmp_path / 'tiny.json'}" if kind == "blip" else f"dual:{tmp_path / 'vision'},{tmp_path / 'text'}"
    with pytest.raises(FastLNError, match=message):
        run_training(TrainRun("phantom", model, None, config), tmp_path / "out", dry_run=True)


def test_settings_without_effect_on_the_model_are_told(tmp_path, caplog, capsys):
    data = tiny.phantom(24)
    config = TrainConfig(epochs=1, head_epochs=2, questions_per_image=4)
    keeping = dataclasses.replace(config, keep_weights=True)
    model = f"blip:{tmp_path / 'tiny.json'}"  # whose name is blip:tiny
    with caplog.at_level("WARNING", "fastln"):
        train_task(tiny.blip(tmp_path, data), data, keeping, progress=False)
        run_training(TrainRun("phantom", model, None, keeping), tmp_path / "out", dry_run=True)
        for name, what in (("head_epochs 2", "no head of blip:tiny"), ("questions_per_image 4", "blip:tiny")):
            (in_training, in_a_dry_run) = (message for message in caplog.messages if name in message)
            assert in_training == in_a_dry_run
            assert in_training.startswith(f"{name} has no effect: {what}")
        # The training logs it with the plan's other notes; the dry run shows it below the plan.
        assert sum("keep_weights has no effect" in message for message in caplog.messages) == 1
        assert capsys.readouterr().out.count("keep_weights has no effect") == 1
        caplog.clear()
        train_task(tiny.dual(tmp_path, data), data, config, progress=False)
        train_task(tiny.blip(tmp_path, data), data, TrainConfig(epochs=1), progress=False)
    assert not [message for message in caplog.messages if "has no effect" in message]


@pytest.mark.parametrize("method", ["layernorm", "head"])
@pytest.mark.parametrize("head_epochs", [0, 2])
def test_a_loss_that_is_no_number_stops_the_run(method, head_epochs, tmp_path):
    data = tiny.phantom(24)
    task = tiny.dual(tmp_path, data)
    with torch.no_grad():
        task.model.vision.layernorm.weight.fill_(float("nan"))
    named = r" in the batch of samples phantom-train-.*, "
    with pytest.raises(FastLNError, match=f"the loss is not a number at step 1{named}"):
        train_task(task, data, TrainConfig(method, epochs=1, head_epochs=head_epochs, batch_size=8), progress=False)


def test_evaluation_leaves_the_mode_as_it_was(tmp_path):
    data = tiny.phantom(8)
    task = tiny.dual(tmp_path, data)
    task.model.train()
    evaluate(task, data)
    assert task.model.training
