"""The reader of SLAKE (Liu et al., ISBI 2021): `train.json`, `validate.json`, `test.json`, `imgs/xmlabN/source.jpg`.

The copy on the hub calls the second file `validation.json` and packs the images into `imgs.zip`, which must be
unpacked. Half of the questions are English and half Chinese; one language is read. As published, one of the 9,835 rows
of `train.json` has an empty answer. That one row is left out; any further one is a bad row.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from fastln.data.dataset import Sample, Source
from fastln.data.rows import ANSWER_TYPES, RowChecker, answer, choice, image_folder, line, text, text_or_number
from fastln.data.tables import read_rows
from fastln.reading import DataOptions

LAYOUT = "train.json, validate.json (or validation.json), test.json; imgs/xmlabN/source.jpg"
LANGUAGES = ("en", "zh")

_FILES = {"train": ("train.json",), "validation": ("validate.json", "validation.json"), "test": ("test.json",)}
_IMAGES = "imgs"

logger = logging.getLogger(__name__)


def recognises(folder: Path) -> bool:
    """Whether a folder holds SLAKE's images, or the archive of them, and any of its files."""
    images = (folder / _IMAGES).is_dir() or (folder / f"{_IMAGES}.zip").is_file()
    return images and any((folder / name).is_file() for names in _FILES.values() for name in names)


def read(folder: Path, options: DataOptions) -> Source:
    """Read the questions in one language.

    Args:
        folder: A folder that `recognises` accepts.
        options: The language, and how to read the data.

    Raises:
        FastLNError: A file or the image folder is missing; a file is not a JSON list; or rows are bad.
    """
    rows = RowChecker([image_folder(folder, _IMAGES)], options)
    language = options.language or LANGUAGES[0]

    unanswered: list[int] = []

    def parse(split: str, row: dict[str, Any], index: int) -> Sample | None:
        if choice(row, "q_lang", {name: name for name in LANGUAGES}) != language:
            return None
        if split == "train" and row.get("answer") == "" and not unanswered:
            unanswered.append(index)
            logger.info("slake: left out row %d of the training questions: its answer is empty, as published", index)
            return None
        return Sample(
            id=text_or_number(row, "qid"),
            image=rows.image(text(row, "img_name")),
            question=line(row, "question"),
            answer=answer(row, "answer"),
            closed=choice(row, "answer_type", ANSWER_TYPES),
        )

    splits = {}
    for split, names in _FILES.items():
        file = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        found = rows.read(file, read_rows(file), functools.partial(parse, split))
        splits[split] = [sample for sample in found if sample]
    return rows.source("slake", splits)
