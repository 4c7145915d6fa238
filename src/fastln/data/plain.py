"""The reader of users' own questions: JSON Lines, CSV or a JSON list with the fields `image`, `question`, `answer`.

A folder holds one file per split: `train`, `validation` (or `val`, `validate`, `valid`) and `test`, each with the
suffix `.jsonl`, `.csv` or `.json`. A single file is all training data. Images are named relative to the folder
`images` beside the files if they are there, otherwise relative to the files' own folder. Optional fields: `id` (or
`qid`, `question_id`; the row's index by default) and `answer_type`, CLOSED or OPEN. In JSON, `image` may be a list of
several, all views of one study. If no row has the field `image`, the questions are about no image, for models that read
only text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastln.data.dataset import Sample, Source
from fastln.data.files import SPLIT_STEMS, SUFFIXES, BadRowError, data_name
from fastln.data.rows import RowChecker, answer, as_text, closed_label, line, row_id
from fastln.data.tables import read_rows
from fastln.errors import FastLNError
from fastln.reading import DataOptions

LAYOUT = "a file .jsonl, .csv or .json of image, question, answer; or a folder of train, validation and test files"

_COLUMNS = ("question", "answer")


def split_files(path: Path) -> dict[str, Path]:
    """Return the file of each existing split: in a folder by name; a single file is `train`.

    Raises:
        FastLNError: Two files could be the same split.
    """
    if path.is_file():
        return {"train": path} if path.suffix in SUFFIXES else {}
    found = {}
    for split, stems in SPLIT_STEMS.items():
        files = [file for stem in stems for suffix in SUFFIXES if (file := path / f"{stem}{suffix}").is_file()]
        if len(files) > 1:
            raise FastLNError(f"{path}: which is the {split} split, {' or '.join(file.name for file in files)}?")
        if files:
            found[split] = files[0]
    return found


def read_splits(
    path: Path,
    rows: RowChecker,
    parse: Callable[[dict[str, Any], int, tuple[str, ...]], Sample],
    columns: Iterable[str] = (),
    *,
    mixed: bool = False,
) -> Source:
    """Read the file of each split.

    Args:
        path: The file, or the folder of files.
        rows: Checks the rows.
        parse: Makes a sample from a row, its index and its images' keys (none if no row of the data has any).
        columns: The columns that a CSV file must have.
        mixed: Whether rows without an image may stand beside rows with one.

    Raises:
        FastLNError: There is no file, one cannot be read, or rows are bad.
    """
    files = split_files(path)
    if not files:
        raise FastLNError(f"{path}: no file of rows; looked for train, validation (or val), test{'|'.join(SUFFIXES)}")
    illustrated = _has_images(path, (row for file in files.values() for row in read_rows(file, columns)))

    def sample(row: dict[str, Any], index: int) -> Sample:
        if not illustrated or (mixed and not row.get("image")):
            return parse(row, index, ())
        return parse(row, index, tuple(rows.image(name) for name in image_names(row)))

    splits = {split: rows.read(file, read_rows(file, columns), sample) for split, file in files.items()}
    return rows.source(data_name(path), splits)


def _has_images(path: Path, rows: Iterable[Any]) -> bool:
    """Whether any row has an image; usually the first row decides. This runs before any check.

    Raises:
        FastLNError: No row has one, but another field looks like a misnamed `image`.
    """
    fields: set[str] = set()
    for row in rows:
        if isinstance(row, dict):
            if "image" in row:
                return True
            fields.update(row)
    if meant := sorted(name for name in fields if re.search("image|img", name, re.IGNORECASE)):
        raise FastLNError(
            f"{path}: no row has the field 'image', but there is {', '.join(meant)}: rename what names the image "
            "file, or leave such fields out where there is none; for a published dataset give its folder, not a file"
        )
    return False


def images_beside(path: Path) -> list[Path]:
    """Return the folders that image names may be relative to: `images`, if it exists, and the files' own."""
    folder = path if path.is_dir() else path.parent
    return [place for place in (folder / "images", folder) if place.is_dir()]


def image_names(row: dict[str, Any]) -> list[str]:
    """Return the names in the field `image`: one, or a list of at least one.

    Raises:
        BadRowError: There is no name.
    """
    value = row.get("image")
    names = value if isinstance(value, list) else [value]
    if value is None or not names:
        raise BadRowError("field 'image' is missing")
    return [as_text(name, "field 'image'") for name in names]


def recognises(path: Path) -> bool:
    """Whether this is a file of rows, or a folder with such a file for a split."""
    return bool(split_files(path))


def read(path: Path, options: DataOptions) -> Source:
    """Read the questions.

    Args:
        path: What `recognises` accepts.
        options: How to read the data.

    Raises:
        FastLNError: A file cannot be read, or rows are bad.
    """
    rows = RowChecker(images_beside(path), options)

    def parse(row: dict[str, Any], index: int, images: tuple[str, ...]) -> Sample:
        return Sample(
            id=row_id(row, str(index)),
            image=images[0] if images else "",
            question=line(row, "question"),
            answer=answer(row, "answer"),
            closed=closed_label(row),
            views=images[1:],
        )

    return read_splits(path, rows, parse, _COLUMNS)
