"""The worker on the embedded models: every method, measured for real, in a few steps."""

import dataclasses
import math

import pytest
import torch

from fastln.bench import worker
from fastln.bench.results import Job, Quality, Steps, read_rows
from fastln.bench.runner import run_suite
from fastln.bench.suite import load_suite
from fastln.data import load_dataset
from fastln.errors import FastLNError

TINY = {"batch_size": 4, "rounds": 1, "warmup_steps": 0, "steps": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(kind="speed", method="layernorm", engine="torch", model="dual", number=1, **changes):
    suite = dataclasses.replace(load_suite("quick", TINY), dtype="float32", device="cpu")
    return Job(dataclasses.replace(suite, **changes), kind, model, method, engine, number)


def test_the_quick_suite_end_to_end(tmp_path):
    suite = load_suite("quick", TINY)
    rows = run_suite(suite, tmp_path)
    assert [row.error for row in rows] == [None] * 14
    assert read_rows(tmp_path / "results.json") == rows
    for row in rows:
        assert len(row.step_seconds_all) == 2
        assert row.peak_memory_bytes > 50e6
        assert math.isfinite(row.final_loss)
        assert row.accuracy is None
        assert "means nothing" in row.accuracy_note
        assert row.provenance["data"]["synthetic"] is True
    for model in ("dual", "blip"):
        found = {f"{row.method}/{row.engine}": row for row in rows if row.model == model}
        assert len({row.total_parameters for row in found.values()}) == 1
        trained = {name: row.trainable_parameters for name, row in found.items()}
        assert trained["full/torch"] == found["full/torch"].total_parameters
        assert trained["layernorm/torch"] == trained["layernorm/peft"] == trained["layernorm/fastln"]
        assert trained["layernorm/torch"] < 0.1 * trained["full/torch"]
        saved = {name: row.saved_activation_bytes for name, row in found.items()}
        assert 0 < saved["head/torch"] < saved["layernorm/torch"] < saved["full/torch"]


def test_engines_of_one_method_see_the_same_batches_and_the_same_loss():
    losses = [worker.work(job(engine=engine)).final_loss for engine in ("torch", "peft")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_activations_are_counted_in_the_first_round_alone():
    first, second = (worker.work(job(method="head", number=number)) for number in (1, 2))
    assert isinstance(second, Steps)
    assert first.saved_activation_bytes > 0
    assert second.saved_activation_bytes is None


def test_quality_trains_and_asks_the_test_questions(monkeypatch):
    monkeypatch.setattr(worker, "load_dataset", _eight_questions)
    quality = worker.work(job("quality", method="head", epochs=1))
    assert isinstance(quality, Quality)
    assert quality.accuracy["n_all"] == 8
    assert 0 <= quality.accuracy["all"] <= 100


def _eight_questions(spec, split):
    dataset = load_dataset(spec, split)
    dataset.samples = dataset.samples[:8]
    return dataset


def test_a_batch_larger_than_the_data_is_a_user_error():
    with pytest.raises(FastLNError, match="batch_size 100000"):
        worker.work(job(batch_size=100_000))
