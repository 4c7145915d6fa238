"""The reader of PathVQA (He et al., 2020), as the hub has it and as its authors do.

*Hub*: Parquet files `train-*.parquet`, `validation-*.parquet` and `test-*.parquet`, in the folder or in `data`, with
the columns `image` (`bytes`, `path`), `question` and `answer`. An image stands in the row of each of its questions;
equal bytes are one image here, so that its questions share it. pyarrow reads the files
(`pip install 'fastln[parquet]'`). Other data that the hub has in these columns is read the same way, under the name of
its folder.

*Original*: `qas/train/train_qa.pkl` (and `val`, `test`) beside `images/train/*.jpg`. A pickle runs whatever code its
author put into it, so none is read: a message says how to convert the files to JSON, `qas/train/train_qa.json`, a list
of rows with `image`, `question` and `answer`.

Neither says which questions are closed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastln.data.dataset import Sample, Source
from fastln.data.files import BadRowError, read_rows
from fastln.data.images import check_image, read_image
from fastln.data.options import DataOptions
from fastln.data.rows import RowChecker, answer, image_folder, line, text
from fastln.errors import FastLNError

LAYOUT = (
    "train-*.parquet, validation-*.parquet, test-*.parquet, in data/ or directly; or qas/train/train_qa.json, images/"
)

_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_COLUMNS = ("image", "question", "answer")
_ROWS_AT_A_TIME = 32
"""Rows whose images are held at once while they are checked."""


def recognises(folder: Path) -> bool:
    """Tell whether a folder holds Parquet files with the names of splits, or the original's folder of questions."""
    return any(_parquet_files(folder).values()) or (folder / "qas").is_dir()


def read(folder: Path, options: DataOptions) -> Source:
    """Read either layout.

    Args:
        folder: A folder that `recognises` accepts.
        options: Whether to skip bad rows.

    Raises:
        FastLNError: Files or the image folder are missing, pickled, or no Parquet; pyarrow is missing; or rows are bad.
    """
    files = _parquet_files(folder)
    if any(files.values()):
        return _read_hub(folder, {split: names for split, names in files.items() if names}, options)
    return _read_original(folder, options)


def _parquet_files(folder: Path) -> dict[str, list[Path]]:
    for place in (folder, folder / "data"):
        files = {split: sorted(place.glob(f"{split}-*.parquet")) for split in _SPLITS}
        if any(files.values()):
            return files
    return {}


def _read_original(folder: Path, options: DataOptions) -> Source:
    files = {split: folder / "qas" / name / f"{name}_qa.json" for split, name in _SPLITS.items()}
    for file in files.values():
        pickled = file.with_suffix(".pkl")
        if pickled.is_file() and not file.is_file():
            raise FastLNError(
                f"{pickled}: pickled files are not read, for they can run any code. If you trust this one, convert it: "
                f"python -c \"import json, pickle; json.dump(pickle.load(open('{pickled}', 'rb')), "
                f"open('{file}', 'w'))\""
            )
    rows = RowChecker(image_folder(folder, "images"), skip=options.skip_bad_rows)

    def parse(name: str, row: dict[str, Any], index: int) -> Sample:
        image = rows.image(f"{name}/{text(row, 'image')}.jpg")
        return Sample(f"{name}-{index}", image, line(row, "question"), answer(row, "answer"), closed=None)

    splits = {
        split: rows.read(file, read_rows(file), functools.partial(parse, _SPLITS[split]))
        for split, file in files.items()
    }
    return rows.source("path-vqa", splits)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an image's bytes are: a row of a row group of a file."""

    file: Path
    group: int
    row: int


class _HubImages:
    """The distinct images of some files, each checked once and found again by the place where it stands first."""

    def __init__(self) -> None:
        self.places: dict[str, _Place] = {}
        self._keys: dict[bytes, str] = {}
        self._problems: dict[bytes, str] = {}

    def add(self, content: object, place: _Place, key: str) -> str:
        """Give the key of the image in a row, `key` where it is a new one.

        Raises:
            BadRowError: There is none, or none that can be read.
        """
        data = content.get("bytes") if isinstance(content, dict) else None
        if not data:
            raise BadRowError("field 'image' holds no bytes")
        digest = hashlib.sha256(data).digest()
        if digest in self._problems:
            raise BadRowError(self._problems[digest])
        if digest not in self._keys:
            try:
                check_image(data, "field 'image'")
            except FastLNError as error:
                self._problems[digest] = str(error)
                raise BadRowError(str(error)) from error
            self._keys[digest] = key
            self.places[key] = place
        return self._keys[digest]


def _read_hub(folder: Path, files: dict[str, list[Path]], options: DataOptions) -> Source:
    rows = RowChecker(folder, skip=options.skip_bad_rows)
    images = _HubImages()

    def parse(file: Path, row: dict[str, Any], index: int) -> Sample:
        key = f"{file.stem}/{index:06d}"
        image = images.add(row["image"], row["place"], key)
        return Sample(key, image, line(row, "question"), answer(row, "answer"), closed=None)

    splits: dict[str, list[Sample]] = {}
    for split, names in files.items():
        splits[split] = []
        for file in names:
            splits[split] += rows.read(file, _parquet_rows(file), functools.partial(parse, file))
    return rows.source(folder.resolve().name, splits, functools.partial(_hub_image, images.places))


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Give the rows, each with its `place`, holding few of them at a time."""
    with _parquet(file) as content:
        if missing := [name for name in _COLUMNS if name not in content.schema_arrow.names]:
            raise FastLNError(f"{file}: no column {', '.join(missing)}; it has {', '.join(content.schema_arrow.names)}")
        for group in range(content.num_row_groups):
            number = 0
            for batch in content.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=list(_COLUMNS)):
                for row in batch.to_pylist():
                    yield row | {"place": _Place(file, group, number)}
                    number += 1


def _hub_image(places: dict[str, _Place], key: str) -> Image.Image:
    if key not in places:
        raise FastLNError(f"no question of this data is about an image named {key!r}")
    place = places[key]
    return read_image(_image_column(place.file, place.group)[place.row].as_py()["bytes"], key)


@functools.lru_cache(maxsize=1)
def _image_column(file: Path, group: int) -> Any:
    with _parquet(file) as content:
        return content.read_row_group(group, columns=["image"]).column("image")


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    """Open a file, and turn what pyarrow raises into one sentence that names it."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise FastLNError(f"{file}: for Parquet pyarrow is needed: pip install 'fastln[parquet]'") from error
    try:
        with ParquetFile(file) as content:
            yield content
    except (ArrowException, OSError) as error:
        raise FastLNError(f"{file}: cannot read this Parquet file: {error}") from error
