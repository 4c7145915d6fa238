"""What the norm kernels compile to, read off the machine code: no GPU needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def compile_report(*options: str) -> subprocess.CompletedProcess:
    # Kernels are either interpreted or compiled, settled at their import: so it is a process of its own.
    command = [sys.executable, SCRIPTS / "compile_report.py", "--no-liger", "--jobs", "1", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_kernels_at_width_768_are_no_worse_than_what_is_committed():
    """The whole, all widths and dtypes, is `make compile-report`."""
    result = compile_report("--machines", "sm_90", "gfx942", "--widths", "768", "--dtypes", "bf16", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| fastln |") == 16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", ["384", "1024", "1152", "1280", "2048", "4096", "8192", "16384", "65536"])
def test_kernels_at_every_width_are_no_worse_than_what_is_committed(width, dtype):
    result = compile_report("--machines", "sm_80", "sm_90", "--widths", width, "--dtypes", dtype, "--dry-run")
    assert result.returncode == 0, result.stderr


READ_THE_REPORT = """
import json, sys
import compile_report, machine_code
print(json.dumps({name: eval(expression) for name, expression in json.loads(sys.argv[1]).items()}))
"""


def evaluated(**expressions: str) -> dict:
    """Evaluate expressions in a process in which kernels are compiled."""
    command = [sys.executable, "-c", READ_THE_REPORT, json.dumps(expressions)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=SCRIPTS)
    return json.loads(result.stdout)


def test_reading_machine_code():
    loop = [
        ".L_x_1:",
        "LDG.E.128 R4, [R2];",
        "LDG.E R8, [R2];",
        "FADD R9, R7, R1;",
        "LDG.E R10, [R2];",
        "@P0 BRA `(.L_x_1);",
    ]
    code = ["S2R R0, SR_TID.X;", *loop, "EXIT;", ".L_x_2:", "BRA `(.L_x_2);"]
    found = evaluated(
        loop=f"machine_code.longest_loop({code!r})",
        asked=f"machine_code.bytes_before_first_use({loop!r})",
        none="machine_code.bytes_before_first_use(['EXIT;'])",
    )
    assert found == {"loop": loop, "asked": 20, "none": 0}


def test_the_ratchet_complains():
    kernel = {
        "kernel": "forward_kernel",
        "registers": 50,
        "spills": 0,
        "loads_128": 3,
        "stores_128": 3,
        "specialises_on_rows": False,
    }
    row = {"machine": "sm_90", "dtype": "bf16", "width": 768, "case": "layer norm forward", "library": "fastln"}

    def worse(**changes):
        now = row | {key: changes.pop(key) for key in ("width", "library") if key in changes}
        now["kernels"] = [kernel | changes]
        return f"list(compile_report.worse({[now]!r}, {[row | {'kernels': [kernel]}]!r}))"

    found = evaluated(
        same=worse(),
        better=worse(registers=40),
        registers=worse(registers=51),
        spills=worse(spills=2),
        loads=worse(loads_128=2),
        stores=worse(stores_128=2),
        rows=worse(specialises_on_rows=True),
        wide=worse(width=16384, spills=2),
        liger=worse(library="liger", spills=2),
    )
    expected = {
        "registers": "registers 51, 50 before",
        "spills": "2 instructions spill",
        "loads": "loads_128 2, 3 before",
        "stores": "stores_128 2, 3 before",
        "rows": "compiles anew",
    }
    for name, complaints in found.items():
        assert len(complaints) == (name in expected)
        assert all(expected[name] in complaint for complaint in complaints)
