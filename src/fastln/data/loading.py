"""From what a user names to a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fastln.data import phantom, vqa_rad
from fastln.data.dataset import SPLITS, Sample, Source, VQADataset
from fastln.errors import FastLNError


@dataclass(frozen=True, slots=True)
class Reader:
    """How one layout of data on disk is read.

    Attributes:
        layout: What a folder in this layout holds, for error messages.
        recognises: Tells whether a folder has this layout.
        read: Reads it.
    """

    layout: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path], Source]


READERS = (Reader(vqa_rad.LAYOUT, vqa_rad.recognises, vqa_rad.read),)
"""Every layout that `load_dataset` knows; the first that recognises a folder reads it."""


def load_dataset(spec: str, split: str, *, validation_fraction: float = 0.0) -> VQADataset:
    """Load one split of a dataset.

    A validation split is taken out of the training questions: all those about some of the images, chosen by a hash of
    the image's key alone. So rephrasings of one question stay on one side; and so do an image's answers, of which some
    set aside would leave the others to be learnt as the answer to everything.

    Args:
        spec: `phantom`, the embedded synthetic data, or the folder of a dataset in one of the layouts in `READERS`.
        split: `train`, `validation` or `test`.
        validation_fraction: Share of the images whose training questions are set aside, from 0 up to but not
            including 1.

    Returns:
        The questions of the split, at least one.

    Raises:
        FastLNError: Unknown data, layout or split; a bad fraction; bad data; or a split without a question.
    """
    if split not in SPLITS:
        near = get_close_matches(split, SPLITS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise FastLNError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}{meant}")
    if not 0 <= validation_fraction < 1:
        raise FastLNError(f"validation_fraction must be from 0 up to but not including 1, not {validation_fraction}")
    if split == "validation" and validation_fraction == 0:
        raise FastLNError("there is no validation split unless validation_fraction, now 0, sets some questions aside")
    source = phantom.source() if spec == phantom.NAME else _read_folder(spec)
    if split == "test":
        samples = source.splits["test"]
    else:
        wanted = split == "validation"
        samples = [s for s in source.splits["train"] if _set_aside(s, validation_fraction) == wanted]
    if not samples:
        matters = split == "validation" or (split == "train" and validation_fraction > 0)
        set_aside = f" with validation_fraction {validation_fraction}" if matters else ""
        raise FastLNError(f"{spec}: the {split} split holds no question{set_aside}")
    return VQADataset(source, split, samples)


def _read_folder(spec: str) -> Source:
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        raise FastLNError(f"there is no data folder {spec!r}; give the folder of a dataset, or {phantom.NAME!r}")
    for reader in READERS:
        if reader.recognises(folder):
            return reader.read(folder)
    raise FastLNError(
        f"{folder}: no known dataset layout in this folder; looked for: {'; '.join(r.layout for r in READERS)}"
    )


def _set_aside(sample: Sample, fraction: float) -> bool:
    digest = hashlib.sha256(sample.image.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
