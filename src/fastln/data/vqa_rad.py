"""The reader of VQA-RAD (Lau et al., Scientific Data 2018), in both of its layouts.

*Split*: `trainset.json` and `testset.json`, the split that the literature uses. *Public*: the authors' own single file,
`VQA_RAD Dataset Public.json`. The images are in `images` or in `VQA_RAD Image Folder`, the authors' name.

Each row of the public file gives its question and, if `question_frame` is not `NULL`, the same question in a template's
words. Numbering questions and frames consecutively, row by row, gives the `qid` of the split files: `phrase_type`
`test_...` puts a question into the test split, and everything else is training. Frames are training even if their
question is a test question. So 284 of the 1,267 frames in training repeat a test question with its answer, 263 of them
in other words. That is the split of the literature, and it is kept.

Of the 3,064 training rows, 22 repeat one of 14 test questions with its image and answer. They are dropped, as from all
data (`fastln.data.repeats`). The published test split stays complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastln.data.dataset import Sample, Source
from fastln.data.rows import ANSWER_TYPES, RowChecker, answer, choice, image_folder, line, text, text_or_number
from fastln.data.tables import read_rows
from fastln.reading import DataOptions

LAYOUT = "trainset.json and testset.json, or 'VQA_RAD Dataset Public.json'; images/"

_SPLIT_FILES = {"train": "trainset.json", "test": "testset.json"}
_PUBLIC_FILE = "VQA_RAD Dataset Public.json"
_IMAGE_FOLDERS = ("images", "VQA_RAD Image Folder")
_PHRASE_TYPES = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
_NO_FRAME = "NULL"


def recognises(folder: Path) -> bool:
    """Whether a folder holds any of the files that this reader reads."""
    return any((folder / name).is_file() for name in (*_SPLIT_FILES.values(), _PUBLIC_FILE))


def read(folder: Path, options: DataOptions) -> Source:
    """Read a VQA-RAD folder; if it holds both layouts, read the split files.

    Args:
        folder: A folder that `recognises` accepts.
        options: How to read the data.

    Raises:
        FastLNError: A file or the image folder is missing; a file is not a JSON list (with line and column); or rows
            are bad: all of them are listed with file, index and reason.
    """
    rows = RowChecker([image_folder(folder, *_IMAGE_FOLDERS)], options)
    if (folder / _PUBLIC_FILE).is_file() and not all((folder / name).is_file() for name in _SPLIT_FILES.values()):
        splits = _read_public(folder / _PUBLIC_FILE, rows)
    else:
        splits = {split: _read_split(folder / name, rows) for split, name in _SPLIT_FILES.items()}
    return rows.source("vqa-rad", splits)


def _read_split(file: Path, rows: RowChecker) -> list[Sample]:
    def parse(row: dict[str, Any], index: int) -> Sample:
        return _sample(row, text_or_number(row, "qid"), line(row, "question"), rows)

    return rows.read(file, read_rows(file), parse)


def _read_public(file: Path, rows: RowChecker) -> dict[str, list[Sample]]:
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    number = 0

    def parse(row: dict[str, Any], index: int) -> None:
        nonlocal number
        split = choice(row, "phrase_type", _PHRASE_TYPES)
        number += 1
        splits[split].append(_sample(row, str(number), line(row, "question"), rows))
        frame = line(row, "question_frame")
        if frame != _NO_FRAME:
            number += 1
            splits["train"].append(_sample(row, str(number), frame, rows))

    rows.read(file, read_rows(file), parse)
    return splits


def _sample(row: dict[str, Any], qid: str, question: str, rows: RowChecker) -> Sample:
    return Sample(
        id=qid,
        image=rows.image(text(row, "image_name")),
        question=question,
        answer=answer(row, "answer"),
        closed=choice(row, "answer_type", ANSWER_TYPES),
    )
