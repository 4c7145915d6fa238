"""Files: where a name that the user gives leads, and how to write so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STAGING = ".fastln-writing"


def expanded(name: str) -> str:
    """Return a user's name of a file or folder with `~` and the environment's variables in it replaced.

    A leading `~` or `~USER` becomes the home folder. `$NAME` and `${NAME}` become the variable's value; if there is no
    such variable, or no such user, the text stays as it is.
    """
    return os.path.expanduser(os.path.expandvars(name))


def user_path(path: str | Path) -> Path:
    """Return the path that a user means, as `expanded` reads it; every path from outside comes through here."""
    return Path(expanded(str(path)))


def json_text(values: object, **settings: Any) -> str:
    """Return values as JSON that people can read: letters of every language as they are, other objects as text.

    If a text holds half of a surrogate pair (a file's name can), everything but ASCII is escaped: it is no UTF-8.

    Args:
        values: What to write.
        **settings: As `json.dumps` takes them.
    """
    text = json.dumps(values, ensure_ascii=False, default=str, **settings)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(values, default=str, **settings)
    return text


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a staging folder. When the block ends without an error, its files move into `folder`.

    They replace files with the same names; other files stay. All files are on disk before the first one is replaced.
    So if the disk is full, an error occurs or the process is killed while it writes, the old files stay intact. After
    a kill, the unfinished files stay in a hidden folder until the next call. No reader sees half a file.

    Args:
        folder: The folder that receives the files. If it does not exist, it appears with all files in it.

    Raises:
        OSError: If the files cannot be written.
    """
    is_new = not folder.is_dir()
    # Renaming needs one file system. An existing folder may be a mount point, so stage inside it; a new one, beside it.
    beside = folder.with_name(f"{STAGING}-{folder.name}") if is_new else folder / STAGING
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        written = [path for path in beside.rglob("*") if path.is_file()]
        for path in written:
            flush(path)
        if is_new:
            os.rename(beside, folder)
        else:
            for path in written:
                place = folder / path.relative_to(beside)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.rename(path, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    flush(folder.parent if is_new else folder)  # the renames


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into `folder` through `written_whole`.

    Args:
        folder: The folder that receives the files.
        contents: The files' contents, by file name.

    Raises:
        OSError: If the files cannot be written.
    """
    with written_whole(folder) as beside:
        for name, content in contents.items():
            (beside / name).write_bytes(content)


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk.

    Raises:
        OSError: If the disk cannot store it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems return this for folders
            raise
    finally:
        os.close(descriptor)
