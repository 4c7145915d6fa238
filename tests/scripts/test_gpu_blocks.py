"""The MLPs of the GPU report, without a GPU: kernels interpreted, a clock that is made up."""

import torch
from gpu_blocks import MAKERS, measure_mlp
from gpu_linears import linear_table
from gpu_timing import Bench

from fastln_kernels import int8


def test_an_mlp_is_checked_and_timed_with_and_without_rounding_where_rows_are_made(monkeypatch):
    quantise, passes = int8.quantise, []
    monkeypatch.setattr(int8, "quantise", lambda *args, **more: passes.append(0) or quantise(*args, **more))
    counts = []

    def record(works, n_cycles):
        counts.append([])
        for work in works:
            passes.clear()
            assert set(work.run()) == {"y", "dx", "dweight", "dbias"}
            counts[-1].append(len(passes))
        return lambda: None

    bench = Bench("a GPU", torch.device("cpu"), 1 << 10, 2, record, lambda replay: 1.0)
    rows = list(measure_mlp((6, 64, 128), "fp32", bench))
    assert [(row.library, row.error) for row in rows] == [(name, None) for name in MAKERS]
    for row in rows:
        assert row.measured["over_torch"] == 1.0
        assert row.measured["operations_per_second"] > 0
        assert max(row.measured["errors"].values()) < 0.05
    # The first copy was run before, to be checked. Only the last layer's gradient has a pass of its own then.
    assert [of_first for of_first, *_ in counts] == [0, 1, 4]
    assert "| mlp (64 to 128 and back) | fp32 | 6 | fastln, rounded apart |" in linear_table(rows)
