"""The VQA-RAD reader: both layouts on little folders and on the real data, and every error that bad data gets."""

import json
import logging
import os

import pytest
from PIL import Image

from fastln.data import Sample, load_dataset
from fastln.errors import FastLNError

PUBLIC = "VQA_RAD Dataset Public.json"


def row(qid=1, **changes):
    fields = {
        "qid": qid,
        "image_name": "a.png",
        "question": "Is there a mass?",
        "answer": "Yes",
        "answer_type": "CLOSED",
        "phrase_type": "freeform",
        "question_frame": "NULL",
    }
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def make_folder(folder, images="images", **files):
    (folder / images).mkdir()
    for value, name in enumerate(("a.png", "b.png")):
        Image.new("L", (4, 4), 7 * value).save(folder / images / name)
    for name, rows in files.items():
        file = folder / {"train": "trainset.json", "test": "testset.json", "public": PUBLIC}[name]
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return str(folder)


def split_folder(folder, train, test=None):
    return make_folder(folder, train=train, test=[row(90, image_name="b.png")] if test is None else test)


def test_rows_become_samples(tmp_path):
    train = [
        row(1, question=" How  many\tribs? ", answer=12, answer_type="OPEN"),
        row("x7", answer=" yes", answer_type="CLOSED "),
    ]
    data = load_dataset(split_folder(tmp_path, train), "train")
    assert data.samples == [
        Sample("1", "a.png", "How many ribs?", "12", False),
        Sample("x7", "a.png", "Is there a mass?", "yes", True),
    ]
    assert (data.split, data.synthetic, data.name) == ("train", False, "vqa-rad")
    assert (len(data), data[1].id) == (2, "x7")
    assert data.image("a.png").mode == "RGB"


def test_what_the_test_split_repeats_leaves_training_and_is_logged(tmp_path, caplog):
    test = [row(9, answer="Yes.")]
    train = [
        row(1, question="is there a  MASS?", answer="yes "),
        row(2, answer="no"),
        row(3, image_name="b.png"),
        row(4, question="Is there an abscess?"),
    ]
    with caplog.at_level(logging.INFO, "fastln"):
        data = load_dataset(split_folder(tmp_path, train, test), "train")
    assert [sample.id for sample in data.samples] == ["2", "3", "4"]
    assert "dropped 1 training questions that the test split repeats" in caplog.text
    assert "vqa-rad: train 3, test 1" in caplog.text


@pytest.mark.parametrize("images", ["images", "VQA_RAD Image Folder"])
def test_public_file_numbers_questions_and_frames_through(tmp_path, images):
    public = [
        row("0", phrase_type="test_para", question="Q0", question_frame="F0"),
        row(1, question="Q1", question_frame="F1"),
        row(2, phrase_type="para", question="Q2"),
    ]
    spec = make_folder(tmp_path, images, public=public)
    train, test = (load_dataset(spec, split).samples for split in ("train", "test"))
    assert [(sample.id, sample.question) for sample in train] == [("2", "F0"), ("3", "Q1"), ("4", "F1"), ("5", "Q2")]
    assert [(sample.id, sample.question) for sample in test] == [("1", "Q0")]


def test_split_files_come_first_where_both_layouts_lie(tmp_path):
    files = {"train": [row(1)], "test": [row(2, question="Q")], "public": [row(3), row(4, phrase_type="test_para")]}
    assert [sample.id for sample in load_dataset(make_folder(tmp_path, **files), "test").samples] == ["2"]


def test_public_file_serves_where_a_split_file_is_missing(tmp_path):
    files = {"train": [row(1)], "public": [row(3, question="Q"), row(4, phrase_type="test_para")]}
    assert load_dataset(make_folder(tmp_path, **files), "train").samples[0].question == "Q"


def refusal(spec, split="train"):
    with pytest.raises(FastLNError) as caught:
        load_dataset(spec, split)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": ...}, "field 'answer' is missing"),
        ({"question": ...}, "field 'question' is missing"),
        ({"image_name": ...}, "field 'image_name' is missing"),
        ({"answer": None}, "field 'answer' must be a text, not null"),
        ({"answer": True}, "field 'answer' must be a text, not true"),
        ({"answer": ["yes"]}, "field 'answer' must be a text, not [\"yes\"]"),
        ({"answer": float("nan")}, "field 'answer' must be a text, not NaN"),
        ({"answer": "\ud800"}, "field 'answer' holds half of a surrogate pair"),
        ({"answer": " \t"}, "field 'answer' is empty"),
        ({"answer": "?!"}, "field 'answer' is \"?!\", which is empty after normalising"),
        ({"question": ""}, "field 'question' is empty"),
        ({"question": 3}, "field 'question' must be a text, not 3"),
        ({"answer_type": "HALF-OPEN"}, "field 'answer_type' is \"HALF-OPEN\", which is none of CLOSED, OPEN"),
        ({"image_name": "gone.png"}, 'image "gone.png" is missing in'),
        ({"image_name": "."}, 'image "." is missing in'),
        ({"image_name": "x" * 5000}, 'image "xxx'),
        ({"image_name": "a\0.png"}, r"field 'image_name' holds a zero byte: "),
        ({"image_name": "../secret.png"}, 'image "../secret.png" leads outside the folder'),
        ({"image_name": "../images/../secret.png"}, "leads outside the folder"),
        ({"image_name": "/etc/passwd"}, 'image "/etc/passwd" leads outside the folder'),
        ({"image_name": "link.png"}, 'image "link.png" leads outside the folder'),
        ({"image_name": "loop.png"}, 'image "loop.png"'),
        ({"image_name": "folder/secret.png"}, "leads outside the folder"),
    ],
)
@pytest.mark.parametrize("file", ["trainset.json", PUBLIC])
def test_a_bad_row_is_told_with_file_index_and_reason(tmp_path, file, change, reason):
    data = tmp_path / "data"
    data.mkdir()
    for place in (tmp_path, data):
        Image.new("L", (4, 4)).save(place / "secret.png")
    rows = [row(5), row(6, **change)]
    spec = split_folder(data, rows) if file == "trainset.json" else make_folder(data, public=rows)
    (data / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "images" / "loop.png").symlink_to("loop.png")
    (data / "images" / "folder").symlink_to(tmp_path)
    message = refusal(spec, "test")
    assert message.startswith("1 bad row(s) of ")
    assert f"{data / file}: row 1 (qid 6): " in message
    assert reason in message


