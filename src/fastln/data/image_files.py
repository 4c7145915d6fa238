"""Finds the file of an image that a row names: by exactly that name, or in another spelling if only one file fits it.

Names are relative to a folder and may not lead out of it. `NAME#2` is the third picture (counted from 0) of a file that
holds several. Spellings that are understood: backslashes, `file://` and %-escapes, other case, other Unicode form.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple
from urllib.parse import unquote

from fastln.data.files import BadRowError, shown

LONGEST_NAME = 200
"""The characters of an image's name that messages show."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:[a-z]+/")
_FRAME = re.compile(r"(.+)#(\d{1,9})")


class Found(NamedTuple):
    """Where an image is.

    Attributes:
        folder: The folder that the key is relative to.
        key: The file's own name below the folder, with `#N` if the name has it.
        spelling: How the name in the data differs from the file's; empty if it does not.
    """

    folder: Path
    key: str
    spelling: str


def located(folder: Path, key: str) -> tuple[Path, int | None]:
    """Return the file that a key of `Found` means, and the number of the picture in it if the key has one."""
    path = folder / key
    framed = _FRAME.fullmatch(key)
    if framed is None or path.is_file():
        return path, None
    return folder / framed[1], int(framed[2])


class ImageFinder:
    """Finds images in some folders.

    Args:
        folders: The folders to search, in this order.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [folder.resolve() for folder in folders]
        self._shown = " or ".join(map(str, folders))
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, name: str) -> Found:
        """Find an image.

        Raises:
            BadRowError: There is no such file, several fit, or the name leads out of the folders, directly or through
                a link.
        """
        try:
            return self._find(name)
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte
            raise BadRowError(f"image {shown(name, LONGEST_NAME)}: {error}") from error

    def _find(self, name: str) -> Found:
        outside = False
        for written, spelling in _spellings(name):
            for base, frame in _frames(written):
                for folder in self._folders:
                    path = (folder / base).resolve()
                    present = path.is_file()
                    if not path.is_relative_to(folder):
                        outside = True
                    elif present:
                        return Found(folder, _key(folder, base, path) + frame, spelling)
        if not outside:
            for written, spelling in _spellings(name):
                for base, frame in _frames(written):
                    for folder in self._folders:
                        match = self._folded(folder, base)
                        if match is not None and (folder / match).resolve().is_relative_to(folder):
                            changed = _difference(base, match)
                            words = f"{spelling} and {changed}" if spelling else changed
                            return Found(folder, match + frame, words)
        raise BadRowError(f"image {shown(name, LONGEST_NAME)} {self._reason(name, outside)}")

    def _folded(self, folder: Path, base: str) -> str | None:
        """Return the one name below a folder that differs from `base` only in case and Unicode form.

        Raises:
            BadRowError: There are several.
        """
        place, parts = folder, PurePosixPath(base).parts
        if not parts or ".." in parts or base.startswith("/"):
            return None
        for part in parts:
            names = self._listing(place).get(_fold(part), [])
            if part in names:
                names = [part]
            if len(names) > 1:
                several = " and ".join(map(shown, names))
                raise BadRowError(
                    f"image {shown(base, LONGEST_NAME)} is missing in {self._shown}, where only case differs: {several}"
                )
            if not names:
                return None
            place = place / names[0]
        return place.relative_to(folder).as_posix() if place.is_file() else None

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    listing.setdefault(_fold(name), []).append(name)
            except OSError:  # a file, or a folder that may not be listed: nothing is found in it
                pass
            self._listings[folder] = listing
        return self._listings[folder]

    def _reason(self, name: str, outside: bool) -> str:
        """Say why there is no file of this name, and what would be right."""
        if _ADDRESS.match(name) and not name.lower().startswith("file:"):
            return f"is an address; images are files: download it, and name it as it is named in {self._shown}"
        written = list(_spellings(name))[-1][0]
        reason = f"is missing in {self._shown}"
        for folder in self._folders:
            place = folder / written
            if place.is_symlink() and not place.exists():
                return f"{reason}: it is a link to {os.readlink(place)}, which is missing"
        path = PureWindowsPath(written)
        near = next((tail for tail in _tails(path.parts) if self._inside(tail)), None)
        hint = f"; there is {shown(near, LONGEST_NAME)}: write that" if near else ""
        if path.drive or path.root:
            return f"leads outside the folder {self._shown}: it is absolute, and names are relative to the folder{hint}"
        if outside:
            return f"leads outside the folder {self._shown}{hint}"
        if hint:
            return reason + hint
        for folder in self._folders:
            place = folder / written
            if place.is_dir():
                return f"{reason}: it is a folder"
            stem = _fold(place.stem)
            others = [other for names in self._listing(place.parent).values() for other in names]
            if kin := [other for other in others if _fold(Path(other).stem) == stem]:
                return f"{reason}; there is {shown(kin[0], LONGEST_NAME)}, of another type"
        return reason

    def _inside(self, name: str) -> bool:
        return any((folder / name).is_file() for folder in self._folders)


def _spellings(name: str) -> Iterator[tuple[str, str]]:
    """Yield a name as it is, then as it may be meant, each with what was changed."""
    yield name, ""
    changes = []
    if name.lower().startswith("file:"):
        name = re.sub(r"(?i)^file:(//(localhost)?(?=/))?", "", name)
        changes.append("file://")
    if "%" in name and unquote(name) != name:
        name = unquote(name)
        changes.append("%-escapes")
    if changes:
        yield name, " and ".join(changes)
    if "\\" in name:
        changes.append("backslashes")
        yield name.replace("\\", "/"), " and ".join(changes)


def _frames(name: str) -> Iterator[tuple[str, str]]:
    """Yield a name as it is, then without the number of the picture in it."""
    yield name, ""
    if framed := _FRAME.fullmatch(name):
        yield framed[1], f"#{int(framed[2])}"


def _key(folder: Path, base: str, path: Path) -> str:
    if not os.path.isabs(base):
        return PurePosixPath(base).as_posix()
    return path.relative_to(folder).as_posix()


def _tails(parts: Sequence[str]) -> Iterator[str]:
    """Yield the ends of a path that stay below the folder that they are relative to."""
    for start in range(1, len(parts)):
        if ".." not in parts[start:]:
            yield "/".join(parts[start:])


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _difference(written: str, real: str) -> str:
    form = unicodedata.normalize("NFC", written) != written or unicodedata.normalize("NFC", real) != real
    same_but_form = unicodedata.normalize("NFC", written) == unicodedata.normalize("NFC", real)
    if same_but_form:
        return "another Unicode form (NFC or NFD)"
    return "other case and Unicode form" if form else "other case"
