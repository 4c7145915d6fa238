"""Checks the rows of data files in any layout; finds all bad rows before it raises an error."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from fastln.data.answers import normalise_answer
from fastln.data.dataset import Sample, Source
from fastln.data.files import BadRowError, shown
from fastln.data.image_files import LONGEST_NAME, ImageFinder, located
from fastln.data.images import ImageStat, check_image, read_image
from fastln.data.remarks import Remark, Remarks
from fastln.data.repeats import drop_repeats
from fastln.data.tables import EMPTY
from fastln.errors import FastLNError, listing
from fastln.reading import DataOptions

T = TypeVar("T")

ID_FIELDS = ("id", "qid", "question_id")
"""The fields that may name a row."""

logger = logging.getLogger(__name__)


class RowChecker:
    """Reads the rows of one dataset and remembers the bad ones.

    Args:
        folders: The folders to search for images, in this order.
        options: Whether to skip bad rows, and to keep what several splits have.
    """

    def __init__(self, folders: Sequence[Path], options: DataOptions) -> None:
        self.remarks = Remarks()
        self._finder = ImageFinder(folders)
        self._options = options
        self._n_rows = 0
        self._problems: list[str] = []
        self._keys: dict[str, str] = {}
        self._found: dict[str, Path] = {}
        self._stats: dict[str, ImageStat] = {}
        self._bad_images: dict[str, str] = {}
        self._alike: dict[ImageStat, str] = {}
        self._digests: dict[str, str] = {}
        self._by_digest: dict[tuple[ImageStat, str], str] = {}
        self._copies: dict[str, str] = {}

    def read(self, where: object, rows: Iterable[Any], parse: Callable[[dict[str, Any], int], T]) -> list[T]:
        """Parse each row, leaving out those for which `parse` raises `BadRowError`.

        Rows without any content are left out too. Their number is logged, except of those at the end.

        Args:
            where: The file (and the place in it), for the messages.
            rows: Should be objects with named fields; a `BadRowError` in place of a row says what is wrong with it.
            parse: Makes the result from a row and its index. Empty rows count in the index, so that it is that of the
                file.
        """
        parsed = []
        n_empty = n_last = 0
        for index, row in enumerate(rows):
            if _is_empty(row):
                n_last += 1
                continue
            n_empty, n_last = n_empty + n_last, 0
            self._n_rows += 1
            try:
                if isinstance(row, BadRowError):
                    raise row
                if not isinstance(row, dict):
                    raise BadRowError(f"an object with named fields is needed, this is {shown(row)}")
                parsed.append(parse(row, index))
            except BadRowError as problem:
                names = [f" ({name} {shown(row[name])})" for name in ID_FIELDS if isinstance(row, dict) and name in row]
                self._problems.append(f"{where}: row {index}{''.join(names[:1])}: {problem}")
        if n_empty:
            logger.info("%s: left out %d empty row(s)", where, n_empty)
        return parsed

    def image(self, name: str) -> str:
        """Find the file of an image and check it, once.

        Returns:
            The image's key: the file's own name, whatever the spelling in the row.

        Raises:
            BadRowError: There is no such file, it is not a readable image, or the name leads out of the folder of
                images, directly or through a link.
        """
        if name in self._bad_images:
            raise BadRowError(self._bad_images[name])
        if name not in self._keys:
            try:
                self._keys[name] = self._checked(name)
            except BadRowError as problem:
                self._bad_images[name] = str(problem)
                raise
        return self._keys[name]

    def _checked(self, name: str) -> str:
        found = self._finder.find(name)
        if found.key not in self._stats:
            path, frame = located(found.folder, found.key)
            try:
                self._stats[found.key] = check_image(path, frame=frame, remarks=self.remarks)
            except FastLNError as error:
                raise BadRowError(f"image {shown(name, LONGEST_NAME)}: {error}") from error
            self._found[found.key] = found.folder
            self._find_copy(found.key)
        if found.spelling:
            what = "are named in another spelling than their files, and were found"
            self.remarks.add(shown(name, LONGEST_NAME), Remark(what, f"{found.key} ({found.spelling})"))
        return found.key

    def _find_copy(self, name: str) -> None:
        """Find an earlier image with the same bytes; only files of the same size in pixels and bytes are read."""
        stat = self._stats[name]
        first = self._alike.setdefault(stat, name)
        if first != name:
            for one in (first, name):
                earlier = self._by_digest.setdefault((stat, self._digest(one)), one)
            if earlier != name:
                self._copies[name] = earlier

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            path, frame = located(self._found[name], name)
            with path.open("rb") as file:
                self._digests[name] = f"{hashlib.file_digest(file, 'sha256').hexdigest()}#{frame or 0}"
        return self._digests[name]

    def finish(self) -> None:
        """Raise one `FastLNError` about all bad rows so far, if any; or log them, if they are skipped."""
        if not self._problems:
            return
        n_bad, most = len(self._problems), self._options.skip_bad_rows
        count = f"{n_bad:,} bad row(s) of {self._n_rows:,}"
        lines = listing(self._problems)
        if not self._options.skips(n_bad, self._n_rows):
            told = "--skip-bad-rows (DataOptions.skip_bad_rows) leaves them out"
            if most:
                told = f"more than the {most} that may be skipped; --skip-bad-rows without a limit leaves them out"
            raise FastLNError(f"{count}, counted from 0:\n  {lines}\nThat was {count}{', ' if most else '; '}{told}.")
        logger.warning("skipped %s, counted from 0:\n  %s\nThat was %s, skipped.", count, lines, count)

    def source(
        self,
        name: str,
        splits: Mapping[str, list[Sample]],
        images: tuple[Callable[[str], Image.Image], Mapping[str, ImageStat]] | None = None,
    ) -> Source:
        """Finish, drop training rows that another split repeats, and make the source of the data.

        Args:
            name: The data's name.
            splits: The samples by split.
            images: `Source.image` and `Source.stats`; by default those of the files that `image` found.

        Raises:
            FastLNError: There were bad rows, and they are not skipped.
        """
        self.finish()
        if not self._options.keep_repeats:
            splits = drop_repeats(name, splits, self._copies)
        logger.info("%s: %s", name, ", ".join(f"{split} {len(samples):,}" for split, samples in splits.items()))
        self.remarks.tell(name)
        image, stats = images or (functools.partial(_image, self._found), self._stats)
        return Source(name, synthetic=False, splits=splits, image=image, stats=stats, copies=self._copies)


def _is_empty(row: Any) -> bool:
    """Whether a row holds nothing: an empty line, or an object whose values are all missing or blank."""
    return row is EMPTY or (isinstance(row, dict) and bool(row) and is_blank(row))


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: missing, blank, or an object of such values (the hub's missing image)."""
    if isinstance(value, float):  # pandas' sign for a missing value
        return math.isnan(value)
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    return value is None or (isinstance(value, str | bytes) and not value.strip())


