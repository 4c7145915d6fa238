"""The reader of VQA-RAD (Lau et al., Scientific Data 2018), in both layouts in which it is found.

*Split*: `trainset.json` and `testset.json`, the split that the literature uses. *Public*: the authors' own single file,
`VQA_RAD Dataset Public.json`. The images lie in `images` or, as the authors name it, `VQA_RAD Image Folder`.

Each row of the public file gives its question and, where `question_frame` is not `NULL`, that question once more in a
template's words. Numbering questions and frames through, row by row, gives the `qid` of the split files: `phrase_type`
`test_...` puts a question into the test split, everything else is training. The frames are training even where their
question is a test question: 284 of the 1,267 frames in training therefore say what the test asks, with its answer, 263
of them in other words. That is the split of the literature and is kept.

Where the same image, question (but for case and white space) and answer (normalised) stand in both splits, the row is
dropped from training: 14 such triples, which are 22 of the 3,064 rows. The published test split stays whole.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastln.data.answers import normalise_answer
from fastln.data.dataset import Sample, Source
from fastln.data.files import read_rows
from fastln.data.options import DataOptions
from fastln.data.rows import ANSWER_TYPES, RowChecker, answer, choice, image_folder, line, text, text_or_number

LAYOUT = "trainset.json and testset.json, or 'VQA_RAD Dataset Public.json'; images/"

_SPLIT_FILES = {"train": "trainset.json", "test": "testset.json"}
_PUBLIC_FILE = "VQA_RAD Dataset Public.json"
_IMAGE_FOLDERS = ("images", "VQA_RAD Image Folder")
_PHRASE_TYPES = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
_NO_FRAME = "NULL"

logger = logging.getLogger(__name__)


def recognises(folder: Path) -> bool:
    """Whether a folder holds any of the files that this reader reads."""
    return any((folder / name).is_file() for name in (*_SPLIT_FILES.values(), _PUBLIC_FILE))


def read(folder: Path, options: DataOptions) -> Source:
    """Read a VQA-RAD folder; where it holds both layouts, the split files.

    Args:
        folder: A folder that `recognises` accepts.
        options: Whether to skip bad rows.

    Raises:
        FastLNError: A file or the image folder is missing; a file is not a JSON list (with line and column); or rows
            are bad: all of them are told with file, index and reason.
    """
    rows = RowChecker([image_folder(folder, *_IMAGE_FOLDERS)], skip=options.skip_bad_rows)
    if (folder / _PUBLIC_FILE).is_file() and not all((folder / name).is_file() for name in _SPLIT_FILES.values()):
        splits = _read_public(folder / _PUBLIC_FILE, rows)
    else:
        splits = {split: _read_split(folder / name, rows) for split, name in _SPLIT_FILES.items()}
    tested = {_triple(sample) for sample in splits["test"]}
    train = [sample for sample in splits["train"] if _triple(sample) not in tested]
    logger.info("vqa-rad: dropped %d training questions that the test split repeats", len(splits["train"]) - len(train))
    return rows.source("vqa-rad", {"train": train, "test": splits["test"]})


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


def _triple(sample: Sample) -> tuple[str, str, str]:
    return sample.image, sample.question.lower(), normalise_answer(sample.answer)
