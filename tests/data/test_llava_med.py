"""Conversations: turns, the mark of the image, single files, and turns that do not alternate."""

import json

import pytest
from layouts import LAYOUTS, without

from fastln.data import demands, load_source
from fastln.errors import FastLNError

LLAVA = LAYOUTS["llava-med"]


def turns(*values):
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def said(value):
    return {"from": "system", "value": value}


def sample(tmp_path, **changes):
    return load_source(LLAVA.make(tmp_path, train=[LLAVA.row(0) | changes])).splits["train"][0]


def test_one_turn_has_no_history(tmp_path):
    got = sample(tmp_path, conversations=turns("<image>\nIs it \n broken?", "Yes,\nit is."))
    assert (got.question, got.answer, got.history) == ("Is it broken?", "Yes,\nit is.", ())


def test_three_turns(tmp_path):
    got = sample(tmp_path, conversations=turns("A <image>", "1.", "B", "2.", "C", "3."))
    assert (got.question, got.answer, got.history) == ("C", "3.", (("A", "1."), ("B", "2.")))


def test_the_field_as_llava_med_misspells_it_labels_and_several_images(tmp_path):
    row = without(LLAVA.row(0), "conversations") | {
        "conversatons": turns("<image><image>Is it the same?", "No"),
        "answer_type": "CLOSED",
        "image": ["1.jpg", "2.jpg"],
    }
    (got,) = load_source(LLAVA.make(tmp_path, train=[row])).splits["train"]
    assert (got.closed, got.images, got.question) == (True, ("1.jpg", "2.jpg"), "Is it the same?")


def test_a_single_file_is_training_and_its_images_lie_beside_it(tmp_path):
    LLAVA.make(tmp_path)
    file = (tmp_path / "train.json").rename(tmp_path / "images" / "instruct.json")
    source = load_source(str(file))
    assert list(source.splits) == ["train"]
    assert source.name == "instruct"
    with pytest.raises(FastLNError, match="instruct has no test split, only train"):
        source.dataset("test")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": []}, "field 'conversations' must be a list of questions, each with its answer, not []"),
        ({"conversations": turns("A")}, "must be a list of questions, each with its answer, not [{"),
        ({"conversations": [*turns("A"), *turns("B")]}, 'turn 1 must be from \'gpt\', not {"from": "human"'),
        ({"conversations": ["A", "1"]}, "turn 0 must be from 'human', not \"A\""),
        ({"conversations": turns("<image>", "1")}, "the value of turn 0 is empty"),
        ({"conversations": turns("A", None)}, "the value of turn 1 must be a text, not null"),
        ({"conversations": turns("A", "...")}, 'the value of turn 1 is "...", which is empty after normalising'),
        (
            {"conversations": turns("<image><image>A", "1")},
            "the questions hold 2 times <image>, and the row names 1 image(s)",
        ),
        (
            {"image": ["1.jpg", "2.jpg"], "conversations": turns("A", "1", "<image>B", "2")},
            "the questions hold 1 times <image>, and the row names 2 image(s)",
        ),
        ({"conversations": turns("A", "an <image>")}, "the value of turn 1 holds <image>, and is an answer"),
        ({"conversations": [said("Be brief. <image>"), *turns("A", "1")]}, "the system's turn holds <image>"),
        ({"conversations": [said(3), *turns("A", "1")]}, "the value of the system's turn must be a text, not 3"),
        ({"conversations": [said("S")]}, "must be a list of questions, each with its answer, not [{"),
        ({"conversations": [said("S"), *turns("A")]}, "must be a list of questions, each with its answer, not [{"),
        (
            {"conversations": [*turns("A", "1"), said("S"), *turns("B")]},
            "turn 2 is from 'system', which must be the first",
        ),
        ({"conversations": [said("S"), *turns("A", "1")[::-1]]}, "turn 1 must be from 'human'"),
        ({"image": []}, "field 'image' is missing"),
        ({"image": None}, "field 'image' is missing"),
        ({"image": 3}, "field 'image' must be a text, not 3"),
        ({"answer_type": "BOTH"}, "which is none of CLOSED, OPEN"),
    ],
)
def test_bad_rows(tmp_path, change, reason):
    with pytest.raises(FastLNError) as caught:
        sample(tmp_path, **change)
    assert 'train.json: row 0 (id "fig_0"): ' in str(caught.value)
    assert reason in str(caught.value)


def test_answers_that_are_numbers_are_texts(tmp_path):
    assert sample(tmp_path, conversations=turns("How many?\n<image>", 12)).answer == "12"


def test_a_field_of_neither_name(tmp_path):
    spec = LLAVA.make(tmp_path, train=[LLAVA.row(0), without(LLAVA.row(0), "conversations")])
    with pytest.raises(FastLNError, match=r"row 1 .* field 'conversations' must be a list"):
        load_source(spec)


def test_json_lines(tmp_path):
    LLAVA.make(tmp_path)
    (tmp_path / "train.json").unlink()
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(LLAVA.row(0))}\n{json.dumps(LLAVA.row(1))}\n")
    assert [sample.id for sample in load_source(str(tmp_path)).splits["train"]] == ["fig_0", "fig_1"]


def test_images_stand_in_the_turn_that_marks_them(tmp_path):
    got = sample(tmp_path, conversations=turns("A", "1", "B <image>", "2"))
    assert (got.question, got.places) == ("B", (1,))
    row = {"image": ["1.jpg", "2.jpg", "3.jpg"], "conversations": turns("<image>A", "1", "<image> B <image>", "2")}
    assert sample(tmp_path, **row).places == (0, 1, 1)
    for conversation in (turns("A", "1", "B", "2"), turns("<image>A", "1"), turns("<image><image>A<image>", "1")):
        assert sample(tmp_path, **row | {"conversations": conversation}).places == ()


@pytest.mark.parametrize(("value", "system"), [("You are\na radiologist. ", "You are\na radiologist."), ("", "")])
def test_a_system_turn_comes_before_the_conversation(value, system, tmp_path):
    got = sample(tmp_path, conversations=[said(value), *turns("A <image>", "1", "B", "2")])
    assert (got.system, got.history, got.question, got.answer) == (system, (("A", "1"),), "B", "2")
    assert ("system turns" in demands([got])) == bool(system)


def test_rows_without_an_image_stand_beside_rows_with_one(tmp_path):
    text = {"id": "t", "conversations": turns("A", "1")}
    train = load_source(LLAVA.make(tmp_path, train=[text, LLAVA.row(0), text | {"image": None}])).splits["train"]
    assert [got.images for got in train] == [(), ("0.jpg",), ()]
    assert {"images", "questions without an image"} <= demands(train)
