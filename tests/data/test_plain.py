"""One's own rows: optional fields, names of files, and lines that cannot be parsed."""

import json

import pytest
from layouts import LAYOUTS, jpeg, save, without

from fastln.data import demands, load_source
from fastln.errors import FastLNError

JSONL, CSV = LAYOUTS["plain, jsonl"], LAYOUTS["plain, csv"]


def refusal(spec):
    with pytest.raises(FastLNError) as caught:
        load_source(str(spec))
    return str(caught.value)


@pytest.mark.parametrize("layout", [JSONL, CSV])
def test_optional_fields(tmp_path, layout):
    rows = [layout.row(0) | {"id": "q7", "answer_type": "CLOSED"}, layout.row(1) | {"id": "q8", "answer_type": ""}]
    train = load_source(layout.make(tmp_path, train=rows)).splits["train"]
    assert [(sample.id, sample.closed) for sample in train] == [("q7", True), ("q8", None)]


def test_numbers_are_texts_however_large(tmp_path):
    row = JSONL.row(0) | {"id": 10**400, "answer": 2.5}
    (sample,) = load_source(JSONL.make(tmp_path, train=[row])).splits["train"]
    assert (sample.id, sample.answer) == (str(10**400), "2.5")


def test_several_images(tmp_path):
    row = JSONL.row(0) | {"image": ["1.jpg", "2.jpg"]}
    assert load_source(JSONL.make(tmp_path, train=[row])).splits["train"][0].images == ("1.jpg", "2.jpg")
    assert "field 'image' is missing" in refusal(JSONL.make(tmp_path / "b", train=[row | {"image": []}]))


@pytest.mark.parametrize("name", ["plain, jsonl", "plain, csv", "llava-med"])
def test_questions_about_no_image(tmp_path, name):
    layout = LAYOUTS[name]
    rows = [without(layout.row(number), "image") for number in range(3)]
    if "csv" in name:
        save(tmp_path / "train.csv", b"question,answer\nIs it normal?,no\n")
    else:
        lines = "\n".join(map(json.dumps, rows)).replace("<image>", "")
        save(tmp_path / "train.jsonl", lines.encode())
    train = load_source(str(tmp_path)).dataset("train").samples
    assert [(sample.image, sample.images) for sample in train] == [("", ())] * len(train)
    assert demands(train) >= {"questions without an image"}
    assert "images" not in demands(train)


@pytest.mark.parametrize("field", ["Image", "image_name", "img_path", "images"])
def test_an_image_under_another_name_is_not_overlooked(tmp_path, field):
    rows = [without(JSONL.row(0), "image") | {field: "0.jpg"}]
    message = refusal(JSONL.make(tmp_path, train=rows, validation=rows, test=rows))
    assert message.startswith(f"{tmp_path}: no row has the field 'image', but there is {field}: rename what names")


def test_some_rows_without_an_image_are_bad_rows(tmp_path):
    rows = [JSONL.row(0), without(JSONL.row(1), "image")]
    assert "train.jsonl: row 1: field 'image' is missing" in refusal(JSONL.make(tmp_path, train=rows))


def test_questions_about_no_image_are_held_out_by_the_question(tmp_path):
    rows = [{"question": f"Q{number % 8}?", "answer": str(number)} for number in range(32)]
    save(tmp_path / "train.jsonl", "\n".join(map(json.dumps, rows)).encode())
    source = load_source(str(tmp_path))
    parts = [source.dataset(split, validation_fraction=0.5).samples for split in ("train", "validation")]
    asked = [{sample.question for sample in part} for part in parts]
    assert asked[0] | asked[1] == {f"Q{number}?" for number in range(8)}
    assert all(asked)
    assert not asked[0] & asked[1]


def test_a_folder_of_any_of_the_splits_and_a_single_file(tmp_path):
    save(tmp_path / "a.jpg", jpeg(0))
    save(tmp_path / "val.csv", b'\xef\xbb\xbfimage,question,answer\r\na.jpg,"Is it,\r\nnormal?",5\r\n')
    source = load_source(str(tmp_path))
    assert list(source.splits) == ["validation"]
    assert (source.splits["validation"][0].question, source.splits["validation"][0].answer) == ("Is it, normal?", "5")
    assert list(load_source(str(tmp_path / "val.csv")).splits) == ["train"]


def test_data_is_called_as_its_folder_is(tmp_path, monkeypatch):
    spec = JSONL.make(tmp_path / "set1.0")
    assert load_source(spec).name == "set1.0"
    monkeypatch.chdir(spec)
    assert load_source(".").name == "set1.0"
    assert load_source("train.jsonl").name == "train"


def test_two_files_of_one_split(tmp_path):
    JSONL.make(tmp_path)
    save(tmp_path / "val.csv", b"")
    assert "which is the validation split, validation.jsonl or val.csv?" in refusal(tmp_path)


