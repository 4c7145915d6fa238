"""Loads the dataset that a user names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fastln.data import iu_xray, llava_med, parquet, path_vqa, phantom, plain, slake, vqa_rad
from fastln.data.dataset import Source, VQADataset, check_split
from fastln.errors import FastLNError
from fastln.files import user_path
from fastln.reading import LAYOUTS, DataOptions


@dataclass(frozen=True, slots=True)
class Reader:
    """How one layout of data on disk is read.

    Attributes:
        layout: A description of the layout, for error messages.
        recognises: Whether a folder (or a file) has this layout.
        read: Reads it.
        languages: The languages to choose from, if the data has several.
    """

    layout: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, DataOptions], Source]
    languages: tuple[str, ...] = ()


READERS = {
    layout: Reader(module.LAYOUT, module.recognises, module.read, getattr(module, "LANGUAGES", ()))
    for layout, module in zip(LAYOUTS, (vqa_rad, slake, path_vqa, parquet, iu_xray, llava_med, plain), strict=True)
}
"""Every layout that `load_source` knows, by name; the first that recognises a folder reads it."""


def load_source(spec: str, options: DataOptions | None = None) -> Source:
    """Read all splits of a dataset; every row, and every image that it names, is checked once.

    Args:
        spec: `phantom`, the embedded synthetic data, or the folder or file of a dataset in a layout of `READERS`.
        options: How to read it.

    Raises:
        FastLNError: The data or the layout is unknown, an option does not fit it, a file cannot be read, or rows are
            bad; all bad rows are listed with file, index and reason.
    """
    options = options or DataOptions()
    if spec == phantom.NAME:
        _refuse_language(spec, (), options)
        if options.layout is not None:
            raise FastLNError(
                f"{spec} comes with fastln and has no layout on disk; leave out layout {options.layout!r}"
            )
        return phantom.source()
    path = user_path(spec)
    if not path.exists():
        raise FastLNError(f"there is no data {spec!r}; give the folder or file of a dataset, or {phantom.NAME!r}")
    reader = _reader(path, options.layout)
    _refuse_language(spec, reader.languages, options)
    return reader.read(path, options)


def load_dataset(
    spec: str, split: str, *, validation_fraction: float = 0.0, options: DataOptions | None = None
) -> VQADataset:
    """Load one split of a dataset: `load_source`, then `Source.dataset`.

    Args:
        spec: See `load_source`.
        split: `train`, `validation` or `test`.
        validation_fraction: See `Source.dataset`.
        options: How to read the data.

    Returns:
        The questions of the split, at least one.

    Raises:
        FastLNError: As in these two.
    """
    check_split(split, validation_fraction)
    return load_source(spec, options).dataset(split, validation_fraction=validation_fraction)


def _reader(path: Path, layout: str | None) -> Reader:
    if layout is not None:
        if layout not in READERS:
            near = get_close_matches(layout, READERS, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise FastLNError(f"there is no layout {layout!r}; the layouts are {', '.join(READERS)}{meant}")
        return READERS[layout]
    for reader in READERS.values():
        if reader.recognises(path):
            return reader
    inside = [
        f"; {folder} is {name}: give that"
        for folder in (sorted(path.iterdir()) if path.is_dir() else ())
        for name, reader in READERS.items()
        if folder.is_dir() and reader.recognises(folder)
    ]
    known = "\n  ".join(f"{name}: {reader.layout}" for name, reader in READERS.items())
    raise FastLNError(f"{path}: no known layout{''.join(inside[:1])}. The known ones:\n  {known}")


def _refuse_language(spec: str, languages: tuple[str, ...], options: DataOptions) -> None:
    if options.language is not None and options.language not in languages:
        known = f"it has {', '.join(languages)}" if languages else "it has one"
        raise FastLNError(f"{spec}: no language {options.language!r} to choose: {known}")
