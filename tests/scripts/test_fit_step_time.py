"""The fit of step times finds the coefficients that made them."""

import pytest
from fit_step_time import Measured, best_rates, fit

from fastln.devices import Device
from fastln.step_time import Call, Costs, Work, step_seconds

DEVICE = Device("some", 10**9, 1e9, {"float32": 1e9, "int8": 4e9}, "a test", kind="cpu")
TRUE = Costs({"linear": 0.8, "attention": 0.8, "int8": 0.4}, 0.25, 5e-5, overlaps=False, source="a test")


def step(linear, int8, moved, n_calls):
    calls = {Call("linear", "float32", linear * 1e9, 0.0): 1, Call("int8", "int8", int8 * 1e9, 0.0): 1}
    return Work(calls | {Call("other", "", 0.0, moved * 1e9 / n_calls): n_calls})


def test_a_fit_finds_what_made_the_times():
    works = [step(1, 0, 1, 100), step(2, 1, 1, 900), step(1, 3, 2, 4000), step(5, 1, 0.1, 20000), step(1, 1, 4, 50)]
    rows = [Measured("a row", "a model", step_seconds(work, DEVICE, TRUE).total, work) for work in works]
    found = fit(rows, DEVICE, "a test")
    assert found.efficiency == pytest.approx(TRUE.efficiency, rel=1e-2)
    assert found.bandwidth == pytest.approx(TRUE.bandwidth, rel=1e-2)
    assert found.seconds_per_call == pytest.approx(TRUE.seconds_per_call, rel=0.05)


def test_rates_are_the_best_that_rows_recorded():
    rows = [
        {"dtype": dtype, "provenance": {"floor": {"operations_per_second": rate, "int8_operations_per_second": int8}}}
        for dtype, rate, int8 in (("float32", 1.0, 5.0), ("float32", 2.0, None), ("bfloat16", 3.0, 4.0))
    ]
    assert best_rates(rows) == {"float32": 2.0, "bfloat16": 3.0, "int8": 5.0}
