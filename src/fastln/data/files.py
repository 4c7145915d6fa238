"""The rows of a text file, one after the other: a JSON list, JSON Lines, CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastln.errors import FastLNError

SUFFIXES = (".json", ".jsonl", ".csv")

_LONGEST_FIELD = 1 << 24
"""Characters of a CSV field; a report is far shorter, and an unclosed quotation mark swallows the rest of the file."""


class BadRowError(Exception):
    """What is wrong with one row; `RowChecker.read` adds where it stands."""


def read_rows(file: Path) -> Iterator[Any]:
    """Give the rows of a file by its suffix; a line that cannot be parsed comes as the `BadRowError` that says why.

    Raises:
        FastLNError: The file cannot be read, is not UTF-8, or is of another kind than its suffix says.
    """
    if file.suffix == ".jsonl":
        return _json_lines(file)
    if file.suffix == ".csv":
        return _csv(file)
    return iter(json_list(load_json(file), file))


def load_json(file: Path) -> Any:
    """Load a JSON file.

    Raises:
        FastLNError: The file cannot be read or is not JSON (with line and column).
    """
    text = "".join(_lines(file))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FastLNError(f"{file}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise FastLNError(f"{file}: not valid JSON: {error}") from error


def json_list(content: Any, where: object) -> list[Any]:
    """Check that a piece of a JSON file is a list.

    Args:
        content: The piece.
        where: The file (and the place in it), for the message.

    Raises:
        FastLNError: It is not.
    """
    if not isinstance(content, list):
        raise FastLNError(f"{where}: a JSON list of rows is needed, this is {shown(content)}")
    return content


def shown(value: Any) -> str:
    """Write a value for a message, shortened."""
    written = json.dumps(value, default=str)
    return written if len(written) <= 40 else f"{written[:40]}..."


def _json_lines(file: Path) -> Iterator[Any]:
    for line in _lines(file):
        if not line.strip():
            yield BadRowError("the line is empty")
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield BadRowError(f"column {error.colno}: not valid JSON: {error.msg}")
        except (ValueError, RecursionError) as error:
            yield BadRowError(f"not valid JSON: {error}")


def _csv(file: Path) -> Iterator[Any]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(_lines(file), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise FastLNError(f"{file}: the file is empty; its first line must name the columns")
        if repeated := {name for name in header if header.count(name) > 1}:
            raise FastLNError(f"{file}: the first line names a column twice: {', '.join(sorted(repeated))}")
        for fields in reader:
            if len(fields) != len(header):
                yield BadRowError(f"{len(fields)} fields where the first line names {len(header)}")
            else:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise FastLNError(f"{file}: line {reader.line_num}: not valid CSV: {error}") from error


def _lines(file: Path) -> Iterator[str]:
    start = 0
    try:
        with file.open("rb") as stream:
            for line in stream:
                yield line.decode("utf-8" if start else "utf-8-sig")
                start += len(line)
    except FileNotFoundError as error:
        raise FastLNError(f"{file}: this file is missing") from error
    except OSError as error:
        raise FastLNError(f"{file}: cannot read this file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FastLNError(f"{file}: byte {start + error.start}: not UTF-8 text: {error.reason}") from error