def _image(folders: dict[str, Path], key: str) -> Image.Image:
    if key not in folders:
        raise FastLNError(f"no question of this data is about an image named {key!r}")
    path, frame = located(folders[key], key)
    return read_image(path, frame=frame)


def image_folder(folder: Path, *names: str) -> Path:
    """Return the first of some folders that exists.

    Raises:
        FastLNError: None exists; if there is an archive of one, the message says to unpack it.
    """
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    for name in names:
        if (archive := folder / f"{name}.zip").is_file():
            raise FastLNError(f"{archive}: unpack the images first, into {folder / name}")
    raise FastLNError(f"{folder}: no folder of images; looked for {' and '.join(map(repr, names))}")


def text(row: dict[str, Any], field: str) -> str:
    """Return a field that must be a non-blank text, stripped of blanks.

    Raises:
        BadRowError: The field is missing, not a text, not valid Unicode, or empty.
    """
    return as_text(_value(row, field), f"field {field!r}")


def as_text(value: Any, what: str) -> str:
    """Check that a value is a non-blank text, and return it stripped of blanks.

    Args:
        value: The value in the data.
        what: Its name in messages.

    Raises:
        BadRowError: It is not a text, not valid Unicode, or empty.
    """
    if not isinstance(value, str):
        raise BadRowError(f"{what} must be a text, not {shown(value)}")
    if not value.strip():
        raise BadRowError(f"{what} is empty")
    if "\0" in value:
        raise BadRowError(f"{what} holds a zero byte: {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which tokenizers do not accept
        raise BadRowError(f"{what} holds half of a surrogate pair: {shown(value)}") from error
    return value.strip()


def line(row: dict[str, Any], field: str) -> str:
    """Return a text with runs of white space replaced by single blanks.

    Raises:
        BadRowError: As in `text`.
    """
    return " ".join(text(row, field).split())


def text_or_number(row: dict[str, Any], field: str) -> str:
    """Return a field that may be a text or a number, as text.

    Raises:
        BadRowError: The field is missing, of another type, or empty.
    """
    return as_text_or_number(_value(row, field), f"field {field!r}")


def as_text_or_number(value: Any, what: str) -> str:
    """Return a text or number as text, 1.0 as `1`, with the arguments and errors of `as_text`."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # a column of numbers of which one is missing has only such values
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return as_text(value, what)


def answer(row: dict[str, Any], field: str) -> str:
    """Return a text or number, as text, that is not empty after normalising.

    Raises:
        BadRowError: The field is missing, of another type, empty, or nothing but punctuation.
    """
    value = text_or_number(row, field)
    if not normalise_answer(value):
        raise BadRowError(f"field {field!r} is {shown(value)}, which is empty after normalising")
    return value


def choice(row: dict[str, Any], field: str, choices: dict[str, T]) -> T:
    """Return the meaning of a field with a fixed set of values.

    Raises:
        BadRowError: The field is missing or has another value; the message lists the valid ones.
    """
    value = text(row, field)
    if value not in choices:
        raise BadRowError(f"field {field!r} is {shown(value)}, which is none of {', '.join(choices)}")
    return choices[value]


ANSWER_TYPES = {"CLOSED": True, "OPEN": False}
"""The values of the field `answer_type` in VQA-RAD and SLAKE."""

_CLOSED_LABELS = ANSWER_TYPES | {"YES/NO": True, "OTHER": False, "NUMBER": False}


def closed_label(row: dict[str, Any]) -> bool | None:
    """Return whether the optional field `answer_type` says that the question is closed; None without the field.

    Raises:
        BadRowError: It says anything other than CLOSED, OPEN or PathVQA's yes/no, other, number, in any case.
    """
    if not row.get("answer_type"):
        return None
    return choice(row | {"answer_type": text(row, "answer_type").upper()}, "answer_type", _CLOSED_LABELS)


def row_id(row: dict[str, Any], default: str) -> str:
    """Return the first of the fields `id`, `qid` and `question_id` that a row has, as text, or the default.

    Raises:
        BadRowError: It is neither a text nor a number, or it is empty.
    """
    return next((text_or_number(row, name) for name in ID_FIELDS if name in row), default)


def _value(row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise BadRowError(f"field {field!r} is missing")
    return row[field]
