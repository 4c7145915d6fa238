"""Checking the rows of data files, whatever their layout: all bad ones are found before anything is raised."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from fastln.data.answers import normalise_answer
from fastln.data.dataset import Sample, Source
from fastln.data.files import BadRowError, shown
from fastln.data.images import check_image, read_image
from fastln.errors import FastLNError

T = TypeVar("T")

_MAX_REPORTED = 10
_NAMES = ("qid", "id")

logger = logging.getLogger(__name__)


class RowChecker:
    """Reads the rows of one dataset and remembers the bad ones.

    Args:
        images: The folder of the images.
        skip: Leave bad rows out, with a count in the log, rather than refuse the data.

    Attributes:
        paths: The file of each image that a row has named.
    """

    def __init__(self, images: Path, *, skip: bool = False) -> None:
        self.paths: dict[str, Path] = {}
        self._images = images
        self._root = images.resolve()
        self._skip = skip
        self._n_rows = 0
        self._problems: list[str] = []
        self._bad_images: dict[str, str] = {}

    def read(self, where: object, rows: Iterable[Any], parse: Callable[[dict[str, Any], int], T]) -> list[T]:
        """Parse each row, leaving out those for which `parse` raises `BadRowError`.

        Args:
            where: The file (and the place in it), for the messages.
            rows: What should be objects with named fields; one that is a `BadRowError` says what is wrong with it.
            parse: Makes something of a row and its index.
        """
        parsed = []
        for index, row in enumerate(rows):
            self._n_rows += 1
            try:
                if isinstance(row, BadRowError):
                    raise row
                if not isinstance(row, dict):
                    raise BadRowError(f"an object with named fields is needed, this is {shown(row)}")
                parsed.append(parse(row, index))
            except BadRowError as problem:
                names = [f" ({name} {shown(row[name])})" for name in _NAMES if isinstance(row, dict) and name in row]
                self._problems.append(f"{where}: row {index}{''.join(names[:1])}: {problem}")
        return parsed

    def image(self, name: str) -> str:
        """Find the file of an image, check it and note it in `paths`.

        Returns:
            The name, which is the image's key.

        Raises:
            BadRowError: There is no such file, it is no image that can be read, or the name leads out of the folder of
                images, by itself or by a link.
        """
        if name in self._bad_images:
            raise BadRowError(self._bad_images[name])
        if name not in self.paths:
            try:
                self.paths[name] = self._find(name)
            except BadRowError as problem:
                self._bad_images[name] = str(problem)
                raise
        return name

    def _find(self, name: str) -> Path:
        try:
            path = (self._root / name).resolve()
            inside = path.is_relative_to(self._root)
            present = path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte
            raise BadRowError(f"image {shown(name)}: {error}") from error
        if not inside:
            raise BadRowError(f"image {shown(name)} leads outside the folder {self._images}")
        if not present:
            raise BadRowError(f"image {shown(name)} is missing in {self._images}")
        try:
            check_image(path)
        except FastLNError as error:
            raise BadRowError(f"image {shown(name)}: {error}") from error
        return path

    def finish(self) -> None:
        """Raise one `FastLNError` about all bad rows so far, if there are any; or log them, where they are skipped."""
        if not self._problems:
            return
        count = len(self._problems)
        reported = self._problems[:_MAX_REPORTED]
        more = [f"... and {count - len(reported)} more"] if count > len(reported) else []
        lines = "\n  ".join([*reported, *more])
        if not self._skip:
            raise FastLNError(f"{count} bad row(s), counted from 0:\n  {lines}")
        logger.warning("skipped %d bad row(s) of %d, counted from 0:\n  %s", count, self._n_rows, lines)

    def source(
        self, name: str, splits: Mapping[str, list[Sample]], image: Callable[[str], Image.Image] | None = None
    ) -> Source:
        """Finish, and make the source of the data.

        Args:
            name: What the data is called.
            splits: The samples by split.
            image: Gives an image by its key; by default the images are the files in `paths`.

        Raises:
            FastLNError: There were bad rows, and they are not skipped.
        """
        self.finish()
        logger.info("%s: %s", name, ", ".join(f"{split} {len(samples):,}" for split, samples in splits.items()))
        return Source(name, synthetic=False, splits=splits, image=image or functools.partial(_image, self.paths))


def _image(paths: dict[str, Path], key: str) -> Image.Image:
    if key not in paths:
        raise FastLNError(f"no question of this data is about an image named {key!r}")
    return read_image(paths[key])


def image_folder(folder: Path, *names: str) -> Path:
    """Give the first of some folders that is there.

    Raises:
        FastLNError: None is.
    """
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise FastLNError(f"{folder}: no folder of images; looked for {' and '.join(map(repr, names))}")


def text(row: dict[str, Any], field: str) -> str:
    """Give a field that must be a text other than blanks, without the blanks around it.

    Raises:
        BadRowError: The field is missing, no text, no Unicode, or empty.
    """
    return as_text(_value(row, field), f"field {field!r}")


def as_text(value: Any, what: str) -> str:
    """Check what must be a text other than blanks, and give it without the blanks around it.

    Args:
        value: What the data holds.
        what: How a message names it.

    Raises:
        BadRowError: It is no text, no Unicode, or empty.
    """
    if not isinstance(value, str):
        raise BadRowError(f"{what} must be a text, not {shown(value)}")
    if not value.strip():
        raise BadRowError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell what is no character, and no tokenizer would take it
        raise BadRowError(f"{what} holds half of a surrogate pair: {shown(value)}") from error
    return value.strip()


def line(row: dict[str, Any], field: str) -> str:
    """Give a text with single blanks for its runs of white space.

    Raises:
        BadRowError: As for `text`.
    """
    return " ".join(text(row, field).split())


def text_or_number(row: dict[str, Any], field: str) -> str:
    """Give a field that may be a number as well as a text, as text.

    Raises:
        BadRowError: The field is missing, of another type, or empty.
    """
    value = _value(row, field)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return text(row, field)


def answer(row: dict[str, Any], field: str) -> str:
    """Give a text or number of which something is left when it is normalised, as text.

    Raises:
        BadRowError: The field is missing, of another type, empty, or nothing but punctuation.
    """
    value = text_or_number(row, field)
    if not normalise_answer(value):
        raise BadRowError(f"field {field!r} is {shown(value)}, of which normalising leaves nothing")
    return value


def choice(row: dict[str, Any], field: str, choices: dict[str, T]) -> T:
    """Give what a field with a fixed set of values stands for.

    Raises:
        BadRowError: The field is missing or has another value; the message lists the valid ones.
    """
    value = text(row, field)
    if value not in choices:
        raise BadRowError(f"field {field!r} is {shown(value)}, which is none of {', '.join(choices)}")
    return choices[value]


ANSWER_TYPES = {"CLOSED": True, "OPEN": False}
"""What the field `answer_type` of VQA-RAD and its kin says."""


def closed_label(row: dict[str, Any]) -> bool | None:
    """Give what an optional field `answer_type` says: whether the question is closed, None without the field.

    Raises:
        BadRowError: It has another value than CLOSED or OPEN.
    """
    return choice(row, "answer_type", ANSWER_TYPES) if row.get("answer_type") else None


def _value(row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise BadRowError(f"field {field!r} is missing")
    return row[field]
