"""The GPU report's command, without a GPU."""

import gpu_report
import pytest
import torch
from norm_cases import CASES, DTYPES, WIDTHS
from report_rows import Row


def row(**changes):
    return Row("H100", "bf16", "bf16", 768, 7, "layer_norm-dx", "peer", "", 100, **changes)


def test_rows_make_64_mib():
    assert gpu_report.rows_for(1024, 2) == 32768
    assert gpu_report.rows_for(65536, 4) == 256
    assert gpu_report.rows_for(1 << 24, 2) == 16
    of = gpu_report.configurations(["rms_norm-forward"], ["bf16", "fp32"], [768], None)
    assert [one.n_rows for one in of] == [43690, 21845]
    assert {one.n_rows for one in gpu_report.configurations(CASES, ["fp16"], [8, 16], 7)} == {7}
    assert len(gpu_report.configurations(CASES, DTYPES, WIDTHS, 1)) == len(CASES) * 3 * 11


def test_table():
    timing = {"median": 20e-6, "low": 19.5e-6, "high": 21e-6, "gb_per_s": 1234.4, "share_of_copy": 0.874}
    timed = row(note="computes dweight and dbias too", measured=timing)
    failed = row(error="relative error of y | 0.3", measured={"errors": {}, "bounds": {}})
    assert gpu_report.table([timed, failed, row(error="broke", note="so")]).splitlines() == [
        "| case | dtype | rows × columns | library | µs, median (quartiles) | GB/s | of copy | note |",
        "|---|---|---|---|---|---|---|---|",
        "| layer_norm-dx | bf16 | 7 × 768 | peer | 20.0 (19.5–21.0) | 1234 | 87% | computes dweight and dbias too |",
        "| layer_norm-dx | bf16 | 7 × 768 | peer | – | – | – | not timed: relative error of y / 0.3 |",
        "| layer_norm-dx | bf16 | 7 × 768 | peer | – | – | – | not timed: broke; so |",
    ]


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results" / "gpu.json"
    assert gpu_report.main(["--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "this machine has no CUDA GPU: nothing was measured\n"
    assert captured.err == ""
    assert not out.parent.exists()


@pytest.mark.parametrize("option", [["--widths", "0"], ["--rounds", "1"], ["--rows", "x"], ["--dtypes", "int8"]])
def test_bad_options_are_refused(option, tmp_path):
    with pytest.raises(SystemExit) as refusal:
        gpu_report.main(["--out", str(tmp_path / "gpu.json"), *option])
    assert refusal.value.code == 2
