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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastln.errors import FastLNError
from fastln.files import STAGING, flush
from fastln.fingerprint import FINGERPRINT, difference, fingerprint

logger = logging.getLogger(__name__)

TRAINED = "trained.safetensors"
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
    """Delete the oldest checkpoints (lowest steps) until `limit` are left.

    Args:
        folder: where they are.
        limit: how many may stay; None or 0 for all.
        keep: checkpoints that stay in any case.
    """
    if not limit or limit < 0:
        return
    kept = set(keep)
    found = checkpoints_in(folder)
    surplus = len(found) - max(limit, len(kept))
    for checkpoint in [path for path in reversed(found) if path not in kept][: max(surplus, 0)]:
        remove(checkpoint)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters, by their names in the trained module."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the trained parameters and a fingerprint of the frozen ones, which the base model holds."""
    tensors = {name: p.detach().contiguous() for name, p in trained_parameters(model).items()}
    save_file(tensors, folder / TRAINED, {"format": "pt", FINGERPRINT: fingerprint(model, _not_frozen(model))})


def load_trained(model: nn.Module, folder: Path) -> None:
    """Load what `save_trained` wrote, in place.

    Raises:
        FastLNError: if the file cannot be read, holds other parameters than those that train, or comes from a run with
            other frozen parameters.
    """
    path = folder / TRAINED
    try:
        saved: dict[str, Tensor] = load_file(path)
        with safe_open(path, "pt") as file:
            base = (file.metadata() or {}).get(FINGERPRINT)
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{path}: cannot be read: {error}") from None
    trained = trained_parameters(model)
    if saved.keys() != trained.keys():
        odd = sorted(saved.keys() ^ trained.keys())
        raise FastLNError(
            f"{path}: it is from another run: {len(odd)} names differ from those that train now, for example {odd[0]}"
        )
    for name, parameter in trained.items():
        if saved[name].shape != parameter.shape:
            raise FastLNError(
                f"{path}: it is from another model: {name} has shape {tuple(saved[name].shape)} there and "
                f"{tuple(parameter.shape)} here"
            )
    if base is not None and (differs := difference(base, model, _not_frozen(model))) is not None:
        raise FastLNError(
            f"{path}: it is from another base model: {differs}; resume with that base, or start a new training"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def _not_frozen(model: nn.Module) -> set[str]:
    # AdaLoRA stores its ranks in parameters that no optimizer has, and they change.
    return {name for name, p in model.named_parameters() if p.requires_grad or "ranknum" in name}
