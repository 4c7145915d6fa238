"""The reader of Parquet files in the hub's form: columns `image` (`bytes`, `path`), `question` and `answer`.

The files of a split are in the folder or in `data`: `train-00000-of-00002-HASH.parquet` and so on, `train.parquet`, or
a folder `train` of files; likewise for `validation` (or `val`) and `test`. PathVQA, VQA-RAD and SLAKE are published in
this form; the data takes its folder's name. A single file is all training data. Optional columns: `id` (or `qid`,
`question_id`) and `answer_type`.

The rows of all questions on an image repeat the image. Equal bytes count as one image, so that its questions share it.
Images are not kept in memory: the reader keeps the first place of each, and reads it from there on request. That reads
its whole row group; the hub's have 100 rows.
pyarrow reads the files (`pip install 'fastln[parquet]'`).
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastln.data.dataset import Sample, Source
from fastln.data.files import SPLIT_STEMS, BadRowError, data_name, refuse_pointer
from fastln.data.images import ImageStat, check_image, read_image
from fastln.data.remarks import Remarks
from fastln.data.rows import ID_FIELDS, RowChecker, answer, closed_label, is_blank, line, row_id
from fastln.data.tables import EMPTY, check_columns
from fastln.errors import FastLNError
from fastln.reading import DataOptions

LAYOUT = "files .parquet of image, question, answer: train-*, validation-*, test-*, in data/ or directly; or one"

_COLUMNS = ("image", "question", "answer")
_OPTIONAL_COLUMNS = (*ID_FIELDS, "answer_type")
_ROWS_AT_A_TIME = 32
"""The number of rows whose images are held at once while they are checked."""

_BUFFER = 1 << 20
"""The bytes to read ahead; without it, pyarrow reads a whole row group's column at once."""

_READING = threading.Lock()
"""Held while a row group is read: other threads that need the same one wait for it, and do not read it, too."""


def recognises(path: Path) -> bool:
    """Whether this is a Parquet file, or a folder that holds some with the names of splits."""
    return bool(_split_files(path))


def read(path: Path, options: DataOptions) -> Source:
    """Read the questions.

    Args:
        path: What `recognises` accepts.
        options: How to read the data.

    Raises:
        FastLNError: There are no files, one is not Parquet or lacks a column; pyarrow is missing; or rows are bad.
    """
    files = _split_files(path)
    if not files:
        raise FastLNError(f"{path}: no Parquet files; looked for train-*.parquet, train.parquet and train/*.parquet")
    rows = RowChecker([], options)
    images = _Images(rows.remarks)

    def parse(name: str, row: dict[str, Any], index: int) -> Sample:
        key = f"{name}/{index:06d}"
        return Sample(
            id=row_id(row, key),
            image=images.add(row["image"], row["place"], key),
            question=line(row, "question"),
            answer=answer(row, "answer"),
            closed=closed_label(row),
        )

    splits: dict[str, list[Sample]] = {}
    for split, names in files.items():
        splits[split] = []
        for file in names:
            splits[split] += rows.read(file, _rows(file), functools.partial(parse, _name(path, file)))
    return rows.source(data_name(path), splits, (functools.partial(_image, images.places), images.stats))


def _split_files(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        return {"train": [path]} if path.suffix == ".parquet" else {}
    for place in (path, path / "data"):
        files = {}
        for split, stems in SPLIT_STEMS.items():
            patterns = [f"{stem}{rest}.parquet" for stem in stems for rest in ("-*", "", "/*")]
            if found := sorted(file for pattern in patterns for file in place.glob(pattern)):
                files[split] = found
        if files:
            return files
    return {}


def _name(path: Path, file: Path) -> str:
    """Return a unique name for a file, because files in the splits' folders may share names."""
    return file.relative_to(path).with_suffix("").as_posix().removeprefix("data/") if path.is_dir() else file.stem


class _Place(NamedTuple):
    """The place of an image's bytes: a row of a row group of a file."""

    file: Path
    group: int
    row: int


class _Images:
    """The distinct images of some files, each checked once and read from its first place."""

    def __init__(self, remarks: Remarks) -> None:
        self._remarks = remarks
        self.places: dict[str, _Place] = {}
        self.stats: dict[str, ImageStat] = {}
        self._keys: dict[bytes, str] = {}
        self._problems: dict[bytes, str] = {}

    def add(self, content: object, place: _Place, key: str) -> str:
        """Return the key of the image in a row; a new image gets `key`.

        Raises:
            BadRowError: There is no image, or it cannot be read.
        """
        data = content.get("bytes") if isinstance(content, dict) else None
        if not data:
            raise BadRowError("field 'image' holds no bytes")
        digest = hashlib.sha256(data).digest()
        if digest in self._problems:
            raise BadRowError(self._problems[digest])
        if digest not in self._keys:
            try:
                self.stats[key] = check_image(data, f"the image of {key}", remarks=self._remarks)
            except FastLNError as error:
                self._problems[digest] = str(error)
                raise BadRowError(str(error)) from error
            self._keys[digest] = key
            self.places[key] = place
        return self._keys[digest]


def _rows(file: Path) -> Iterator[Any]:
    """Yield the rows, each with its `place`, or `EMPTY`, with only few in memory at a time."""
    with _opened(file) as content:
        present = content.schema_arrow.names
        check_columns(file, _COLUMNS, present)
        columns = [*_COLUMNS, *(name for name in _OPTIONAL_COLUMNS if name in present)]
        for group in range(content.num_row_groups):
            number = 0
            for batch in content.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    yield EMPTY if is_blank(row) else row | {"place": _Place(file, group, number)}
                    number += 1


def _image(places: dict[str, _Place], key: str) -> Image.Image:
    if key not in places:
        raise FastLNError(f"no question of this data is about an image named {key!r}")
    place = places[key]
    with _READING:  # nothing outside holds the row group, so that only one is in memory
        content = _image_column(place.file, place.group)[place.row].as_py()["bytes"]
    return read_image(content, key)


@functools.lru_cache(maxsize=1)
def _image_column(file: Path, group: int) -> Any:
    with _opened(file) as content:
        return content.read_row_group(group, columns=["image"]).column("image")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file, and turn pyarrow's errors into a FastLNError that names it."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise FastLNError(f"{file}: for Parquet pyarrow is needed: pip install 'fastln[parquet]'") from error
    try:
        refuse_pointer(file)
        with ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as content:
            yield content
    except (ArrowException, OSError) as error:
        raise FastLNError(f"{file}: cannot read this Parquet file: {error}") from error
