"""PathVQA: shared images in Parquet, what such files can have wrong, and pickles, which are never opened."""

import pickle
import sys

import pytest
from layouts import LAYOUTS, jpeg

from fastln.data import load_source
from fastln.data.images import read_image
from fastln.errors import FastLNError

HUB, ORIGINAL = LAYOUTS["path-vqa"], LAYOUTS["path-vqa, original"]


def refusal(spec):
    with pytest.raises(FastLNError) as caught:
        load_source(spec)
    return str(caught.value)


def test_equal_bytes_are_one_image_wherever_they_stand(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [HUB.row(number) for number in (0, 1, 0, 2, 1)]  # in row groups of two, in two files
    source = load_source(HUB.make(tmp_path, train=rows, test=[HUB.row(2), HUB.row(3)]))
    train, test = source.splits["train"], source.splits["test"]
    assert len({sample.id for sample in train}) == 5
    assert train[0].image == train[2].image
    assert train[1].image == train[4].image
    assert train[3].image == test[0].image
    assert len({sample.image for sample in train + test}) == 4
    data = source.dataset("train")
    for sample, number in zip(train, (0, 1, 0, 2, 1), strict=True):
        assert data.image(sample.image) == read_image(jpeg(number))


def test_files_may_lie_in_the_folder_itself(tmp_path):
    pytest.importorskip("pyarrow")
    HUB.make(tmp_path)
    assert len(load_source(str(tmp_path / "data")).splits["train"]) == 1


def test_files_that_are_no_parquet_or_lack_a_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    spec = HUB.make(tmp_path)
    file = tmp_path / "data" / "test-00000-of-00002-abc.parquet"
    parquet.write_table(pyarrow.table({"image": [b""], "question": ["Q"]}), file)
    assert refusal(spec) == f"{file}: no column answer; it has image, question"
    file.write_bytes(b"PAR1 but no more")
    assert refusal(spec).startswith(f"{file}: cannot read this Parquet file: ")


def test_without_pyarrow(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    spec = HUB.make(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "for Parquet pyarrow is needed: pip install 'fastln[parquet]'" in refusal(spec)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("this pickle was opened",))


def test_pickles_are_refused_unopened_with_what_to_do(tmp_path):
    spec = ORIGINAL.make(tmp_path)
    file = tmp_path / "qas" / "val" / "val_qa.json"
    file.unlink()
    file.with_suffix(".pkl").write_bytes(pickle.dumps(Bomb()))
    message = refusal(spec)
    assert f"{file.with_suffix('.pkl')}: pickled files are not read, for they can run any code" in message
    # The command that the message gives does what it says.
    rows = [ORIGINAL.row(2)]
    file.with_suffix(".pkl").write_bytes(pickle.dumps(rows))
    code = message.partition('python -c "')[2].rstrip('"')
    exec(code, {})
    assert [sample.image for sample in load_source(spec).splits["validation"]] == ["val/x_0002.jpg"]


def test_a_missing_file_of_the_original(tmp_path):
    spec = ORIGINAL.make(tmp_path)
    (tmp_path / "qas" / "test" / "test_qa.json").unlink()
    assert "test_qa.json: this file is missing" in refusal(spec)
