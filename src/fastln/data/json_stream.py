"""Parses a JSON text value by value, so that a list of any length is never in memory in full."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fastln.errors import FastLNError

_CHUNK = 1 << 18
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\n\r]*")
_AFTER_A_VALUE = frozenset(",]}")


class JsonStream:
    """Takes the parts of a JSON text one after the other; only the current value and what was read ahead are held
    (of a value that is no JSON all that follows, for it might have been a long one).

    Args:
        stream: The text.
        file: What messages call it.

    Every method raises a `FastLNError` with line and column where the text is not JSON.
    """

    def __init__(self, stream: TextIO, file: Path) -> None:
        self._stream = stream
        self._file = file
        self._text = ""
        self._at = 0
        self._lines = 0
        self._column = 0
        """Lines, and characters of the last of them, that were taken before `_text`."""

    def peek(self) -> str:
        """Return the next character that is not blank, empty at the end."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read_more():
                return self._text[self._at : self._at + 1]

    def value(self) -> Any:
        """Take a whole value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:  # invalid, or not read completely yet
                if not self._read_more():
                    raise self._error(error.msg, error.pos) from error
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise self._error(str(error), self._at) from error
            # A number may continue in unread text, so a value has ended only if the next mark follows.
            after = _BLANKS.match(self._text, end).end()  # type: ignore[union-attr]
            if self._text[after : after + 1] in _AFTER_A_VALUE or not self._read_more():
                self._at = end
                return value

    def items(self) -> Iterator[Any]:
        """Take the values of a list."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self.value()
            if self._take(",", "]") == "]":
                return

    def names(self) -> Iterator[str]:
        """Yield the names of an object's fields; the caller takes each field's value before the next name."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                raise self._error("Expecting property name enclosed in double quotes", self._at)
            name, self._at = self._name()
            self._take(":")
            yield name
            if self._take(",", "}") == "}":
                return

    def end(self) -> None:
        """Check that nothing follows."""
        if self.peek():
            raise self._error("Extra data", self._at)

    def _name(self) -> tuple[str, int]:
        while True:
            try:
                return _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._read_more():
                    raise self._error(error.msg, error.pos) from error

    def _take(self, *expected: str) -> str:
        found = self.peek()
        if found not in expected:
            raise self._error(f"Expecting {' or '.join(map(repr, expected))}", self._at)
        self._at += 1
        return found

    def _read_more(self) -> bool:
        # Twice as much as before, so that a long value is not parsed again from its start too often.
        more = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        if more:
            self._lines, self._column = self._place(self._at)
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _place(self, position: int) -> tuple[int, int]:
        lines = self._text.count("\n", 0, position)
        if not lines:
            return self._lines, self._column + position
        return self._lines + lines, position - self._text.rindex("\n", 0, position) - 1

    def _error(self, message: str, position: int) -> FastLNError:
        lines, column = self._place(position)
        return FastLNError(f"{self._file}: line {lines + 1}, column {column + 1}: not valid JSON: {message}")
