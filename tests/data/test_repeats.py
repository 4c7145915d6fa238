"""Training rows that another split repeats are dropped by one rule, whatever the layout, and told in one line."""

import dataclasses
import logging

import pytest
from layouts import LAYOUTS, jpeg, save

from fastln.data import DataOptions, load_source

PLAIN = LAYOUTS["plain, jsonl"]


def ask(image, question="Is it normal?", answer="no"):
    return {"image": image, "question": question, "answer": answer}


def load(tmp_path, caplog, options=None, **rows):
    with caplog.at_level(logging.INFO, "fastln"):
        return load_source(PLAIN.make(tmp_path / "own", **rows), options)


def test_what_test_and_validation_repeat_leaves_training(tmp_path, caplog):
    train = [ask("0.jpg", "is it  NORMAL?", "No."), ask("1.jpg"), ask("2.jpg"), ask("2.jpg", answer="yes")]
    source = load(tmp_path, caplog, train=train, validation=[ask("1.jpg")], test=[ask("0.jpg"), ask("2.jpg")])
    assert [(s.image, s.answer) for s in source.splits["train"]] == [("2.jpg", "yes")]
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 1, "validation": 1, "test": 2}
    assert (
        "own: dropped 3 training questions that the validation or test split repeats with images and answer "
        "(--keep-repeats keeps them)"
    ) in caplog.text
    assert (
        "own: 1 training questions have the images and the question of the validation or test split, and" in caplog.text
    )


def test_a_switch_keeps_them(tmp_path, caplog):
    source = load(tmp_path, caplog, DataOptions(keep_repeats=True), train=[ask("0.jpg")], test=[ask("0.jpg")])
    assert len(source.splits["train"]) == 1
    assert "dropped" not in caplog.text


def test_nothing_is_told_where_nothing_repeats(tmp_path, caplog):
    load(tmp_path, caplog, train=[ask("0.jpg"), ask("0.jpg")], validation=[ask("1.jpg")], test=[ask("2.jpg")])
    assert "repeat" not in caplog.text


@pytest.mark.parametrize("same", [True, False])
def test_a_copy_of_an_image_is_that_image(same, tmp_path, caplog):
    save(tmp_path / "own" / "images" / "copy.jpg", jpeg(0 if same else 1))
    source = load(
        tmp_path, caplog, train=[ask("copy.jpg"), ask("3.jpg", answer="yes")], test=[ask("0.jpg"), ask("2.jpg")]
    )
    assert len(source.splits["train"]) == (1 if same else 2)
    assert source.splits["test"][0].image == "0.jpg"


def test_copies_are_held_out_together(tmp_path):
    for number in range(12):
        save(tmp_path / "images" / f"copy{number}.jpg", jpeg(number // 2))
    save(
        tmp_path / "train.csv",
        b"image,question,answer\n" + b"".join(b"copy%d.jpg,Q%d?,no\n" % (n, n) for n in range(12)),
    )
    source = load_source(str(tmp_path))
    held_out = {s.image for s in source.dataset("validation", validation_fraction=0.5).samples}
    assert 0 < len(held_out) < 12
    assert all((f"copy{number}.jpg" in held_out) == (f"copy{number + 1}.jpg" in held_out) for number in range(0, 12, 2))


def test_texts_views_and_conversations_repeat_as_a_whole(tmp_path, caplog):
    layout = LAYOUTS["llava-med"]
    row, other = layout.row(0), layout.row(0)
    other["conversations"][1]["value"] = "A CT."
    source = load_source(layout.make(tmp_path / "talks", train=[row, other], test=[row]))
    assert [sample.history[0][1] for sample in source.splits["train"]] == ["A CT."]
    views = {"image": ["0.jpg", "1.jpg"], "question": "Q?", "answer": "A"}
    source = load(tmp_path, caplog, train=[views, views | {"image": ["0.jpg"]}], test=[views])
    assert [sample.images for sample in source.splits["train"]] == [("0.jpg",)]
    save(tmp_path / "text" / "train.csv", b"question,answer\nA?,b\nC?,d\n")
    save(tmp_path / "text" / "test.csv", b"question,answer\na?,B.\n")
    assert [sample.question for sample in load_source(str(tmp_path / "text")).splits["train"]] == ["C?"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rule_is_that_of_every_layout(name, tmp_path):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    layout = LAYOUTS[name]
    spec = layout.make(tmp_path, train=[layout.row(0), layout.row(1)], test=[layout.row(1)])
    dropped, kept = load_source(spec), load_source(spec, DataOptions(keep_repeats=True))
    assert dropped.splits["train"] == kept.splits["train"][:1]
    assert dropped.splits["test"] == kept.splits["test"]


def test_copies_are_told_with_the_source(tmp_path):
    save(tmp_path / "images" / "copy.jpg", jpeg(1))
    source = load_source(PLAIN.make(tmp_path, train=[ask("1.jpg"), ask("copy.jpg"), ask("0.jpg")]))
    assert source.copies == {"copy.jpg": "1.jpg"}
    assert dataclasses.replace(source, copies={}).copies == {}
