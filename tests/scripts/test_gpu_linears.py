"""The linear layers of the GPU report, without a GPU: kernels interpreted, a clock that is made up."""

import pytest
import torch
from gpu_linears import BF16, MAKERS, linear_table, measure_linear
from gpu_timing import Bench


def record_plainly(works, n_cycles):
    assert {name for work in works for name in work.run()} <= {"y", "dx"}
    return lambda: None


def clock(replay):
    replay()
    return 1.0


def bench(rounds=2):
    return Bench("a GPU", torch.device("cpu"), 1 << 10, rounds, record_plainly, clock)


@pytest.mark.parametrize("turned", [False, True])
def test_both_products_are_checked_and_timed_beside_torchs(turned):
    rows = list(measure_linear((20, 64, 32), "fp16", turned, bench()))
    assert [row.library for row in rows] == [*MAKERS["y"], *MAKERS["dx"]]
    for row in rows:
        assert row.error is None or row.library == "torch int8", row.error  # which this torch may refuse
        if row.error is None:
            assert row.measured["seconds"] == [1 / 20] * 2
            assert row.measured["over_torch"] == 1.0
            assert row.measured["operations_per_second"] == pytest.approx(2 * 20 * 64 * 32 * 20)
    table = linear_table(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert f"| linear-y{'-turned' * turned} (64 to 32) | fp16 | 20 | fastln | 50000.0 (50000.0–50000.0) |" in table[3]


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setitem(MAKERS["y"], "fastln", lambda layer: lambda: 2 * MAKERS["y"][BF16](layer)())
    monkeypatch.setitem(MAKERS["y"], "torch int8", lambda layer: 1 / 0)
    rows = {row.library: row for row in list(measure_linear((3, 16, 16), "fp32", False, bench()))[: len(MAKERS["y"])]}
    assert rows["fastln"].error == "relative error of y: 1"
    assert rows["torch int8"].error == "ZeroDivisionError; division by zero"
    assert "median" not in rows["fastln"].measured
    assert "| – | – | – | not timed: relative error of y: 1 |" in linear_table(list(rows.values()))
