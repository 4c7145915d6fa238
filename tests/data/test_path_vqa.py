"""PathVQA as its authors have it: both files of questions, and pickles, which are never opened."""

import json
import pickle
import shlex
import subprocess
import sys

import pytest
from layouts import LAYOUTS, save

from fastln.data import load_source
from fastln.errors import FastLNError

ORIGINAL = LAYOUTS["path-vqa"]


def refusal(spec):
    with pytest.raises(FastLNError) as caught:
        load_source(spec)
    return str(caught.value)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("this pickle was opened",))


def test_pickles_are_refused_unopened_with_what_to_do(tmp_path):
    folder = tmp_path / "it's here"
    spec = ORIGINAL.make(folder)
    files = [folder / "qas" / "val" / "val_qa.json", folder / "qas" / "test_vqa.json"]
    (folder / "qas" / "test" / "test_qa.json").unlink()
    files[0].unlink()
    for file in files:
        file.with_suffix(".pkl").write_bytes(pickle.dumps(Bomb()))
    message = refusal(spec)
    assert message.startswith(", ".join(str(file.with_suffix(".pkl")) for file in files))
    assert ": pickled files are not read, because they can run any code" in message
    # The command that the message gives does what it says.
    for file in files:
        file.with_suffix(".pkl").write_bytes(pickle.dumps([ORIGINAL.row(2)]))
    command = shlex.split(message.partition("convert them: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    splits = load_source(spec).splits
    assert splits["validation"][0].image == "val/x_0002.jpg"
    assert splits["test"][0].image == "test/x_0002.jpg"


def lxmert(**changes):
    row = {
        "answer_type": "other",
        "img_id": "x_0001",
        "label": {"in the canals of hering": 1},
        "question_id": 100001000,
        "question_type": "where",
        "sent": "Where are  stem cells located?",
    }
    return row | changes


def with_lxmert_files(folder, **rows):
    spec = ORIGINAL.make(folder)
    for name in ("train", "val", "test"):
        (folder / "qas" / name / f"{name}_qa.json").unlink()
        save(
            folder / "qas" / f"{name}_vqa.json", json.dumps(rows.get(name, [lxmert(label={f"in {name}": 1})])).encode()
        )
    return spec


def test_the_file_that_says_what_is_closed(tmp_path):
    closed = lxmert(answer_type="yes/no", label={"no": 1}, sent="Is it?")
    train = load_source(with_lxmert_files(tmp_path, train=[lxmert(), closed])).splits["train"]
    assert [(s.image, s.question, s.answer, s.closed) for s in train] == [
        ("train/x_0001.jpg", "Where are stem cells located?", "in the canals of hering", False),
        ("train/x_0001.jpg", "Is it?", "no", True),
    ]


@pytest.mark.parametrize("label", [{}, {"a": 1, "b": 1}, None, "a"])
def test_rows_without_one_label(tmp_path, label):
    message = refusal(with_lxmert_files(tmp_path, train=[lxmert(), lxmert(label=label)]))
    assert "train_vqa.json: row 1 (question_id 100001000): field 'label' must have the answer as its one" in message


def test_where_both_files_are_the_one_with_all_answers_is_read(tmp_path):
    spec = ORIGINAL.make(tmp_path)
    save(tmp_path / "qas" / "train_vqa.json", b"[]")
    assert len(load_source(spec).splits["train"]) == 1


def test_a_missing_file(tmp_path):
    spec = ORIGINAL.make(tmp_path)
    (tmp_path / "qas" / "test" / "test_qa.json").unlink()
    assert "test_qa.json: this file is missing" in refusal(spec)
