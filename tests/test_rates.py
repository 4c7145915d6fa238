"""The rate of matrix products, and what dtype auto makes of it."""

import json
import logging

import pytest
import torch
from launch import TWO, script

from fastln import doctor, rates
from fastln.errors import FastLNError
from fastln.rates import matrix_rate, settle_dtype

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with these rates, in GFLOP/s; None for no bfloat16 units."""

    def pretend(float32, bfloat16):
        speed = {torch.float32: float32, torch.bfloat16: bfloat16}
        monkeypatch.setattr(rates, "has_bfloat16_units", lambda device: bfloat16 is not None)
        monkeypatch.setattr(doctor, "has_bfloat16_units", lambda device: bfloat16 is not None)
        monkeypatch.setattr(rates, "matrix_rate", lambda device, dtype, **options: speed[dtype] * 1e9)
        rates.product_rates.cache_clear()

    yield pretend
    rates.product_rates.cache_clear()


def test_a_measured_rate_is_one():
    assert 1e8 < matrix_rate(CPU, torch.float32, repeats=1) < 1e16


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [(179, 92, torch.float32), (115, 219, torch.bfloat16), (50, None, torch.float32)],
    ids=["units that are slower", "units that are faster", "no units"],
)
def test_auto_is_the_dtype_that_multiplies_faster(float32, bfloat16, expected, machine, caplog):
    machine(float32, bfloat16)
    with caplog.at_level(logging.INFO):
        assert settle_dtype("auto", CPU) == expected
    told = [record.message for record in caplog.records]
    if bfloat16 is None:
        assert told == []  # nothing to measure: `fastln doctor` says so
    else:
        slower, faster = sorted([(float32, "float32"), (bfloat16, "bfloat16")])
        assert told == [
            f"dtype auto: {faster[1]}, measured at {faster[0]} GFLOP/s here; {slower[1]} reaches {slower[0]} "
            f"(dtype={slower[1]} would take it)"
        ]


def test_a_name_is_taken_as_it_is(machine):
    machine(1, 2)
    assert settle_dtype("float32", CPU) == torch.float32
    assert settle_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(FastLNError, match="unknown dtype 'half' \\(valid: auto, float32, bfloat16\\)"):
        settle_dtype("half", CPU)


@pytest.mark.parametrize(
    ("float32", "bfloat16", "line"),
    [
        (179, 92, "in hardware; GFLOP/s measured: float32 179, bfloat16 92, so dtype auto means float32 here"),
        (50, None, "emulated: dtype auto means float32 here"),
    ],
)
def test_the_doctor_says_what_auto_means(float32, bfloat16, line, machine):
    machine(float32, bfloat16)
    assert line in doctor.render(doctor.examine())


@pytest.mark.slow(pool="processes", take=2)
def test_processes_that_train_together_take_one_dtype(tmp_path):
    """Each would measure another rate: the first process's counts."""
    script("dtype_run.py", tmp_path, python=TWO)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == ["torch.bfloat16"] * 2
