"""The reader of conversations in the format of LLaVA-Med: a JSON list (or JSON Lines) of `image`, `conversations`.

`conversations` is a list of alternating turns, `{"from": "human", "value": ...}` and `{"from": "gpt", "value": ...}`.
LLaVA-Med's own files spell the field `conversatons` in places; that is read too. `<image>` in the first question marks
where the image goes. It is removed, because each model has its own place for images. One conversation is one sample:
the last question with its answer, and the earlier turns as its history. The optional `answer_type` says CLOSED or OPEN
(or PathVQA's yes/no, other, number): LLaVA-Med converts the three question sets to such `train.json` and `test.json`
files. The rows of its evaluation, `llava_med_eval_qa50_qa.jsonl`, have `text` and `gpt4_answer`
instead, one question each.

Files, splits and images are found as for plain rows; see `fastln.data.plain`. They are also found where LLaVA-Med's
download puts them: files in `data/instruct`, `data/alignment` and `data/eval`, images in `data/images`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastln.data.answers import normalise_answer
from fastln.data.dataset import Sample, Source
from fastln.data.files import BadRowError, shown
from fastln.data.options import DataOptions
from fastln.data.plain import images_beside, read_splits, split_files
from fastln.data.rows import RowChecker, as_text, as_text_or_number, closed_label, row_id

LAYOUT = "a file .json or .jsonl of image, conversations [{from, value}]; or a folder of train, validation, test files"

_FIELDS = ("conversations", "conversatons")
_EVALUATION = ("text", "gpt4_answer")
_SPEAKERS = ("human", "gpt")
_IMAGE = "<image>"
_PEEKED = 1 << 16


def recognises(path: Path) -> bool:
    """Whether any file that could hold plain rows begins with a row in LLaVA-Med's form."""
    return any(_is_of_the_kind(file) for file in split_files(path).values())


def _is_of_the_kind(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            start = stream.read(_PEEKED)
    except OSError:  # the next reader, of plain rows, reports it
        return False
    return any(f'"{field}"'.encode() in start for field in (*_FIELDS, _EVALUATION[1]))


def read(path: Path, options: DataOptions) -> Source:
    """Read the conversations.

    Args:
        path: What `recognises` accepts.
        options: How to read the data.

    Raises:
        FastLNError: A file cannot be read, or rows are bad.
    """
    rows = RowChecker(_image_folders(path), options)

    def parse(row: dict[str, Any], index: int, images: tuple[str, ...]) -> Sample:
        *history, (question, answer) = _turns(row, len(images))
        return Sample(
            id=row_id(row, str(index)),
            image=images[0] if images else "",
            question=question,
            answer=answer,
            closed=closed_label(row),
            views=images[1:],
            history=tuple(history),
        )

    return read_splits(path, rows, parse)


def _image_folders(path: Path) -> list[Path]:
    beside = images_beside(path)
    above = beside[-1].resolve().parent / "images"
    return [*beside, above] if above.is_dir() else beside


def _turns(row: dict[str, Any], n_images: int) -> list[tuple[str, str]]:
    """Return the questions with their answers."""
    if all(field in row for field in _EVALUATION):
        question, answer = ({"value": row[field]} for field in _EVALUATION)
        return [(_value(question, 0, n_images), _value(answer, 1, n_images))]
    field = next((name for name in _FIELDS if name in row), _FIELDS[0])
    turns = row.get(field)
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise BadRowError(f"field {field!r} must be a list of questions, each with its answer, not {shown(turns)}")
    values = []
    for number, turn in enumerate(turns):
        speaker = _SPEAKERS[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            raise BadRowError(f"turn {number} must be from {speaker!r}, not {shown(turn)}")
        values.append(_value(turn, number, n_images))
    return list(zip(values[::2], values[1::2], strict=True))


def _value(turn: dict[str, Any], number: int, n_images: int) -> str:
    what = f"the value of turn {number}"
    if number % 2:
        value = as_text_or_number(turn.get("value"), what)  # some answers of VQA-RAD are numbers
        if not normalise_answer(value):
            raise BadRowError(f"{what} is {shown(value)}, which is empty after normalising")
        return value
    value = as_text(turn.get("value"), what)
    marks = value.count(_IMAGE)
    if marks > (n_images if number == 0 else 0):
        raise BadRowError(f"turn {number} holds {marks} times {_IMAGE}; the row has {n_images}, due in turn 0")
    return as_text(" ".join(value.replace(_IMAGE, " ").split()), what)
