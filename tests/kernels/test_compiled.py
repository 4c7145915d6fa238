"""What the norm kernels compile to, read off the machine code: no GPU needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def compiled(*options: str) -> list[dict]:
    command = [sys.executable, Path(__file__).with_name("compiled.py"), "--json", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check(rows: list[dict]) -> None:
    for row in rows:
        assert row["spills"] == 0, row
        assert row["loads_128"] > 0, row
        assert not row["specialises_on_rows"], row
        assert row.get("truncations", 0) == 0, row
        if row["kernel"] in ("forward_kernel", "backward_kernel") and "shared" in row:
            assert row["stores_128"] > 0, row


def test_kernels_at_width_768():
    rows = compiled("--targets", "sm_80", "sm_90", "gfx942", "--width", "768", "--dtype", "bf16")
    check(rows)
    assert {row["kernel"] for row in rows} == {
        "forward_kernel",
        "backward_kernel",
        "backward_parameters_kernel",
        "finish_kernel",
    }
    backwards = {row["for"] for row in rows if row["kernel"].startswith("backward") and row["target"] == "sm_90"}
    assert backwards == {"dx dγ dβ", "dx dγ", "dx dβ", "dx", "dγ dβ", "dγ", "dβ"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [384, 1024, 1152, 1280, 2048, 4096, 8192, 16384, 65536])
def test_kernels_at_every_width_do_not_spill(width, dtype):
    check(compiled("--targets", "sm_80", "sm_90", "--width", str(width), "--dtype", dtype))
