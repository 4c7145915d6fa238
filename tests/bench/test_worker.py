"""The worker on the embedded models: every method, measured for real, in a few steps."""

import dataclasses
import itertools
import math

import pytest
import torch
from layouts import LAYOUTS
from torch import nn

from fastln.bench import storage, worker
from fastln.bench.results import Job, Quality, Steps, read_rows
from fastln.bench.runner import run_suite
from fastln.bench.suite import load_suite
from fastln.data import GroupedBatches, VQADataset, load_dataset
from fastln.errors import FastLNError
from fastln.methods import METHODS
from fastln.models import load_task
from fastln.models.shapes import is_shape
from fastln.ops import OpSettings
from fastln.ops.backends import resolve
from fastln.settings import MethodSettings
from fastln.training import train

TINY = {"batch_size": 2, "questions_per_image": 2, "rounds": 1, "warmup_steps": 0, "steps": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(kind="speed", method="layernorm", engine="torch", model="dual", number=1, **changes):
    suite = dataclasses.replace(load_suite("quick", TINY), dtypes=("float32",), device="cpu")
    return Job(dataclasses.replace(suite, **changes), kind, model, "float32", method, engine, number)


QUICK = load_suite("quick").methods


@pytest.mark.slow(pool="suites")
# On the second model a few: its runs take longer, and the engines are the same.
@pytest.mark.parametrize(
    ("model", "methods"), [("dual", QUICK), ("blip", ("layernorm/fastln", "layernorm/peft", "full/torch"))]
)
def test_the_quick_suite_end_to_end(model, methods, tmp_path):
    rows = run_suite(load_suite("quick", TINY | {"models": [model], "methods": methods}), tmp_path)
    assert [row.error for row in rows] == [None] * (len(methods) + 1)  # fastln's norms in 8 bits, too
    assert read_rows(tmp_path / "results.json") == rows
    for row in rows:
        assert len(row.step_seconds_all) == 2
        assert row.peak_memory_bytes > 50e6
        assert math.isfinite(row.final_loss)
        assert row.accuracy is None
        assert "means nothing" in row.accuracy_note
        assert row.provenance["data"]["synthetic"] is True
    found = {f"{row.method}/{row.engine}": row for row in rows if row.products == "exact"}
    assert len({row.total_parameters for row in rows}) == 1
    assert found["layernorm/fastln"].learning_rates["norms"] == 3e-3
    trained = {name: row.trainable_parameters for name, row in found.items()}
    assert trained["full/torch"] == found["full/torch"].total_parameters
    assert len({row.trainable_parameters for row in rows if row.method == "layernorm"}) == 1
    assert trained["layernorm/fastln"] < 0.1 * trained["full/torch"]
    saved = {name: row.saved_activation_bytes for name, row in found.items()}
    assert 0 < saved["layernorm/fastln"] < saved["full/torch"]
    if model == "dual":
        assert saved["head/torch"] < saved["layernorm/torch"] < saved["full/torch"]


@pytest.mark.slow(pool="suites")
def test_the_cpu_suite_end_to_end(tmp_path):
    """Structure, at a size that says nothing of times."""
    suite = load_suite(
        "cpu", TINY | {"models": ["ViTForImageClassification:2x32:1"], "dtypes": ["float32", "bfloat16"]}
    )
    rows = run_suite(suite, tmp_path)
    assert [(row.method, row.engine, row.products, row.dtype) for row in rows] == [
        (*contender[:3], dtype) for dtype in ("float32", "bfloat16") for contender in suite.contenders(dtype)
    ]
    assert [row.error for row in rows] == [None] * 8
    assert read_rows(tmp_path / "results.json") == rows
    for row in rows:
        assert (row.model, row.batch_size) == ("ViTForImageClassification:2x32:1", 2)
        assert row.provenance["data"] == {"name": "random batches", "synthetic": True}
        assert row.provenance["floor"]["operations"] == rows[0].provenance["floor"]["operations"] > 1e7
        assert row.provenance["floor"]["operations_per_second"] > 1e8
        assert row.saved_activation_bytes > 0
    assert "fastln beside peft" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", filter(is_shape, load_suite("cpu", {"data": "phantom"}).models))
def test_shapes_of_the_cpu_suite_take_steps(model):
    family, size = model.split(":")[0], 32 if "Image" in model or "Blip" in model else 16
    for method, engine, products, *_ in load_suite("cpu").contenders("bfloat16"):
        one = job(model=f"{family}:1x{size}:1", method=method, engine=engine)
        steps = worker.work(dataclasses.replace(one, products=products))
        assert math.isfinite(steps.final_loss)


def test_products_reach_the_model():
    shape = "ViTForImageClassification:2x32:1"
    one = job(model=shape, engine="fastln")
    exact, int8 = (worker.work(dataclasses.replace(one, products=products)) for products in ("exact", "int8"))
    assert int8.final_loss == pytest.approx(exact.final_loss, rel=0.1)
    assert int8.trainable_parameters == exact.trainable_parameters
    is_here = resolve("int8_linear", torch.device("cpu"), OpSettings()).backend == "cpu"
    assert (int8.final_loss != exact.final_loss) == is_here


LAYERS = "ViTForImageClassification:4x96:2"


def test_storage_reaches_the_model_and_its_peak_is_measured_as_predicted():
    # Late rows are not predicted, so that exact storage takes a little less.
    base = job(model=LAYERS, engine="fastln", peak="allocator")
    exact, again, within = (
        worker.work(dataclasses.replace(base, **changes))
        for changes in ({}, {"activations": "again"}, {"memory_budget": "0.8x"})
    )
    assert again.final_loss == pytest.approx(exact.final_loss, rel=1e-5)
    assert again.saved_activation_bytes < 0.7 * exact.saved_activation_bytes
    assert within.storage_note.startswith("memory budget ")
    assert again.storage_note is None
    for steps in (exact, again, within):
        assert steps.memory_kind == "CPU allocator peak"
        assert 0.94 < steps.peak_memory_bytes / steps.predicted_peak_bytes <= 1
    assert within.predicted_peak_bytes < exact.predicted_peak_bytes
    second = worker.work(dataclasses.replace(base, memory_budget="0.8x", round=2))
    assert second.predicted_peak_bytes == within.predicted_peak_bytes
    assert worker.work(job(model=LAYERS, engine="fastln")).predicted_peak_bytes is None


def test_stock_code_with_checkpoints_is_measured_as_predicted():
    base = job(model=LAYERS, peak="allocator", warmup_steps=1)
    stock, checkpointed = (worker.work(dataclasses.replace(base, checkpointing=on)) for on in (False, True))
    assert checkpointed.final_loss == pytest.approx(stock.final_loss, rel=1e-5)
    assert checkpointed.saved_activation_bytes < 0.2 * stock.saved_activation_bytes
    for steps in (stock, checkpointed):
        assert steps.peak_memory_bytes == pytest.approx(steps.predicted_peak_bytes, rel=0.02)
    dual = load_task("dual", load_dataset("phantom", "train"))
    dual.model.supports_gradient_checkpointing = False
    with pytest.raises(FastLNError, match="checkpointing: "):
        storage.set_up(dataclasses.replace(base, checkpointing=True), dual, MethodSettings.of(engine="torch"), None)


@pytest.mark.slow
def test_a_budget_on_data_is_for_the_largest_batch_of_a_round():
    one = job(engine="fastln", batch_size=2, warmup_steps=1, steps=1)
    steps = worker.work(dataclasses.replace(one, memory_budget="0.9x"))
    assert steps.predicted_peak_bytes > 0
    assert steps.memory_kind.startswith("process peak RSS")


@pytest.mark.slow
def test_compiled_stock_code_takes_steps():
    functorch = torch._functorch.config
    before = functorch.activation_memory_budget
    try:
        base = job(model="ViTForImageClassification:2x32:1", peak="allocator", warmup_steps=1)
        compiled = worker.work(dataclasses.replace(base, compiled=0.5))
        assert functorch.activation_memory_budget == 0.5
    finally:
        functorch.activation_memory_budget = before
    assert compiled.final_loss == pytest.approx(worker.work(base).final_loss, rel=1e-4)
    assert compiled.predicted_peak_bytes is None
    assert compiled.saved_activation_bytes > 0


def test_codes_of_sub_models_on_data_with_bad_rows(tmp_path):
    rows = {"train": [LAYOUTS["slake"].row(number) for number in range(4)]}
    rows["test"] = [LAYOUTS["slake"].answer(row, "CT") for row in rows["train"]]
    rows["train"].append(LAYOUTS["slake"].row(0) | {"answer": None})
    data = LAYOUTS["slake"].make(tmp_path, **rows)
    changes = {"data": data, "layout": "slake", "warmup_steps": 0, "steps": 1, "batch_size": 2}
    with pytest.raises(FastLNError, match="field 'answer' must be a text"):
        worker.work(job("speed", "LN-F", "fastln", **changes))
    steps = worker.work(job("speed", "LN-F", "fastln", skip_bad_rows=True, **changes))
    both = worker.work(job("speed", "LN-LN", "fastln", skip_bad_rows=True, **changes))
    assert 0 < steps.trainable_parameters < both.trainable_parameters
    assert steps.learning_rates == both.learning_rates == {"norms": 3e-3, "head": 1e-3}
    assert math.isfinite(steps.final_loss)


def test_engines_of_one_method_see_the_same_batches_and_the_same_loss(monkeypatch):
    def without_dropout(*arguments, **options):
        task = load_task(*arguments, **options)
        for module in task.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return task

    # fastln drops by a generator of its own.
    monkeypatch.setattr(worker, "load_task", without_dropout)
    base, *others = [worker.work(job(engine=engine)).final_loss for engine in METHODS["layernorm"].engines]
    assert others == pytest.approx([base] * 2, rel=1e-5)


def test_activations_are_counted_in_the_first_round_alone():
    first, second = (worker.work(job(method="head", number=number)) for number in (1, 2))
    assert isinstance(second, Steps)
    assert first.saved_activation_bytes > 0
    assert second.saved_activation_bytes is None


def test_quality_trains_and_asks_the_test_questions(monkeypatch):
    monkeypatch.setattr(worker, "load_dataset", _eight_questions)
    quality = worker.work(job("quality", method="head", epochs=1, head_epochs=1))
    assert isinstance(quality, Quality)
    assert quality.accuracy["n_all"] == 8
    assert 0 <= quality.accuracy["all"] <= 100


@pytest.mark.parametrize(("method", "head_epochs", "epochs"), [("layernorm", 2, 1), ("head", 3, 0)])
def test_quality_tells_the_epochs_that_were_trained(method, head_epochs, epochs, monkeypatch):
    trained = {"alone": 0, "together": 0}

    def alone(*arguments, epochs, **options):
        trained["alone"] = epochs
        return []

    def together(task, model, data, config, *arguments):
        trained["together"] = config.epochs
        return []

    monkeypatch.setattr(worker, "load_dataset", _eight_questions)
    monkeypatch.setattr(train, "train_head", alone)
    monkeypatch.setattr(train, "_train_method", together)
    quality = worker.work(job("quality", method=method, epochs=1, head_epochs=2))
    assert (quality.head_epochs, quality.epochs) == (trained["alone"], trained["together"]) == (head_epochs, epochs)


def _eight_questions(spec, split, options=None):
    dataset = load_dataset(spec, split)
    dataset.samples = dataset.samples[:8]
    return dataset


def test_smaller_images_are_less_work(monkeypatch):
    monkeypatch.setattr(worker, "floor_rate", lambda *arguments: 1e9)
    own, smaller = (worker.work(job("check", image_size=size, steps=1)).floor.operations for size in (None, 64))
    assert own > 2 * smaller, "four times as many patches"
    with pytest.raises(FastLNError, match="image size 100: it must be a multiple of 16"):
        worker.work(job("check", image_size=100))


def test_the_floor_of_8_bits_counts_frozen_layers_at_their_own_rate(monkeypatch):
    monkeypatch.setattr(worker, "floor_rate", lambda *arguments: 1e9)
    monkeypatch.setattr(worker, "int8_product_rate", lambda *arguments: 4e9)
    floor = worker.work(job("check", steps=1, products=("exact", "int8"))).floor
    share = floor.linear_operations / floor.operations
    assert 0.5 < share < 1
    assert floor.seconds("int8") == pytest.approx(floor.seconds("exact") * (1 - 0.75 * share))


def test_a_batch_larger_than_the_data_is_a_user_error():
    with pytest.raises(FastLNError, match="batch_size 100000"):
        worker.work(job("check", batch_size=100_000))


def test_an_image_that_cannot_be_read_is_found_before_the_rounds(monkeypatch):
    # The last of those that the rounds will read.
    data = load_dataset("phantom", "train")
    last = list(itertools.islice(GroupedBatches(data, 4, seed=0, questions_per_image=4, drop_last=True), 3))[-1]
    bad = {data[index].image for index in last}
    read = VQADataset.image

    def image(self, key):
        if key in bad:
            raise FastLNError(f"{key}: cannot be decoded")
        return read(self, key)

    monkeypatch.setattr(VQADataset, "image", image)
    sizes = {"batch_size": 4, "questions_per_image": 4, "warmup_steps": 1}
    worker.work(job("check", **sizes, steps=1))
    with pytest.raises(FastLNError, match="cannot be decoded"):
        worker.work(job("check", **sizes, steps=2))
