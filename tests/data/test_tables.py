"""Files of rows as spreadsheets, pandas and editors leave them: the same rows are read, or one line says why not."""

import json
import logging

import pytest
from layouts import LAYOUTS, jpeg, save

from fastln.data import Sample, load_source
from fastln.errors import FastLNError

GOOD = [
    Sample("0", "a.jpg", "Is it, normal?", "no", None),
    Sample("1", "a.jpg", "How many?", "2", None),
]
HEADER, FIRST, SECOND = "image,question,answer", 'a.jpg,"Is it, normal?",no', "a.jpg,How many?,2"
LINES = [HEADER, FIRST, SECOND]


def read(folder, name, content):
    save(folder / "images" / "a.jpg", jpeg(0))
    save(folder / name, content if isinstance(content, bytes) else content.encode())
    return load_source(str(folder)).splits["train"]


def refusal(*arguments):
    with pytest.raises(FastLNError) as caught:
        read(*arguments)
    return str(caught.value)


def with_marks(mark):
    """The rows with another mark between columns."""
    return "\n".join([HEADER.replace(",", mark), f'a.jpg{mark}"Is it, normal?"{mark}no', SECOND.replace(",", mark)])


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES),
        "\n".join([*LINES, "", "", ""]),
        "\r\n".join(["", "  ", *LINES, "", "\t"]),
        "\r".join(LINES),  # old Excel for Mac
        "\ufeff" + "\r\n".join(LINES),
        "\ufeff\ufeff" + "\n".join(LINES),
        "\n".join(f"{line},,," for line in LINES),  # empty columns
        "\n".join([*(f"{line},," for line in LINES), ",,,,", ",,,,"]),  # and rows
        "\n".join([f"{HEADER},,", f"{FIRST},,", SECOND]),  # Excel writes empty fields for the first rows alone
        "\n".join([f"{HEADER},answer_type", f"{FIRST},", SECOND]),
        "\n".join([f",{HEADER}", f"0,{FIRST}", f"1,{SECOND}"]),  # pandas' index
        "\n".join([f"Unnamed: 0,{HEADER}", f"0,{FIRST}", f"1,{SECOND}"]),
        "\n".join([' image , "question",  answer ', FIRST, SECOND]),
        with_marks(";"),
        with_marks("\t"),
        "sep=;\r\n" + with_marks(";"),
        "sep=|\n" + with_marks("|"),
    ],
)
def test_csv_as_spreadsheets_leave_it(content, tmp_path):
    assert read(tmp_path, "train.csv", content) == GOOD


def test_empty_rows_keep_the_index_of_the_others_and_are_told(tmp_path, caplog):
    content = "\n".join([HEADER, "", FIRST, ",,", "a.jpg,,", "", ""])
    assert "1 bad row(s) of 2, counted from 0:\n" in refusal(tmp_path, "train.csv", content)
    assert f"{tmp_path / 'train.csv'}: row 3: field 'question' is empty" in refusal(tmp_path, "train.csv", content)
    with caplog.at_level(logging.INFO, "fastln"):
        read(tmp_path, "train.csv", content.replace("a.jpg,,", SECOND))
    assert caplog.text.count(f"{tmp_path / 'train.csv'}: left out 2 empty row(s)") == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER, "a.jpg,Is it, normal?,no"], "row 0: 4 fields where the first line names 3"),
        ([f"{HEADER},,", "a.jpg,Is it?,yes, or no,"], "row 0: 4 fields where the first line names 3"),
        ([HEADER, "a.jpg,Is it?"], "row 0: 2 fields where the first line names 3"),
        ([f"{HEADER},,answer", FIRST], "the first line names a column twice: answer"),
        ([HEADER, "a.jpg,Is\0it?,no"], "row 0: field 'question' holds a zero byte"),
        ([",,", ""], "the file is empty; its first line must name the columns"),
        (["", "", HEADER, 'a.jpg,"b"c,d'], "line 4: not valid CSV: "),
    ],
)
def test_what_csv_cannot_mean_is_told(lines, message, tmp_path):
    assert f"{tmp_path / 'train.csv'}: {message}" in refusal(tmp_path, "train.csv", "\n".join(lines))


def test_utf_16_is_no_utf_8(tmp_path):
    for codec in ("utf-16", "utf-16-le"):
        assert "no UTF-8 text" in refusal(tmp_path, "train.csv", "\n".join(LINES).encode(codec)).replace("not", "no")


ROWS = [
    {"image": "a.jpg", "question": "Is it, normal?", "answer": "no"},
    {"image": "a.jpg", "question": "How many?", "answer": 2.0},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n  \r\n"),
        ("train.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, ROWS))),
        ("train.json", "\ufeff" + json.dumps(ROWS, indent=1) + "\r\n\r\n"),
        ("train.json", json.dumps([*ROWS, dict.fromkeys(ROWS[0]), dict.fromkeys(ROWS[0], float("nan"))])),
    ],
)
def test_json_as_editors_and_pandas_leave_it(name, content, tmp_path):
    assert read(tmp_path, name, content) == GOOD


def test_numbers_of_a_column_with_gaps_are_whole_again(tmp_path):
    pandas = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = {"bytes": jpeg(0), "path": None}
    rows = [{"image": image, "question": "How many?", "answer": number, "id": 7.0} for number in (1.0, 2.5)]
    rows.append({"image": None, "question": None, "answer": None, "id": None})
    parquet.write_table(pandas.Table.from_pylist(rows), tmp_path / "train.parquet")
    samples = load_source(str(tmp_path)).splits["train"]
    assert [(sample.id, sample.answer) for sample in samples] == [("7", "1"), ("7", "2.5")]


@pytest.mark.parametrize(
    ("image", "written"),
    [
        ("Röntgen é.jpg", '"Röntgen é.jpg"'),
        ("scans\\gone.jpg", '"scans\\gone.jpg"'),
        ("头部.jpg", '"头部.jpg"'),
        ("tab\t.jpg", '"tab\\t.jpg"'),
        ("p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34.jpg", "112c0b34.jpg"),
    ],
)
def test_names_in_messages_are_as_they_are_written(image, written, tmp_path):
    layout = LAYOUTS["plain, jsonl"]
    with pytest.raises(FastLNError) as caught:
        load_source(layout.make(tmp_path, train=[layout.row(0) | {"image": image}]))
    assert written in str(caught.value)