def test_lines_that_cannot_be_parsed_are_bad_rows(tmp_path):
    spec = JSONL.make(tmp_path)
    file = tmp_path / "train.jsonl"
    odd = ['{"image" "a"}', '["a"]', "[" + "9" * 5000 + "]", "[" * 200_000, '{"image": ', "{}"]
    file.write_text("\n".join((file.read_text(), *odd)))  # the second line is empty, and counts
    message = refusal(spec)
    assert message.startswith("6 bad row(s)")
    assert f"{file}: row 2: column 10: not valid JSON: Expecting ':' delimiter" in message
    assert f'{file}: row 3: an object with named fields is needed, this is ["a"]' in message
    assert f"{file}: row 4: not valid JSON: " in message
    assert f"{file}: row 5: not valid JSON: " in message
    assert f"{file}: row 6: column 11: not valid JSON: Expecting value" in message


def test_csv_lines_with_too_few_or_many_fields_are_bad_rows(tmp_path):
    spec = CSV.make(tmp_path)
    file = tmp_path / "test.csv"
    file.write_text(file.read_text() + "a,b\na,b,c,d\n")
    message = refusal(spec)
    assert f"{file}: row 1: 2 fields where the first line names 3" in message
    assert f"{file}: row 2: 4 fields where the first line names 3" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty; its first line must name the columns"),
        (b"image,question,image\n", "the first line names a column twice: image"),
        (b'image,question,answer\na,"b"c,d\n', "line 2: not valid CSV: "),
        (b'image,question,answer\na,"b\n', "line 2: not valid CSV: unexpected end of data"),
        (b"image,question,answer\na,\xff,d\n", "byte 24: not UTF-8 text"),
    ],
)
def test_files_that_are_no_csv(tmp_path, content, reason):
    spec = CSV.make(tmp_path)
    (tmp_path / "train.csv").write_bytes(content)
    assert f"{tmp_path / 'train.csv'}: {reason}" in refusal(spec)


def test_a_missing_column_is_told_once(tmp_path):
    spec = CSV.make(tmp_path)
    (tmp_path / "train.csv").write_text("image|question|answer\n0.jpg|Q|A\n1.jpg|Q|A\n")
    found = "it has image|question|answer; commas, semicolons or tabs must stand between columns"
    assert refusal(spec) == f"{tmp_path / 'train.csv'}: no column question, answer; {found}"
    (tmp_path / "train.csv").write_text("Image,Question,Answer\n0.jpg,Q,A\n")
    assert refusal(spec).endswith("it has Image, Question, Answer; names of columns are in small letters")
    (tmp_path / "train.csv").write_text("question,answer\nQ,A\n")
    assert "train.csv: row 0: field 'image' is missing" in refusal(spec)  # the other splits have images


def test_blanks_after_the_commas_of_csv(tmp_path):
    save(tmp_path / "a.jpg", jpeg(0))
    save(tmp_path / "train.csv", b'image, question, answer\na.jpg, "Is it, normal?", no\n')
    (sample,) = load_source(str(tmp_path)).splits["train"]
    assert (sample.image, sample.question, sample.answer) == ("a.jpg", "Is it, normal?", "no")


def test_a_list_in_a_file_called_jsonl(tmp_path):
    spec = JSONL.make(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps([JSONL.row(0), JSONL.row(1)], indent=2))
    assert len(load_source(spec).splits["train"]) == 2


def test_images_are_found_beside_the_files_too_where_there_is_a_folder_of_images(tmp_path):
    spec = JSONL.make(tmp_path, train=[JSONL.row(0) | {"image": "images/1.jpg"}, JSONL.row(1)])
    data = load_source(spec).dataset("train")
    assert data.image("images/1.jpg") == data.image("1.jpg")
    message = refusal(JSONL.make(tmp_path / "b", train=[JSONL.row(0) | {"image": "x.jpg"}]))
    assert f'image "x.jpg" is missing in {tmp_path / "b" / "images"} or {tmp_path / "b"}' in message


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_files_that_are_no_text_or_only_point_to_it(tmp_path, name):
    JSONL.make(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refusal(tmp_path).startswith(f"{tmp_path / name}: this is a pointer of Git LFS, not the file itself")
    (tmp_path / name).write_bytes('[{"question": "é"}]'.encode("utf-16"))
    assert refusal(tmp_path) == f"{tmp_path / name}: byte 0: not UTF-8 text; save it as UTF-8"
    (tmp_path / name).write_bytes(b'question,answer\n"' + b"x" * 200_000 + "é".encode("latin-1"))
    assert refusal(tmp_path) == f"{tmp_path / name}: byte 200017: not UTF-8 text; save it as UTF-8"


@pytest.mark.parametrize("label", ["CLOSED", "closed", "yes/no", "OPEN", "other", "number"])
def test_labels(tmp_path, label):
    (sample,) = load_source(JSONL.make(tmp_path, train=[JSONL.row(0) | {"answer_type": label}])).splits["train"]
    assert sample.closed is (label.upper() in ("CLOSED", "YES/NO"))
