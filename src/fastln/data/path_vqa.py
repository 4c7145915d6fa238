"""The reader of PathVQA (He et al., 2020) in its authors' form: `qas/` and `images/{train,val,test}/NAME.jpg`.

`qas` holds the questions twice, and either is read: `train/train_qa.pkl`, rows with `image`, `question` and `answer`,
and `train_vqa.pkl`, rows with `img_id`, `sent`, `label` (whose key is the answer) and `answer_type` (yes/no, other,
number). Only the second says which questions are closed. The first is preferred, because it omits no answer.

A pickle can run any code that its author put into it, so none is read. A message says how to convert the files to JSON
next to them. `fastln.data.parquet` reads the hub's form of PathVQA.
"""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any

from fastln.data import parquet
from fastln.data.dataset import Sample, Source
from fastln.data.files import BadRowError, shown
from fastln.data.rows import RowChecker, answer, closed_label, image_folder, line, text
from fastln.data.tables import read_rows
from fastln.errors import FastLNError
from fastln.reading import DataOptions

LAYOUT = "qas/train/train_qa.json (or qas/train_vqa.json), so for val and test; images/train/*.jpg; or as parquet"

_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_QUESTIONS = "qas"
_CONVERT = (
    "import json, pickle, sys; "
    "[json.dump(pickle.load(open(name + '.pkl', 'rb')), open(name + '.json', 'w')) for name in sys.argv[1:]]"
)


def recognises(folder: Path) -> bool:
    """Whether a folder holds the original folder of questions."""
    return (folder / _QUESTIONS).is_dir()


def read(folder: Path, options: DataOptions) -> Source:
    """Read the questions.

    Args:
        folder: A folder that `recognises` accepts, or one of Parquet files.
        options: How to read the data.

    Raises:
        FastLNError: Files or the image folder are missing or pickled; or rows are bad.
    """
    if not recognises(folder) and parquet.recognises(folder):
        return parquet.read(folder, options)
    rows = RowChecker([image_folder(folder, "images")], options)
    files = _files(folder / _QUESTIONS)

    def parse(name: str, row: dict[str, Any], index: int) -> Sample:
        if "sent" in row:
            row = row | {"image": row.get("img_id"), "question": row["sent"], "answer": _only_label(row)}
        return Sample(
            id=f"{name}-{index}",
            image=rows.image(f"{name}/{text(row, 'image')}.jpg"),
            question=line(row, "question"),
            answer=answer(row, "answer"),
            closed=closed_label(row),
        )

    splits = {
        split: rows.read(file, read_rows(file), functools.partial(parse, _SPLITS[split]))
        for split, file in files.items()
    }
    return rows.source("path-vqa", splits)


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each split; raise if one is missing or not converted."""
    files, pickled = {}, []
    for split, name in _SPLITS.items():
        places = (folder / name / f"{name}_qa.json", folder / f"{name}_vqa.json")
        files[split] = next((place for place in places if place.is_file()), places[0])
        if not files[split].is_file():
            pickled += [place.with_suffix("") for place in places if place.with_suffix(".pkl").is_file()][:1]
    if pickled:
        raise FastLNError(
            f"{', '.join(f'{file}.pkl' for file in pickled)}: pickled files are not read, because they can run any "
            f'code. If you trust these, convert them: python -c "{_CONVERT}" {shlex.join(map(str, pickled))}'
        )
    return files


def _only_label(row: dict[str, Any]) -> Any:
    label = row.get("label")
    if not isinstance(label, dict) or len(label) != 1:
        raise BadRowError(f"field 'label' must have the answer as its one key, it is {shown(label)}")
    return next(iter(label))
