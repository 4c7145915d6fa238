"""The report on canned rows: nothing hidden, nothing sorted away, nulls and errors said in words."""

import dataclasses
import io
import json

import pytest
from PIL import Image
from rich.console import Console

from fastln.bench import report
from fastln.bench.results import Row, read_rows, write_rows

ACCURACY = {"all": 70.25, "closed": 78.0, "open": 58.5, "n_all": 451, "n_closed": 272, "n_open": 179}


def row(method, engine, seconds, memory=600, model="dual", **changes):
    provenance = {
        "seed": 0,
        "argv": ["fastln", "bench", "--suite", "quick suite"],
        "suite": {"name": "quick", "data": "phantom", "rounds": 3, "steps": 4, "warmup_steps": 1},
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:03:00+00:00",
        "machine": {
            "cpu": "Some CPU",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 8 * 2**30,
            "gpu": None,
            "kernel": "Linux 6.1 x86_64",
        },
        "versions": {"python": "3.11.1", "torch": "2.13.0"},
        "commit": "abc-dirty",
        "data": {"name": "phantom", "synthetic": True},
        "memory": "process peak RSS",
    }
    middle = sorted(seconds)[len(seconds) // 2] if seconds else None
    values = {
        "method": method,
        "engine": engine,
        "model": model,
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 16,
        "step_seconds": middle,
        "step_seconds_all": tuple(seconds),
        "step_seconds_by_round": tuple(seconds),
        "samples_per_second": 16 / middle if middle else None,
        "peak_memory_bytes": memory * 2**20 if seconds else None,
        "saved_activation_bytes": 3 * 2**19 if seconds else None,
        "trainable_parameters": 12_345 if seconds else None,
        "total_parameters": 1_000_000 if seconds else None,
        "final_loss": 2.5 if seconds else None,
        "accuracy": None,
        "accuracy_note": "random weights: accuracy means nothing",
        "error": None,
        "provenance": provenance,
    }
    return Row(**(values | changes))


ROWS = [
    row("layernorm", "fastln", [0.2, 0.3, 0.25]),
    row("layernorm", "peft", [0.5, 0.5, 0.5], 700),
    row("layernorm", "torch", [0.4, 0.3, 0.75], 690),
    row("full", "torch", [], error="round 1: MemoryError: no | more\n  at file.py:3 in step", accuracy_note="failed"),
    row("head", "torch", [0.1], 500, error="round 2: killed by signal 9 (out of memory?)", accuracy_note="failed"),
    row("layernorm", "torch", [1.0, 1.0, 1.0], model="blip", accuracy=ACCURACY, accuracy_note="test split"),
]


def test_speed_is_the_median_of_the_ratios_within_rounds():
    table = report.tables(ROWS)[0]
    # The ratios are 2, 1 and 3; the ratio of the medians would be 0.4 / 0.25.
    assert table.cells[0][2] == "2.00 (1.00–3.00)"
    assert table.cells[2][2] == "1.00 (1.00–1.00)"


def test_rows_keep_their_order_and_losses_are_shown():
    first, second = report.tables(ROWS)
    assert [line[0] for line in first.cells] == [entry.label for entry in ROWS[:5]]
    assert first.cells[1][2] == "0.80 (0.60–1.50)"  # slower than plain unfreezing, and said so
    assert second.title == "blip"


def test_a_row_without_baseline_has_no_speed():
    assert report.tables([ROWS[0]])[0].cells[0][2] == "–"


def test_failures_are_told_with_the_measurements_made_before():
    table = report.tables(ROWS)[0]
    assert table.cells[3][1:] == ("failed", *["–"] * 7)
    assert table.cells[4][1] == "0.100 (0.100–0.100)"
    assert table.cells[4][2] == "4.00 (4.00–4.00)"
    assert any("full (torch) failed: round 1: MemoryError" in note for note in table.notes)
    assert any("head (torch) failed: round 2: killed by signal 9" in note for note in table.notes)


def test_accuracy_or_the_reason_that_there_is_none():
    first, second = report.tables(ROWS)
    assert second.cells[0][-1] == "70.2 (78.0, 58.5)"
    assert second.notes == ("Accuracy: test split.",)
    assert any("random weights: accuracy means nothing" in note for note in first.notes)


def test_units():
    cells = report.tables(ROWS)[0].cells[0]
    assert cells[3:7] == ("64.0", "600", "1.5", "12,345 (1.23%)")


def test_markdown_tells_what_is_shown_where_and_by_which_command():
    text = report.to_markdown(ROWS)
    for part in (
        "*Measured*",
        "Some CPU",
        "phantom (synthetic)",
        "`fastln bench --suite 'quick suite'`",
        "commit abc-dirty",
    ):
        assert part in text
    grid = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in grid} == {10, 5}  # the methods, and fastln beside peft
    assert "no \\| more" in text


FLOOR = {"floor": {"operations": 1e9, "operations_per_second": 5e9}}
PEERS = [
    row("layernorm", "fastln", [0.4, 0.5, 0.4], dtype="bfloat16", provenance=ROWS[0].provenance | FLOOR),
    row("layernorm", "peft", [0.8, 2.0, 1.6], dtype="bfloat16"),
    row("lora", "peft", [1.6, 1.5, 1.6], dtype="bfloat16"),
    row("layernorm", "fastln", [1.0], model="vit"),
    row("lora", "peft", [], model="vit", error="round 1: MemoryError"),
    row("layernorm", "fastln", [], model="blip", error="round 1: MemoryError"),
]


