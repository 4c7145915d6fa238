"""The files of data: how they are named, opened and shown in messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastln.errors import FastLNError

SUFFIXES = (".json", ".jsonl", ".csv")

SPLIT_STEMS = {"train": ("train",), "validation": ("validation", "val", "validate", "valid"), "test": ("test",)}
"""The names that the file of each split may have, if the layout does not fix them."""

_POINTER = b"version https://git-lfs.github.com/"


class BadRowError(Exception):
    """The error in one row; `RowChecker.read` adds its place."""


def data_name(path: Path) -> str:
    """Return a name for data: the name of its folder, or of its file without the suffix."""
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def shown(value: Any, most: int = 40) -> str:
    """Format a value for a message: as it is written, escaped only where it could not be printed, and shortened."""
    if isinstance(value, str) and value.isprintable():
        written = f'"{value}"'
    else:
        written = json.dumps(value, default=str, ensure_ascii=False)
        # Half of a surrogate pair cannot be printed.
        written = written.encode("utf-8", "backslashreplace").decode()
    return written if len(written) <= most else f"{written[:most]}..."


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


def _first_wrong_byte(file: Path) -> int:
    content = file.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(content)
