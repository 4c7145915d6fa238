"""What the norm kernels compile to, read off the machine code: no GPU needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# A forward, both ways to the sums, rows alone, and the most that one kernel does.
SAMPLE = (
    "layer_norm-forward",
    "layer_norm-dx",
    "layer_norm-dweight-dbias",
    "layer_norm-dx-dweight-dbias",
    "rms_norm-dx-dweight",
    "dropout_add_layer_norm-forward",
    "dropout_add_layer_norm-backward",
    "int8-layer_norm-forward-turned",
    "codes-layer_norm-forward",
    "codes-layer_norm-dx-dweight-dbias",
)


# Kernels are either interpreted or compiled, settled at their import: so compiling is done in processes of their own.
def compile_report(*options) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / "compile_report.py", "--no-liger", "--jobs", "1", *options]
    return subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)


PROGRAM = """
import contextlib, io, json, pathlib, sys
import compile_report as report, machine_code, norm_cases, norm_peers
from fastln_kernels import int8
from machines import MACHINES
from norm_cases import CASES

fastln, liger = norm_peers.load_fastln()[0], norm_peers.load_liger()[0]

def of(name, implementation=fastln, width=768):
    return report.launches(implementation, CASES[name], MACHINES["sm_90"], width, "bf16")

def key(name):
    return machine_code.specialise(of(name)[0]).key

def run(*options):
    with contextlib.redirect_stderr(io.StringIO()) as words:
        status = report.main(["--jobs", "1", "--no-liger", *options])
    return status, words.getvalue()

print(json.dumps({name: eval(expression) for name, expression in json.loads(sys.argv[1]).items()}))
"""


def evaluated(**expressions: str) -> dict:
    """Evaluate expressions, one after the other, in a process in which kernels are compiled."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(expressions)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=SCRIPTS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_kernels_at_width_768_are_no_worse_than_what_is_committed():
    """The whole, all cases, GPUs, dtypes and widths, is `make compile-report`."""
    where = ("--machines", "sm_90", "gfx942", "--widths", "768", "--dtypes", "bf16", "--cases", *SAMPLE)
    result = compile_report(*where, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n| 768 |") == 2 * len(SAMPLE)


@pytest.mark.slow(take=0)  # minutes; the width above always runs
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [384, 1024, 1152, 1280, 2048, 4096, 8192, 16384, 65536])
def test_kernels_at_every_width_are_no_worse_than_what_is_committed(width, dtype):
    result = compile_report("--machines", "sm_80", "sm_90", "--widths", width, "--dtypes", dtype, "--dry-run")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow(pool="large")
def test_rows_are_written_as_they_are_had_and_not_had_again(tmp_path):
    out = str(tmp_path / "compile.json")
    options = ("--machines", "sm_90", "--dtypes", "bf16", "--out", out, "--cases", "layer_norm-dbias", "--widths")

    def run(*more):
        return f"run(*{(*options, *more)!r})"

    file = f"pathlib.Path({out!r})"
    written = f"json.loads({file}.read_text())"
    fewer = f"""{file}.write_text({file}.read_text().replace('"registers":', '"registers":0.'))"""
    found = evaluated(
        refused=run("768"),
        nothing=f"{file}.exists()",
        accepted=run("768", "--accept"),
        one=written,
        resumed=run("384", "768", "--accept", "--resume"),
        two=written,
        same=run("768"),
        fewer=fewer,
        before=written,
        worse=run("768"),
        after=written,
    )
    status, words = found["refused"]
    assert status == 1
    assert "backward_kernel: no earlier figures to compare with" in words
    assert not found["nothing"]
    assert found["accepted"][0] == 0
    assert [row["width"] for row in found["one"]["rows"]] == [768]
    assert found["resumed"][0] == 0
    assert "1/1 compiled sm_90 bf16 384" in found["resumed"][1]
    assert [row["width"] for row in found["two"]["rows"]] == [384, 768]
    assert found["two"]["provenance"]["versions"]["triton"]
    row = found["two"]["rows"][1]
    assert row["compiled"][0]["registers"] > 0
    assert 0 < row["predicted"]["share"] <= 1
    assert "| 768 | layer_norm-dbias | " in Path(out).with_suffix(".md").read_text()
    assert found["same"][0] == 0
    status, words = found["worse"]
    assert status == 1
    assert f"{row['compiled'][0]['registers']} registers, 0." in words
    assert found["after"] == found["before"]


