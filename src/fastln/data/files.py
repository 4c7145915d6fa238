"""Reads the rows of a text file one by one: a JSON list, JSON Lines or CSV. No file is held in memory in full."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastln.data.json_stream import JsonStream
from fastln.errors import FastLNError

SUFFIXES = (".json", ".jsonl", ".csv")

SPLIT_STEMS = {"train": ("train",), "validation": ("validation", "val", "validate", "valid"), "test": ("test",)}
"""The names that the file of each split may have, if the layout does not fix them."""

_LONGEST_FIELD = 1 << 24
"""The most characters of a CSV field; reports are far shorter. After an unclosed quotation mark, a field never ends."""

_POINTER = b"version https://git-lfs.github.com/"


class BadRowError(Exception):
    """The error in one row; `RowChecker.read` adds its place."""


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
            yield from _csv(file, stream, columns)
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


def data_name(path: Path) -> str:
    """Return a name for data: the name of its folder, or of its file without the suffix."""
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def shown(value: Any) -> str:
    """Format a value for a message, shortened; readable in any script, but with half surrogate pairs escaped."""
    written = json.dumps(value, default=str, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return written if len(written) <= 40 else f"{written[:40]}..."


@contextmanager
def opened(file: Path) -> Iterator[TextIO]:
    """Open a file of UTF-8 text, with or without a byte-order mark.

    Raises:
        FastLNError: The file is missing, cannot be read, is not UTF-8, or is only a Git LFS pointer.
    """
    try:
        refuse_pointer(file)
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            yield stream
    except FileNotFoundError as error:
        raise FastLNError(f"{file}: this file is missing") from error
    except OSError as error:
        raise FastLNError(f"{file}: cannot read this file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FastLNError(f"{file}: byte {_first_wrong_byte(file)}: not UTF-8 text; save it as UTF-8") from error


def refuse_pointer(file: Path) -> None:
    """Refuse a Git LFS pointer, which Git leaves in place of a large file if Git LFS is not installed.

    Raises:
        FastLNError: The file is such a pointer.
        OSError: The file cannot be read.
    """
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise FastLNError(f"{file}: this is a pointer of Git LFS, not the file itself; fetch that: git lfs pull")


def _json_lines(stream: TextIO) -> Iterator[Any]:
    for line in stream:
        if not line.strip():
            yield BadRowError("the line is empty")
            continue
        try:
            yield json.loads(line.rstrip("\r\n"))  # so that an error at a line break is reported at the line's end
        except json.JSONDecodeError as error:
            yield BadRowError(f"column {error.colno}: not valid JSON: {error.msg}")
        except (ValueError, RecursionError) as error:
            yield BadRowError(f"not valid JSON: {error}")


def _csv(file: Path, stream: TextIO, columns: Iterable[str]) -> Iterator[Any]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(stream, strict=True, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise FastLNError(f"{file}: the file is empty; its first line must name the columns")
        if repeated := {name for name in header if header.count(name) > 1}:
            raise FastLNError(f"{file}: the first line names a column twice: {', '.join(sorted(repeated))}")
        check_columns(file, columns, header)
        for fields in reader:
            if not fields:
                yield BadRowError("the line is empty")
            elif len(fields) != len(header):
                yield BadRowError(f"{len(fields)} fields where the first line names {len(header)}")
            else:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise FastLNError(f"{file}: line {reader.line_num}: not valid CSV: {error}") from error


def check_columns(file: Path, needed: Iterable[str], present: Iterable[str]) -> None:
    """Check that a table has the columns that every row needs.

    Raises:
        FastLNError: Some are missing.
    """
    present = list(present)
    if missing := [name for name in needed if name not in present]:
        found = ", ".join(present)
        hint = ""
        if {name.lower() for name in present} >= set(missing):
            hint = "; names of columns are in small letters"
        elif len(present) == 1 and any(mark in found for mark in ";\t"):
            hint = "; commas must stand between columns"
        raise FastLNError(f"{file}: no column {', '.join(missing)}; it has {found}{hint}")


def _first_wrong_byte(file: Path) -> int:
    content = file.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(content)
