"""The reader of conversations in the format of LLaVA-Med: a JSON list (or JSON Lines) of `image`, `conversations`.

`conversations` is a list of alternating turns, `{"from": "human", "value": ...}` and `{"from": "gpt", "value": ...}`.
LLaVA-Med's own files spell the field `conversatons` in places; that is read too. A first turn from `system` is what is
said to the model before the conversation. `<image>` in a question marks the turn in which an image stands; in order,
the marks stand for the row's images. They are removed, because each model has its own place for images in a turn. A row
without marks has its images in the first turn, and a row without images may stand beside others. One conversation is
one sample: the last question with its answer, and the earlier turns as its history. The optional `answer_type` says
CLOSED or OPEN (or PathVQA's yes/no, other, number): LLaVA-Med converts the three question sets to such `train.json` and
`test.json` files. The rows of its evaluation, `llava_med_eval_qa50_qa.jsonl`, have `text` and `gpt4_answer` instead,
one question each.

Files, splits and images are found as for plain rows; see `fastln.data.plain`. They are also found where LLaVA-Med's
download puts them: files in `data/instruct`, `data/alignment` and `data/eval`, images in `data/images`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastln.data.answers import normalise_answer
from fastln.data.dataset import Sample, Source
from fastln.data.files import BadRowError, shown
from fastln.data.plain import images_beside, read_splits, split_files
from fastln.data.rows import RowChecker, as_text, as_text_or_number, closed_label, row_id
from fastln.reading import DataOptions

LAYOUT = "a file .json or .jsonl of image, conversations [{from, value}]; or a folder of train, validation, test files"

_FIELDS = ("conversations", "conversatons")
_EVALUATION = ("text", "gpt4_answer")
_SPEAKERS = ("human", "gpt")
_SYSTEM = "system"
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
        system, turns, places = _conversation(row, len(images))
        *history, (question, answer) = turns
        return Sample(
            id=row_id(row, str(index)),
            image=images[0] if images else "",
            question=question,
            answer=answer,
            closed=closed_label(row),
            views=images[1:],
            history=tuple(history),
            system=system,
            places=places,
        )

    return read_splits(path, rows, parse, mixed=True)


def _image_folders(path: Path) -> list[Path]:
    beside = images_beside(path)
    above = beside[-1].resolve().parent / "images"
    return [*beside, above] if above.is_dir() else beside


def _conversation(row: dict[str, Any], n_images: int) -> tuple[str, list[tuple[str, str]], tuple[int, ...]]:
    """Return the system's text, the questions with their answers, and the turn of each image (see `Sample.places`)."""
    if all(field in row for field in _EVALUATION):
        values = [row[field] for field in _EVALUATION]
        turns: Any = [{"from": speaker, "value": value} for speaker, value in zip(_SPEAKERS, values, strict=True)]
        n_before = 0
    else:
        field = next((name for name in _FIELDS if name in row), _FIELDS[0])
        turns = row.get(field)
        n_before = int(isinstance(turns, list) and bool(turns) and _speaker(turns[0]) == _SYSTEM)
        if not isinstance(turns, list) or len(turns) == n_before or (len(turns) - n_before) % 2:
            raise BadRowError(f"field {field!r} must be a list of questions, each with its answer, not {shown(turns)}")
    texts: list[str] = []
    places: list[int] = []
    for number, turn in enumerate(turns[n_before:], start=n_before):
        speaker = _SPEAKERS[len(texts) % 2]
        if _speaker(turn) == _SYSTEM:
            raise BadRowError(f"turn {number} is from {_SYSTEM!r}, which must be the first")
        if _speaker(turn) != speaker:
            raise BadRowError(f"turn {number} must be from {speaker!r}, not {shown(turn)}")
        what, value = f"the value of turn {number}", turn.get("value")
        if speaker == _SPEAKERS[0]:
            question = as_text(value, what)
            places += [len(texts) // 2] * question.count(_IMAGE)
            texts.append(as_text(" ".join(question.replace(_IMAGE, " ").split()), what))
        else:
            texts.append(_answer(value, what))
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    return _system(turns[0]) if n_before else "", pairs, _places(places, n_images)


def _speaker(turn: object) -> object:
    return turn.get("from") if isinstance(turn, dict) else None


def _system(turn: dict[str, Any]) -> str:
    value = turn.get("value")
    if value == "":
        return ""
    text = as_text(value, "the value of the system's turn")
    if _IMAGE in text:
        raise BadRowError(f"the system's turn holds {_IMAGE}; images stand in questions")
    return text


def _answer(value: object, what: str) -> str:
    text = as_text_or_number(value, what)  # some answers of VQA-RAD are numbers
    if not normalise_answer(text):
        raise BadRowError(f"{what} is {shown(text)}, which is empty after normalising")
    if _IMAGE in text:
        raise BadRowError(f"{what} holds {_IMAGE}, and is an answer; images stand in questions")
    return text


def _places(places: list[int], n_images: int) -> tuple[int, ...]:
    """Return the turn of each image; empty for the first turn alone, where fewer marks than images may stand."""
    if places and not n_images:
        raise BadRowError(f"field 'image' is missing, and the questions hold {len(places)} times {_IMAGE}")
    if len(places) == n_images and any(places):
        return tuple(places)
    if len(places) > n_images or any(places):
        raise BadRowError(f"the questions hold {len(places)} times {_IMAGE}, and the row names {n_images} image(s)")
    return ()
