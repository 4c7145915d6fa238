"""The reader of chest X-ray reports as R2Gen (Chen et al., EMNLP 2020) has IU X-Ray: `annotation.json` and `images/`.

The file is an object with the lists `train`, `val` and `test`; each study in them has an `id`, a `report` and the
`image_path` of its views, two in IU X-Ray (`CXR2384_IM-0942/0.png` and `1.png`). There is no question: the report is to
be written. MIMIC-CXR in R2Gen's format is read the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastln.data.dataset import Sample, Source
from fastln.data.files import BadRowError, json_list, load_json, shown
from fastln.data.options import DataOptions
from fastln.data.rows import RowChecker, as_text, image_folder, line, text_or_number
from fastln.errors import FastLNError

LAYOUT = "annotation.json with the lists train, val and test; images/STUDY/0.png, 1.png"

_FILE = "annotation.json"
_LISTS = {"train": "train", "validation": "val", "test": "test"}


def recognises(folder: Path) -> bool:
    """Tell whether a folder holds R2Gen's file."""
    return (folder / _FILE).is_file()


def read(folder: Path, options: DataOptions) -> Source:
    """Read the reports with all views of each study.

    Args:
        folder: A folder that `recognises` accepts.
        options: Whether to skip bad rows.

    Raises:
        FastLNError: The file or the image folder is missing; the file is no object of three lists; or rows are bad.
    """
    rows = RowChecker(image_folder(folder, "images"), skip=options.skip_bad_rows)
    file = folder / _FILE
    content = load_json(file)
    if not isinstance(content, dict):
        raise FastLNError(f"{file}: an object with the lists train, val and test is needed, this is {shown(content)}")

    def parse(row: dict[str, Any], index: int) -> Sample:
        image, *views = [rows.image(name) for name in _paths(row)]
        return Sample(
            id=text_or_number(row, "id"),
            image=image,
            question="",
            answer=line(row, "report"),
            closed=None,
            views=tuple(views),
        )

    splits = {}
    for split, name in _LISTS.items():
        where = f"{file}: {name}"
        splits[split] = rows.read(where, json_list(content.get(name), where), parse)
    return rows.source("iu-xray", splits)


def _paths(row: dict[str, Any]) -> list[str]:
    paths = row.get("image_path")
    if not isinstance(paths, list) or not paths:
        raise BadRowError(f"field 'image_path' must be a list of at least one image, not {shown(paths)}")
    return [as_text(path, "an image of field 'image_path'") for path in paths]
