"""The reader of chest X-ray reports, IU X-Ray in R2Gen's form (Chen et al., EMNLP 2020): `annotation.json`, `images/`.

The file is an object with the lists `train`, `val` and `test`; each study in them has an `id`, a `report` and the
`image_path` of its views, two in IU X-Ray (`CXR2384_IM-0942/0.png` and `1.png`). There is no question: the model is to
write the report. MIMIC-CXR in R2Gen's format is read the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastln.data.dataset import Sample, Source
from fastln.data.files import BadRowError, opened, shown
from fastln.data.json_stream import JsonStream
from fastln.data.rows import RowChecker, as_text, image_folder, line, text_or_number
from fastln.data.tables import beginning, listed
from fastln.errors import FastLNError
from fastln.reading import DataOptions

LAYOUT = "annotation.json with the lists train, val and test; images/STUDY/0.png, 1.png"

_FILE = "annotation.json"
_LISTS = {"train": "train", "validation": "val", "test": "test"}


def recognises(folder: Path) -> bool:
    """Whether a folder holds R2Gen's file."""
    return (folder / _FILE).is_file()


def read(folder: Path, options: DataOptions) -> Source:
    """Read the reports with all views of each study.

    Args:
        folder: A folder that `recognises` accepts.
        options: How to read the data.

    Raises:
        FastLNError: The file or the image folder is missing; the file is not an object of three lists; or rows are bad.
    """
    rows = RowChecker([image_folder(folder, "images")], options)
    file = folder / _FILE

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

    found = {}
    with opened(file) as stream:
        content = JsonStream(stream, file)
        if content.peek() != "{":
            raise FastLNError(f"{file}: an object with the lists train, val and test is needed, {beginning(content)}")
        for name in content.names():
            where = f"{file}: {name}"
            if name in _LISTS.values():
                found[name] = rows.read(where, listed(content, where), parse)
            else:
                content.value()
        content.end()
    if missing := [name for name in _LISTS.values() if name not in found]:
        raise FastLNError(f"{file}: no list {', '.join(missing)}; R2Gen's file has train, val and test")
    return rows.source("iu-xray", {split: found[name] for split, name in _LISTS.items()})


def _paths(row: dict[str, Any]) -> list[str]:
    paths = row.get("image_path")
    if not isinstance(paths, list) or not paths:
        raise BadRowError(f"field 'image_path' must be a list of at least one image, not {shown(paths)}")
    return [as_text(path, "an image of field 'image_path'") for path in paths]
