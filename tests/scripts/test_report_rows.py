"""The rows of both reports on disk."""

import json

from report_rows import Row, load, notes, save, source_digest

COMPILED = Row(
    *("sm_90", "bf16", "fp32", 768, 8192, "layer_norm-dx", "fastln", "abc", 7),
    compiled=[{"kernel": "k"}],
    predicted={"share": 0.9},
)
MEASURED = Row("H100", "bf16", "bf16", 768, 9, "layer_norm-dx", "liger", "abc", 7, error="broke", measured={})


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "rows.json"
    save(path, {"commit": "abc"}, [COMPILED, MEASURED])
    assert load(path) == [COMPILED, Row(**vars(MEASURED) | {"measured": None})]
    found = json.loads(path.read_text())
    assert found["provenance"] == {"commit": "abc"}
    assert len(path.read_text().splitlines()) == 4  # a row a line
    assert [path.name for path in path.parent.iterdir()] == ["rows.json"]


def test_what_is_no_such_report_has_no_rows(tmp_path):
    path = tmp_path / "rows.json"
    assert load(path) == []
    path.write_text('{"rows": [{"machine": "sm_90", "kernels": []}]}')
    assert load(path) == []


def test_source_digest_is_that_of_the_code():
    assert source_digest() == source_digest()
    assert len(source_digest()) == 12


def test_notes():
    assert notes("a", "", "b") == "a; b"
    assert notes("", "") == ""