def test_fastln_beside_peft_has_the_ratios_within_rounds_and_the_share_of_the_floor():
    (table,) = report.peers(PEERS)
    assert table.columns[3:] == ("over layernorm (peft)", "over lora (peft)")
    assert table.cells == (
        ("dual, bfloat16", "0.400", "0.200 (50%)", "4.00 (2.00–4.00)", "4.00 (3.00–4.00)"),
        ("vit, float32", "1.00", "–", "–", "–"),
    )
    assert not report.peers(PEERS[:1])
    assert not report.peers(PEERS[1:3])


def test_other_products_stand_beside_exact_ones():
    int8 = row("layernorm", "fastln", [0.2, 0.25, 0.2], dtype="bfloat16", products="int8")
    (table,) = report.peers([int8, *PEERS[:3]])
    assert [line[0] for line in table.cells] == ["dual, int8", "dual"]
    assert [line[2] for line in table.cells] == ["–", "0.200 (50%)"]  # the floor is that of exact products
    assert table.cells[0][3] == "8.00 (4.00–8.00)"
    assert table.columns[3:] == ("over layernorm (peft)", "over lora (peft)")


def test_without_plain_unfreezing_speed_is_over_peft():
    table = report.tables(PEERS[:3])[0]
    assert table.cells[0][2] == "4.00 (2.00–4.00)"
    assert "as fast as layernorm (peft)" in report.to_markdown(PEERS[:3])
    assert "as fast as layernorm (torch), which is plain unfreezing" in report.to_markdown(ROWS)


def test_several_dtypes_and_batch_sizes_are_all_named():
    text = report.to_markdown([*PEERS, row("full", "torch", [1.0], batch_size=3)])
    assert "device cpu, bfloat16, float32" in text
    assert "batches of 16, 3" in text
    assert "## dual, float32" in text


def test_terminal_shows_the_same_cells():
    stream = io.StringIO()
    report.show(ROWS, Console(file=stream, width=250))
    text = stream.getvalue()
    for table in report.tables(ROWS):
        for line in table.cells:
            assert all(cell in text for cell in line)
        assert all(note in text for note in table.notes)


def test_a_narrow_terminal_cuts_no_figure():
    stream = io.StringIO()
    report.show(ROWS, Console(file=stream, width=80))
    for part in (cell for table in report.tables(ROWS) for line in table.cells for cell in line):
        assert all(piece in stream.getvalue() for piece in part.rstrip(")").split(" ("))


@pytest.mark.parametrize("rows", [ROWS, ROWS[3:4], ROWS[5:]], ids=["two models", "nothing measured", "one point"])
def test_files_are_written(rows, tmp_path):
    report.write(rows, tmp_path)
    assert (tmp_path / "results.md").read_text() == report.to_markdown(rows)
    with Image.open(tmp_path / "results.png") as image:
        assert image.width > image.height


def test_rows_round_trip_through_json(tmp_path):
    path = tmp_path / "results.json"
    write_rows(ROWS, path)
    assert read_rows(path) == ROWS
    assert set(json.loads(path.read_text())[0]) == {field.name for field in dataclasses.fields(Row)}
    assert list(tmp_path.iterdir()) == [path]


MIXED = [
    row("layernorm", "torch", [1.0, 2.0], 1000),
    row("layernorm", "torch", [1.2, 2.4], 500, checkpointing=True),
    row("layernorm", "torch", [0.9, 1.8], 900, compiled=0.5),
    row("layernorm", "fastln", [0.8, 1.6], 800, predicted_peak_bytes=880 * 2**20),
    row("layernorm", "fastln", [0.9, 1.8], 400, activations="again"),
    row("layernorm", "fastln", [1.1, 1.7], 450, activations="recompute"),
    row("layernorm", "fastln", [0.85], 600, memory_budget="0.6x", storage_note="memory budget 600 MiB: chosen"),
    row("layernorm", "fastln", [], activations="checkpoint", error="round 1: MemoryError"),
]


def test_the_front_of_memory_against_time_is_compared_within_rounds():
    (table,) = report.memory(MIXED)
    assert table.columns[2] == "time over layernorm (torch)"
    # The budget finished the fast round alone: its 0.85 s would otherwise pass the 1.2 s of exact storage's two rounds.
    assert [(line[0], line[-1]) for line in table.cells] == [
        ("layernorm (torch)", "no"),
        ("layernorm (torch, checkpointing)", "no"),
        ("layernorm (torch, compiled 0.5)", "no"),
        ("layernorm (fastln)", "yes"),
        ("layernorm (fastln, again)", "yes"),
        ("layernorm (fastln, recompute)", "no"),
        ("layernorm (fastln, budget 0.6x)", "yes"),
    ]
    assert table.cells[3][2:6] == ("0.80 (0.80–0.80)", "800", "880", "+10.0")
    assert [line[1] for line in table.cells][-2:] == ["1.46", "1.27"]
    assert table.notes == (
        "layernorm (fastln, recompute) is not on the front: layernorm (fastln, again) takes 0.92 of its time "
        "(0.82–1.06) and 0.889 of its memory; the rounds do not agree which is faster.",
        "layernorm (fastln, budget 0.6x): memory budget 600 MiB: chosen.",
    )
    assert not report.memory(ROWS)


def test_rows_of_several_storage_modes_have_a_picture_of_their_fronts(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw", lambda *arguments: drawn.append("throughput"))
    report.write(ROWS, tmp_path)
    assert drawn == ["throughput"]
    report.write(
        [*MIXED, row("layernorm", "torch", [], model="blip", error="round 1: no", checkpointing=True)], tmp_path
    )
    assert drawn == ["throughput"]
    with Image.open(tmp_path / "results.png") as image:
        assert image.width > image.height
    assert "## dual: peak memory against time" in (tmp_path / "results.md").read_text()
