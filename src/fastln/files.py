"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into `folder`, which is made where it is not there, in place of those of the same names.

    Everything is on disk under other names before the first file is replaced: a full disk, or a process that ends
    while it writes, leaves the old files whole. No reader finds half a file.

    Args:
        folder: where they go.
        contents: by file name.

    Raises:
        OSError: if they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside: dict[str, Path] = {}
    try:
        for name, content in contents.items():
            handle, path = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            beside[name] = Path(path)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(path, 0o666 & ~_umask())  # mkstemp's are for the owner alone
        for name, whole in beside.items():
            whole.replace(folder / name)
    except BaseException:
        for part in beside.values():
            with contextlib.suppress(OSError):
                part.unlink()
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the renames
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
