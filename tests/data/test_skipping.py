"""How many bad rows are skipped, how many are shown, and the row that SLAKE is published with."""

import logging

import pytest
from layouts import LAYOUTS

from fastln.data import DataOptions, load_source
from fastln.errors import FastLNError

PLAIN, SLAKE = LAYOUTS["plain, jsonl"], LAYOUTS["slake"]


def data(folder, n_bad, n_good):
    bad = [PLAIN.answer(PLAIN.row(0), "")] * n_bad
    return PLAIN.make(folder, train=[*bad, *([PLAIN.row(1)] * (n_good - 2))])  # and a row in each other split


@pytest.mark.parametrize(
    ("limit", "same"),
    [
        ("all", True),
        ("true", True),
        ("none", False),
        (True, True),
        (False, False),
        ("20", 20),
        (0, 0),
        ("1.5%", "1.5%"),
    ],
)
def test_a_limit_in_every_form(limit, same):
    assert DataOptions(skip_bad_rows=limit).skip_bad_rows == same
    assert type(DataOptions(skip_bad_rows=limit).skip_bad_rows) is type(same)


@pytest.mark.parametrize("limit", ["", "some", "-1", -1, "1 %", "101%", "2.5", 2.5, None])
def test_a_limit_in_no_form(limit):
    with pytest.raises(FastLNError, match="skip_bad_rows must be all, a number of rows such as 20, or a share such as"):
        DataOptions(skip_bad_rows=limit)


@pytest.mark.parametrize(
    ("limit", "n_bad", "skipped"),
    [
        ("all", 50, True),
        (2, 2, True),
        (2, 3, False),
        (0, 1, False),
        ("3%", 3, True),
        ("3%", 4, False),
        ("0%", 1, False),
    ],
)
def test_more_than_the_limit_is_refused(limit, n_bad, skipped, tmp_path, caplog):
    spec, options = data(tmp_path, n_bad, 100 - n_bad), DataOptions(skip_bad_rows=limit)
    if skipped:
        assert len(load_source(spec, options).splits["train"]) == 98 - n_bad
        assert f"That was {n_bad} bad row(s) of 100, skipped." in caplog.text
        return
    with pytest.raises(FastLNError) as caught:
        load_source(spec, options)
    told = "; --skip-bad-rows (DataOptions.skip_bad_rows) leaves them out."
    if limit:
        told = f", more than the {limit} that may be skipped; --skip-bad-rows without a limit leaves them out."
    assert str(caught.value).splitlines()[-1] == f"That was {n_bad} bad row(s) of 100{told}"


def test_twenty_bad_rows_are_shown_and_the_others_counted(tmp_path, caplog):
    spec = data(tmp_path, 60, 3)
    with pytest.raises(FastLNError) as caught:
        load_source(spec)
    lines = str(caught.value).splitlines()
    assert len(lines) == 23
    assert "row 19: " in lines[20]
    assert lines[21] == "  ... and 40 more"
    load_source(spec, DataOptions(skip_bad_rows=True))
    assert "row 19: " in caplog.text
    assert "row 20: " not in caplog.text
    with pytest.raises(FastLNError) as caught:
        load_source(data(tmp_path / "twenty", 20, 3))
    assert "more" not in str(caught.value)


def test_slakes_one_empty_answer_is_left_out_as_published_and_a_second_is_a_bad_row(tmp_path, caplog):
    empty = SLAKE.answer(SLAKE.row(1), "")
    with caplog.at_level(logging.INFO, "fastln"):
        source = load_source(SLAKE.make(tmp_path / "one", train=[SLAKE.row(0), empty, SLAKE.row(2)]))
    assert [sample.image for sample in source.splits["train"]] == ["xmlab0/source.jpg", "xmlab2/source.jpg"]
    assert "slake: left out row 1 of the training questions: its answer is empty, as published" in caplog.text
    for split in ({"train": [empty, empty]}, {"test": [empty]}):
        with pytest.raises(FastLNError, match=r"1 bad row\(s\) of "):
            load_source(SLAKE.make(tmp_path / "two", **split))