@pytest.fixture(scope="module")
def launched() -> dict:
    return evaluated(
        forward="[one.name for one in of('layer_norm-forward')]",
        backward="[one.name for one in of('layer_norm-dx-dweight-dbias')]",
        rows="[one.name for one in of('layer_norm-dx')]",
        same="key('layer_norm-dx-dweight') == key('layer_norm_no_bias-dx-dweight')",
        other="key('layer_norm-dx') == key('rms_norm-dx')",
        liger="[(one.name, one.programs, one.given['rows_per_program']) for one in of('layer_norm-dbias', liger)[:1]]",
        liger_last="[one.name for one in of('layer_norm-dbias', liger)[1:]]",
        liger_sums="[(one.given['COMPUTE_DW'], one.given['COMPUTE_DB']) for one in of('layer_norm-dbias', liger)[:1]]",
        liger_rms="[(one.name, one.programs) for one in of('rms_norm-dx', liger)]",
        sum_work="report.work_of(of('dropout_add_layer_norm-forward')[0], 768)",
        dbias_work="report.work_of(of('layer_norm-dbias')[0], 768)",
        wide_work="report.work_of(of('layer_norm-forward', width=65536)[0], 65536)",
        wide_sum_work="report.work_of(of('add_layer_norm-forward', width=65536)[0], 65536)",
        liger_work="[report.work_of(one, 768) for one in of('layer_norm-dweight', liger)]",
        read_twice_wrong="[(kernel, name) for kernel, names in report.READ_TWICE.items() for name in names"
        " if name not in vars(norm_peers.norm).get(kernel, vars(int8).get(kernel)).arg_names]",
    )


def test_launches_are_those_of_training(launched):
    """One kernel makes all gradients from the same loads, and one the last sums, Liger's too, which run on every SM."""
    assert launched["forward"] == ["forward_kernel"]
    assert launched["backward"] == ["backward_kernel", "finish_kernel"]
    assert launched["rows"] == ["backward_kernel"]
    assert (launched["same"], launched["other"]) == (True, False)  # what is one kernel is compiled once
    assert launched["liger"] == [["_layer_norm_backward_kernel", 132, 63]]
    assert launched["liger_sums"] == [[False, True]]
    assert launched["liger_last"] == ["finish_kernel"]
    assert launched["liger_rms"] == [["_rms_norm_backward_kernel", 132]]


def test_what_a_launch_moves(launched):
    tensor, wide = 8192 * 768 * 2, 8192 * 65536 * 2
    assert (launched["sum_work"]["moved"], launched["sum_work"]["read_twice"]) == (4 * tensor, 0)
    partials = launched["dbias_work"]["moved"] - tensor
    assert partials > 0
    assert partials % (768 * 4) == 0
    assert (launched["wide_work"]["moved"], launched["wide_work"]["read_twice"]) == (2 * wide, wide)
    assert launched["wide_work"]["turns"] == launched["wide_work"]["row_tiles"] == 8192
    # Of what goes into the sum nothing is read again, but the sum.
    assert (launched["wide_sum_work"]["moved"], launched["wide_sum_work"]["read_twice"]) == (4 * wide, wide)
    # dx though nobody wants it; 132 rows of partial sums, written, and read for the last sum.
    assert [work["moved"] for work in launched["liger_work"]] == [3 * tensor + 132 * 768 * 4, 132 * 768 * 4]
    assert launched["read_twice_wrong"] == []
