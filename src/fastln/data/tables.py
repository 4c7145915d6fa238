"""Reads the rows of a text file one by one: a JSON list, JSON Lines or CSV. No file is held in memory in full.

What spreadsheets and editors leave behind does no harm: byte-order marks, line ends of every system, empty rows, empty
columns without a name, blanks around names, semicolons or tabs between columns.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fastln.data.files import BadRowError, opened
from fastln.data.json_stream import JsonStream
from fastln.errors import FastLNError

EMPTY = object()
"""Stands for a row that holds nothing: `RowChecker.read` passes over it, but counts it in the index of the others."""

_DELIMITERS = ",;\t"
_SEPARATOR = re.compile(r'"?sep=(.)"?')
"""The line that Excel understands, and writes, above the names of the columns."""

_LONGEST_FIELD = 1 << 24
"""The most characters of a CSV field; reports are far shorter. After an unclosed quotation mark, a field never ends."""


def read_rows(file: Path, columns: Iterable[str] = ()) -> Iterator[Any]:
    """Yield the rows of a file, by its suffix; for a line that cannot be parsed, yield a `BadRowError` that says why.

    Args:
        file: JSON Lines (`.jsonl`), CSV (`.csv`), else a JSON list. A `.jsonl` file that begins like a list is read as
            a list, because LLaVA-Med's scripts write such files.
        columns: The columns that a CSV file must have.

    Raises:
        FastLNError: The file cannot be read, is not UTF-8, or does not match its suffix.
    """
    with opened(file) as stream:
        if file.suffix == ".csv":
            yield from _csv(file, stream, tuple(columns))
            return
        content = JsonStream(stream, file)
        if file.suffix == ".jsonl" and content.peek() != "[":
            stream.seek(0)
            yield from _json_lines(stream)
            return
        if content.peek() == "{":
            raise FastLNError(
                f"{file}: this must be a JSON list of rows, and it begins with '{{'; name a file with an object on "
                "each line .jsonl, and give a published dataset by its folder"
            )
        yield from listed(content, file)
        content.end()


def listed(content: JsonStream, where: object) -> Iterator[Any]:
    """Take the values of a list of rows.

    Args:
        content: A JSON text, with the list next.
        where: The file (and the place in it), for the message.

    Raises:
        FastLNError: The next value is not a list.
    """
    if content.peek() != "[":
        raise FastLNError(f"{where}: a JSON list of rows is needed, {beginning(content)}")
    return content.items()


def beginning(content: JsonStream) -> str:
    """Describe how the next part of a JSON text begins, for a message."""
    first = content.peek()
    return f"this begins with {first!r}" if first else "this is empty"


def check_columns(file: Path, needed: Iterable[str], present: Iterable[str]) -> None:
    """Check that a table has the columns that every row needs.

    Raises:
        FastLNError: Some are missing.
    """
    present = list(present)
    if missing := [name for name in needed if name not in present]:
        hint = ""
        if {name.lower() for name in present} >= set(missing):
            hint = "; names of columns are in small letters"
        elif len(present) == 1:
            hint = "; commas, semicolons or tabs must stand between columns"
        raise FastLNError(f"{file}: no column {', '.join(missing)}; it has {', '.join(present)}{hint}")


def _json_lines(stream: TextIO) -> Iterator[Any]:
    for line in stream:
        if not line.strip():
            yield EMPTY
            continue
        try:
            yield json.loads(line.rstrip("\r\n"))  # so that an error at a line break is reported at the line's end
        except json.JSONDecodeError as error:
            yield BadRowError(f"column {error.colno}: not valid JSON: {error.msg}")
        except (ValueError, RecursionError) as error:
            yield BadRowError(f"not valid JSON: {error}")


def _csv(file: Path, stream: TextIO, columns: tuple[str, ...]) -> Iterator[Any]:
    csv.field_size_limit(_LONGEST_FIELD)
    assert isinstance(stream, io.TextIOWrapper)
    stream.reconfigure(newline="")  # csv knows the line ends of every system
    lines, n_before = iter(stream), 0
    first, delimiter = "", ""
    for first in lines:
        if found := _SEPARATOR.fullmatch(first.strip()):
            delimiter = found[1]
        elif first.strip(f" {_DELIMITERS}\r\n\ufeff"):
            break
        n_before += 1
    reader = csv.reader(
        itertools.chain([first], lines),
        delimiter=delimiter or _delimiter(first, columns),
        strict=True,
        skipinitialspace=True,
    )
    try:
        header = _header(file, next(reader, []))
        check_columns(file, columns, filter(None, header))
        for fields in reader:
            yield _row(header, fields, columns) if any(map(str.strip, fields)) else EMPTY
    except csv.Error as error:
        raise FastLNError(f"{file}: line {n_before + reader.line_num}: not valid CSV: {error}") from error


def _delimiter(line: str, columns: tuple[str, ...]) -> str:
    """Return the mark that gives the needed columns when the first line is cut at it; a comma if none does."""
    for mark in _DELIMITERS:
        if {name.strip() for name in next(csv.reader([line], delimiter=mark, skipinitialspace=True))} >= set(columns):
            return mark
    return ","


def _header(file: Path, fields: list[str]) -> list[str]:
    """Return the names of the columns, up to the last that has one.

    Raises:
        FastLNError: There is none, or one comes twice.
    """
    names = [name.strip("\ufeff \t\r\n") for name in fields]
    while names and not names[-1]:
        del names[-1]
    if not names:
        raise FastLNError(f"{file}: the file is empty; its first line must name the columns")
    if any("\0" in name for name in names):
        raise FastLNError(f"{file}: the first line holds zero bytes, so this is no UTF-8 text; save it as UTF-8")
    if repeated := {name for name in names if name and names.count(name) > 1}:
        raise FastLNError(f"{file}: the first line names a column twice: {', '.join(sorted(repeated))}")
    return names


def _row(names: list[str], fields: list[str], columns: tuple[str, ...]) -> dict[str, str] | BadRowError:
    """Return a row by its columns' names, without columns that have none.

    Empty fields may follow the last named column. Excel also leaves out empty fields at the end of a row.
    """
    while len(fields) > len(names) and not fields[-1].strip():
        del fields[-1]
    if len(fields) > len(names) or not set(columns) <= set(names[: len(fields)]):
        return BadRowError(f"{len(fields)} fields where the first line names {len(names)}")
    return {name: field for name, field in zip(names, fields, strict=False) if name}
