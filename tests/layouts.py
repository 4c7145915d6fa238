"""Tiny datasets in every layout that is read from disk, written anew for each test."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")


def jpeg(seed: int) -> bytes:
    """An image large enough to be cut in its middle."""
    noise = np.random.default_rng(seed).integers(0, 256, (64, 48), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@dataclass(frozen=True)
class Layout:
    """How a layout is written.

    Attributes:
        row: Makes a good row about image number n (and question number n) in the layout's own fields.
        write: Writes rows by split to a folder, with images 0 to 3; returns what the user names.
        image: Makes of a row one about an image with this name (or, where images stand in the rows, these bytes).
        answer: Makes of a row one with this answer.
        splits: Those that it has.
    """

    row: Callable[[int], Row]
    write: Callable[[Path, dict[str, list[Row]]], str]
    image: Callable[[Row, Any], Row]
    answer: Callable[[Row, Any], Row]
    splits: tuple[str, ...] = SPLITS

    def make(self, folder: Path, **rows: list[Row]) -> str:
        """Write a dataset with the given rows, and one good row, which no other split has, in each other split."""
        splits = {
            split: [self.answer(self.row(number), f"in {split}") if number else self.row(number)]
            for number, split in enumerate(self.splits)
        }
        return self.write(folder, splits | rows)


def without(row: Row, field: str) -> Row:
    return {name: value for name, value in row.items() if name != field}


def _slake_row(number: int) -> Row:
    return {
        "img_id": number,
        "img_name": f"xmlab{number}/source.jpg",
        "question": "What  modality is this?",
        "answer": "MRI",
        "q_lang": "en",
        "location": "Abdomen",
        "modality": "MRI",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Modality",
        "triple": ["vhead", "_", "_"],
        "qid": 10 + number,
    }


def _write_slake(folder: Path, splits: dict[str, list[Row]]) -> str:
    for number in range(4):
        save(folder / "imgs" / f"xmlab{number}" / "source.jpg", jpeg(number))
    for split, rows in splits.items():
        name = {"validation": "validate"}.get(split, split)
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return str(folder)


def _parquet_row(number: int) -> Row:
    return {"image": {"bytes": jpeg(number), "path": None}, "question": "what  is seen?", "answer": "nuclei"}


def _write_parquet(folder: Path, splits: dict[str, list[Row]]) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "data").mkdir(parents=True)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "question": pa.string(), "answer": pa.string()})
    for split, rows in splits.items():
        half = (len(rows) + 1) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            table = pa.Table.from_pylist(part, schema)
            parquet.write_table(table, folder / "data" / f"{split}-0000{number}-of-00002-abc.parquet", row_group_size=2)
    return str(folder)


def _path_vqa_row(number: int) -> Row:
    return {"image": f"x_{number:04d}", "question": "what  is seen?", "answer": "nuclei"}


def _write_path_vqa(folder: Path, splits: dict[str, list[Row]]) -> str:
    for split, rows in splits.items():
        name = {"validation": "val"}.get(split, split)
        for number in range(4):
            save(folder / "images" / name / f"x_{number:04d}.jpg", jpeg(number))
        save(folder / "qas" / name / f"{name}_qa.json", json.dumps(rows).encode())
    return str(folder)


def _iu_row(number: int) -> Row:
    name = f"CXR{number}_IM-0001"
    return {
        "id": name,
        "report": "The heart is normal .\n No  effusion .",
        "image_path": [f"{name}/0.png", f"{name}/1.png"],
        "split": "train",
    }


def _write_iu(folder: Path, splits: dict[str, list[Row]]) -> str:
    for number in range(4):
        for view in range(2):
            path = folder / "images" / f"CXR{number}_IM-0001" / f"{view}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (5, 4), 10 * number + view).save(path)
    lists = {{"validation": "val"}.get(split, split): rows for split, rows in splits.items()}
    (folder / "annotation.json").write_text(json.dumps(lists))
    return str(folder)


def _llava_row(number: int) -> Row:
    return {
        "id": f"fig_{number}",
        "image": f"{number}.jpg",
        "domain": {"mri": True},
        "conversations": [
            {"from": "human", "value": "What is  shown?\n<image>"},
            {"from": "gpt", "value": "An MRI of the knee."},
            {"from": "human", "value": "Is it normal?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }


def _llava_answer(row: Row, answer: Any) -> Row:
    return row | {"conversations": [*row["conversations"][:-1], {"from": "gpt", "value": answer}]}


def _plain_row(number: int) -> Row:
    return {"image": f"{number}.jpg", "question": "Is it  normal?", "answer": "no"}


def _images(folder: Path) -> None:
    for number in range(4):
        save(folder / "images" / f"{number}.jpg", jpeg(number))


def _write_json(folder: Path, splits: dict[str, list[Row]]) -> str:
    _images(folder)
    for split, rows in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return str(folder)


def _write_json_lines(folder: Path, splits: dict[str, list[Row]]) -> str:
    _images(folder)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder)


def _write_csv(folder: Path, splits: dict[str, list[Row]]) -> str:
    _images(folder)
    for split, rows in splits.items():
        names = list(dict.fromkeys(name for row in [_plain_row(0), *rows] for name in row))
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    return str(folder)


def _set(field: str) -> Callable[[Row, Any], Row]:
    return lambda row, value: row | {field: value}


LAYOUTS = {
    "slake": Layout(_slake_row, _write_slake, _set("img_name"), _set("answer")),
    "parquet": Layout(
        _parquet_row,
        _write_parquet,
        lambda row, content: row | {"image": {"bytes": content, "path": None}},
        _set("answer"),
    ),
    "path-vqa": Layout(_path_vqa_row, _write_path_vqa, _set("image"), _set("answer")),
    "iu-xray": Layout(
        _iu_row, _write_iu, lambda row, name: row | {"image_path": [row["image_path"][0], name]}, _set("report")
    ),
    "llava-med": Layout(_llava_row, _write_json, _set("image"), _llava_answer),
    "plain, jsonl": Layout(_plain_row, _write_json_lines, _set("image"), _set("answer")),
    "plain, csv": Layout(_plain_row, _write_csv, _set("image"), _set("answer")),
}
