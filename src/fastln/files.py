"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

STAGING = ".fastln-writing"


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a place to write files to, which become those of `folder` when the block ends without an error.

    They take the place of files of the same names; others stay. Everything is on the disk before the first file is
    replaced: a full disk, an error, or a process that is killed while it writes, leaves the old files whole. (What a
    killed one was writing stays in a hidden folder, until the next time.) No reader finds half a file.

    Args:
        folder: where they go; where it is not there it appears with all of them in it.

    Raises:
        OSError: if they cannot be written.
    """
    is_new = not folder.is_dir()
    # In a folder that is there, which may be a file system of its own; else next to where it will be.
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
    """Write files into `folder`, whole or not at all, as `written_whole` does.

    Args:
        folder: where they go.
        contents: by file name.

    Raises:
        OSError: if they cannot be written.
    """
    with written_whole(folder) as beside:
        for name, content in contents.items():
            (beside / name).write_bytes(content)


def flush(path: Path) -> None:
    """Have a file, or a folder's list of files, written to the disk.

    Raises:
        OSError: where the disk does not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network file systems say of folders
            raise
    finally:
        os.close(descriptor)
