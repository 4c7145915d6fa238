"""Checking the rows of a data file, whatever their layout: all bad ones are found before anything is raised."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastln.data.answers import normalise_answer
from fastln.errors import FastLNError

T = TypeVar("T")

_MAX_REPORTED = 10


class BadRowError(Exception):
    """What is wrong with one row; `RowChecker.read` adds where it stands."""


class RowChecker:
    """Reads the rows of one dataset and remembers the bad ones.

    Args:
        images: The folder of the images.

    Attributes:
        paths: The file of each image that a row has named.
    """

    def __init__(self, images: Path) -> None:
        self.paths: dict[str, Path] = {}
        self._images = images
        self._root = images.resolve()
        self._problems: list[str] = []

    def read(self, file: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
        """Parse each row of a JSON list of objects, leaving out those for which `parse` raises `BadRowError`.

        Raises:
            FastLNError: The file cannot be read, is not JSON (with line and column), or is not a list.
        """
        parsed = []
        for index, row in enumerate(_load_list(file)):
            try:
                if not isinstance(row, dict):
                    raise BadRowError(f"an object with named fields is needed, this is {_shown(row)}")
                parsed.append(parse(row))
            except BadRowError as problem:
                name = f" (qid {_shown(row['qid'])})" if isinstance(row, dict) and "qid" in row else ""
                self._problems.append(f"{file}: row {index}{name}: {problem}")
        return parsed

    def image(self, name: str) -> None:
        """Find the file of an image and note it in `paths`.

        Raises:
            BadRowError: There is no such file, or the name leads out of the folder of images, by itself or by a link.
        """
        if name in self.paths:
            return
        try:
            path = (self._root / name).resolve()
            inside = path.is_relative_to(self._root)
            present = path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte
            raise BadRowError(f"image {_shown(name)}: {error}") from error
        if not inside:
            raise BadRowError(f"image {_shown(name)} leads outside the folder {self._images}")
        if not present:
            raise BadRowError(f"image {_shown(name)} is missing in {self._images}")
        self.paths[name] = path

    def raise_problems(self) -> None:
        """Raise one `FastLNError` about all bad rows so far, if there are any."""
        if not self._problems:
            return
        count = len(self._problems)
        shown = self._problems[:_MAX_REPORTED]
        more = [f"... and {count - len(shown)} more"] if count > len(shown) else []
        raise FastLNError("\n  ".join([f"{count} bad row(s), counted from 0:", *shown, *more]))


def text(row: dict[str, Any], field: str) -> str:
    """Give a field that must be a text other than blanks, without the blanks around it.

    Raises:
        BadRowError: The field is missing, no text, no Unicode, or empty.
    """
    value = _value(row, field)
    if not isinstance(value, str):
        raise BadRowError(f"field {field!r} must be a text, not {_shown(value)}")
    if not value.strip():
        raise BadRowError(f"field {field!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell what is no character, and no tokenizer would take it
        raise BadRowError(f"field {field!r} holds half of a surrogate pair: {_shown(value)}") from error
    return value.strip()


def text_or_number(row: dict[str, Any], field: str) -> str:
    """Give a field that may be a number as well as a text, as text.

    Raises:
        BadRowError: The field is missing, of another type, or empty.
    """
    value = _value(row, field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return text(row, field)


def answer(row: dict[str, Any], field: str) -> str:
    """Give a text or number of which something is left when it is normalised, as text.

    Raises:
        BadRowError: The field is missing, of another type, empty, or nothing but punctuation.
    """
    value = text_or_number(row, field)
    if not normalise_answer(value):
        raise BadRowError(f"field {field!r} is {_shown(value)}, of which normalising leaves nothing")
    return value


def choice(row: dict[str, Any], field: str, choices: dict[str, T]) -> T:
    """Give what a field with a fixed set of values stands for.

    Raises:
        BadRowError: The field is missing or has another value; the message lists the valid ones.
    """
    value = text(row, field)
    if value not in choices:
        raise BadRowError(f"field {field!r} is {_shown(value)}, which is none of {', '.join(choices)}")
    return choices[value]


def _value(row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise BadRowError(f"field {field!r} is missing")
    return row[field]


def _load_list(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FastLNError(f"{file}: this file is missing") from error
    except OSError as error:
        raise FastLNError(f"{file}: cannot read this file: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise FastLNError(f"{file}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise FastLNError(f"{file}: byte {error.start}: not UTF-8 text: {error.reason}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise FastLNError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, list):
        raise FastLNError(f"{file}: a JSON list of rows is needed, this is {_shown(content)}")
    return content


def _shown(value: Any) -> str:
    written = json.dumps(value)
    return written if len(written) <= 40 else f"{written[:40]}..."
