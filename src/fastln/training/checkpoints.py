"""Checkpoints on disk: written completely or not at all, and checked for completeness when they are read.

A checkpoint is first written to a temporary folder beside its place, with a list of its files and their sizes. When
everything is flushed to disk, the folder is renamed. So all earlier checkpoints survive if the process is killed at any
moment or the disk fills up. If a checkpoint loses bytes later (an interrupted copy, a broken file system), it no longer
matches its list.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastln.errors import FastLNError
from fastln.files import STAGING, flush

logger = logging.getLogger(__name__)

FILES = "files.json"
LEAVING = ".fastln-deleting"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, complete or not, highest step first."""
    found = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ():
        step = path.name.rpartition("-")[2]
        if step.isdigit() and path.is_dir():
            found[int(step)] = path
    return [found[step] for step in sorted(found, reverse=True)]


def what_is_wrong(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is complete."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        files = dict(json.loads((checkpoint / FILES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return f"its {FILES} is missing or unreadable: it is cut short, or was not written by fastln"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is cut short: it has {path.stat().st_size:,} of {size:,} bytes"
    return None


def last_whole(folder: Path) -> Path:
    """Return the last complete checkpoint in a folder; a warning names those that were skipped.

    Raises:
        FastLNError: if there is none; the message says what is wrong with the others.
    """
    broken: list[str] = []
    for checkpoint in checkpoints_in(folder):
        wrong = what_is_wrong(checkpoint)
        if wrong is None:
            if broken:
                logger.warning("passed over %s; resuming from %s", "; ".join(broken), checkpoint)
            return checkpoint
        broken.append(f"{checkpoint}: {wrong}")
    why = f": {'; '.join(broken)}" if broken else ""
    raise FastLNError(f"{folder}: there is no {'whole ' if broken else ''}checkpoint to resume from{why}")


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    for name in (STAGING, LEAVING):
        shutil.rmtree(folder / name, ignore_errors=True)


def publish(written: Path, place: Path) -> None:
    """Move a complete checkpoint to its place, replacing an existing one.

    Args:
        written: its folder, on the file system of `place`.
        place: where it belongs.

    Raises:
        OSError: if it cannot be written; `place` is then unchanged.
    """
    files = {str(path.relative_to(written)): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    (written / FILES).write_text(json.dumps(files, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in [*written.rglob("*"), written]:
        flush(path)
    if place.exists():
        remove(place)
    os.rename(written, place)
    flush(place.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; if the process is killed meanwhile, all of it stays under its name, or nothing does."""
    leaving = checkpoint.parent / LEAVING
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(checkpoint, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest checkpoints, by their time and then by their step, until `limit` are left.

    Args:
        folder: where they are.
        limit: how many may stay; None or 0 for all.
        keep: checkpoints that stay in any case.
    """
    if not limit or limit < 0:
        return
    kept = set(keep)
    # By time, as stock does: an earlier run in the folder may have left higher steps.
    found = sorted(checkpoints_in(folder), key=lambda path: (path.stat().st_mtime, int(path.name.rpartition("-")[2])))
    surplus = len(found) - max(limit, len(kept))
    for checkpoint in [path for path in found if path not in kept][: max(surplus, 0)]:
        remove(checkpoint)
