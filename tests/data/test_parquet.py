"""Parquet as the hub has it: names of files, shared images, and what such files can have wrong."""

import io
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from layouts import LAYOUTS, jpeg
from PIL import Image

from fastln.data import DataOptions, load_source
from fastln.data import parquet as reader
from fastln.data.images import read_image
from fastln.errors import FastLNError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

HUB = LAYOUTS["parquet"]


def refusal(spec):
    with pytest.raises(FastLNError) as caught:
        load_source(spec)
    return str(caught.value)


def test_equal_bytes_are_one_image_wherever_they_stand(tmp_path):
    rows = [HUB.row(number) for number in (0, 1, 0, 2, 1)]  # in row groups of two, in two files
    source = load_source(HUB.make(tmp_path, train=rows, test=[HUB.answer(HUB.row(n), "mitosis") for n in (2, 3)]))
    train, test = source.splits["train"], source.splits["test"]
    assert len({sample.id for sample in train}) == 5
    assert train[0].image == train[2].image
    assert train[1].image == train[4].image
    assert train[3].image == test[0].image
    assert len({sample.image for sample in train + test}) == 4
    data = source.dataset("train")
    for sample, number in zip(train, (0, 1, 0, 2, 1), strict=True):
        assert data.image(sample.image) == read_image(jpeg(number))


def test_threads_that_need_one_row_group_read_it_once(tmp_path, monkeypatch):
    source = load_source(HUB.make(tmp_path, train=[HUB.row(number) for number in range(4)]))  # in two files
    data, read = source.dataset("train"), []
    opened = reader._opened

    def slow(file):
        read.append(file)
        time.sleep(0.05)
        return opened(file)

    monkeypatch.setattr(reader, "_opened", slow)
    with ThreadPoolExecutor(2) as pool:
        pictures = list(pool.map(data.image, [sample.image for sample in data.samples[:2]]))
    assert pictures == [read_image(jpeg(number)) for number in (0, 1)]
    assert len(read) == 1


def test_images_are_not_held(tmp_path):
    rows = [HUB.row(1) | {"image": {"bytes": jpeg(n) + bytes(100_000), "path": None}} for n in range(120)]
    spec = HUB.make(tmp_path, train=rows)
    load_source(spec)  # what is loaded once is not the question
    tracemalloc.start()
    try:
        source = load_source(spec)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len({sample.image for sample in source.splits["train"]}) == 120
    assert peak < 4e6, peak  # of 12 MB


def test_rows_without_any_content_are_passed_over(tmp_path, caplog):
    caplog.set_level("INFO", "fastln")
    nothing = [{"image": {"bytes": None, "path": None}}, {"image": {"bytes": b"", "path": ""}, "question": " "}]
    spec = HUB.make(tmp_path, train=[HUB.row(0), *nothing, HUB.row(1)])
    assert len(load_source(spec).splits["train"]) == 2
    assert "left out 1 empty row(s)" in caplog.text  # the other is the last of its file


def test_optional_columns(tmp_path):
    rows = [HUB.row(number) | {"qid": number, "answer_type": kind} for number, kind in enumerate(("OPEN", "CLOSED"))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "slake.parquet")
    train = load_source(str(tmp_path / "slake.parquet")).splits["train"]
    assert [(sample.id, sample.closed) for sample in train] == [("0", False), ("1", True)]


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train-00000-of-00001-0f1e.parquet", "validation-00000-of-00001-9a2b.parquet"),
        ("data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet"),
        ("train.parquet", "valid.parquet"),
        ("train/0000.parquet", "validation/0000.parquet"),
    ],
)
def test_names_of_files(tmp_path, train, validation):
    folder = tmp_path / "vqa-rad"
    for number, name in enumerate((train, validation)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([HUB.row(number)]), folder / name)
    source = load_source(str(folder))
    assert source.name == "vqa-rad"
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 1, "validation": 1}
    assert load_source(str(folder), DataOptions(layout="path-vqa")).splits == source.splits
    for number, split in enumerate(("train", "validation")):
        data = source.dataset(split)
        assert data.image(data[0].image).tobytes() == read_image(jpeg(number), "").tobytes()


def test_files_that_are_no_parquet_or_lack_a_column(tmp_path):
    spec = HUB.make(tmp_path)
    file = tmp_path / "data" / "test-00000-of-00002-abc.parquet"
    parquet.write_table(pyarrow.table({"image": [b""], "question": ["Q"]}), file)
    assert refusal(spec) == f"{file}: no column answer; it has image, question"
    file.write_bytes(b"PAR1 but no more")
    assert refusal(spec).startswith(f"{file}: cannot read this Parquet file: ")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(spec).startswith(f"{file}: this is a pointer of Git LFS, not the file itself; fetch that: ")


def test_without_pyarrow(tmp_path, monkeypatch):
    spec = HUB.make(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "for Parquet pyarrow is needed: pip install 'fastln[parquet]'" in refusal(spec)


def test_what_is_to_be_said_names_the_image(tmp_path, caplog):
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    rows = [HUB.row(0) | {"image": {"bytes": stream.getvalue(), "path": None}}] * 2
    load_source(HUB.make(tmp_path / "d", train=rows))
    assert (
        "d: 1 image(s) hold several pictures, of which the first is used; the first is the image of train-"
        in caplog.text
    )
    assert "/000000: 2 pictures" in caplog.text