def test_a_link_inside_the_image_folder_is_followed(tmp_path):
    spec = split_folder(tmp_path, [row(image_name="link.png")])
    (tmp_path / "images" / "link.png").symlink_to("a.png")
    assert load_dataset(spec, "train").image("link.png").size == (4, 4)


def test_public_rows_name_the_valid_phrase_types(tmp_path):
    message = refusal(make_folder(tmp_path, public=[row(phrase_type="frame")]))
    assert "row 0 (qid 1): field 'phrase_type' is \"frame\", which is none of freeform, para, test_freeform" in message


def test_rows_that_are_no_objects(tmp_path):
    message = refusal(split_folder(tmp_path, [row(1), ["a.png", "Q", "A"]], test=["x" * 100]))
    assert f'{tmp_path / "trainset.json"}: row 1: an object with named fields is needed, this is ["a.png", ' in message
    assert f"{tmp_path / 'testset.json'}: row 0: an object" in message
    assert "x" * 50 not in message


def test_all_bad_rows_of_both_files_are_told(tmp_path):
    bad = [row(number, answer="") for number in range(800)]
    message = refusal(split_folder(tmp_path, bad, test=bad))
    assert message.startswith("1,600 bad row(s) of 1,600, counted from 0:")
    assert message.count(": field 'answer' is empty") == 20
    assert "trainset.json: row 19 (qid 19)" in message
    assert "\n  ... and 1,580 more\n" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"qid": 1,\n  "answer" "yes"}]', "line 2, column 12: not valid JSON: Expecting ':' delimiter"),
        ("", "a JSON list of rows is needed, this is empty"),
        (
            '{"rows": []}',
            "this must be a JSON list of rows, and it begins with '{'; name a file with an object on",
        ),
        ("[" * 200_000, "line 1, column 2: not valid JSON: "),
        (f"[{'9' * 5000}]", "line 1, column 2: not valid JSON: "),
    ],
)
def test_a_file_that_is_no_list(tmp_path, content, reason):
    assert f"{tmp_path / 'trainset.json'}: {reason}" in refusal(split_folder(tmp_path, content))


def test_a_file_that_is_no_text(tmp_path):
    spec = split_folder(tmp_path, [row()])
    (tmp_path / "trainset.json").write_bytes(b'["\xff"]')
    assert f"{tmp_path / 'trainset.json'}: byte 2: not UTF-8 text" in refusal(spec)


def test_missing_file_and_folders(tmp_path):
    assert f"{tmp_path / 'testset.json'}: this file is missing" in refusal(make_folder(tmp_path, train=[row()]))
    os.rename(tmp_path / "images", tmp_path / "Images2")
    assert f"{tmp_path}: no folder of images; looked for 'images' and 'VQA_RAD Image Folder'" in refusal(str(tmp_path))


def test_an_image_that_no_row_names_is_refused(tmp_path):
    data = load_dataset(split_folder(tmp_path, [row()]), "train")
    with pytest.raises(FastLNError, match=r"no question .* '\.\./x\.png'"):
        data.image("../x.png")


def test_unreadable_image_is_found_when_asked_for(tmp_path):
    data = load_dataset(split_folder(tmp_path, [row()]), "train")
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(FastLNError, match=r"a\.png: this is not an image"):
        data.image("a.png")


def test_real_data_in_both_layouts(fastln_data, tmp_path):
    folder = fastln_data / "data" / "vqa-rad"
    (tmp_path / "images").symlink_to(folder / "images")
    (tmp_path / PUBLIC).symlink_to(folder / PUBLIC)
    train, test = (load_dataset(str(folder), split) for split in ("train", "test"))
    # 14 triples stand in both splits; in training they are 22 rows, some of them in the words of a template.
    assert len(train) == len(json.loads((folder / "trainset.json").read_text())) - 22 == 3042
    assert (len(test), sum(sample.closed for sample in test.samples)) == (451, 272)
    assert load_dataset(str(tmp_path), "train").samples == train.samples
    assert load_dataset(str(tmp_path), "test").samples == test.samples
    assert len({sample.id for sample in train.samples + test.samples}) == 3042 + 451


def test_real_images_decode(fastln_data):
    data = load_dataset(str(fastln_data / "data" / "vqa-rad"), "test")
    image = data.image(data[0].image)
    assert image.mode == "RGB"
    assert min(image.size) > 100
