"""SLAKE: languages, the names of its files, and what its rows can have wrong beside what every reader tells."""

import json

import pytest
from layouts import LAYOUTS, without

from fastln.data import DataOptions, load_source
from fastln.errors import FastLNError

SLAKE = LAYOUTS["slake"]


def test_one_language_is_read_english_by_default(tmp_path):
    chinese = SLAKE.row(1) | {"q_lang": "zh", "question": "这张图像是什么模态?", "answer": "核磁共振"}
    spec = SLAKE.make(tmp_path, train=[SLAKE.row(0), chinese])
    assert [sample.answer for sample in load_source(spec).splits["train"]] == ["MRI"]
    source = load_source(spec, DataOptions(language="zh"))
    assert [sample.answer for sample in source.splits["train"]] == ["核磁共振"]
    with pytest.raises(FastLNError, match="the test split holds no usable row"):
        source.dataset("test")


def test_labels(tmp_path):
    closed = SLAKE.row(1) | {"answer_type": "CLOSED", "answer": "No"}
    assert [s.closed for s in load_source(SLAKE.make(tmp_path, train=[SLAKE.row(0), closed])).splits["train"]] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q_lang": "de"}, "field 'q_lang' is \"de\", which is none of en, zh"),
        ({"answer_type": "BOTH"}, "field 'answer_type' is \"BOTH\", which is none of CLOSED, OPEN"),
        ({"question": None}, "field 'question' must be a text, not null"),
        ({"qid": []}, "field 'qid' must be a text, not []"),
    ],
)
def test_bad_fields(tmp_path, change, reason):
    with pytest.raises(FastLNError) as caught:
        load_source(SLAKE.make(tmp_path, test=[SLAKE.row(0) | change]))
    assert f"test.json: row 0 (qid {json.dumps((SLAKE.row(0) | change)['qid'])}): {reason}" in str(caught.value)


@pytest.mark.parametrize("field", ["q_lang", "qid", "img_name", "question", "answer", "answer_type"])
def test_missing_fields(tmp_path, field):
    with pytest.raises(FastLNError, match=f"field '{field}' is missing"):
        load_source(SLAKE.make(tmp_path, train=[without(SLAKE.row(0), field)]))


def test_the_hub_calls_the_second_file_otherwise_and_packs_the_images(tmp_path):
    spec = SLAKE.make(tmp_path)
    (tmp_path / "validate.json").rename(tmp_path / "validation.json")
    assert len(load_source(spec).splits["validation"]) == 1
    (tmp_path / "imgs").rename(tmp_path / "elsewhere")
    (tmp_path / "imgs.zip").write_bytes(b"")
    with pytest.raises(FastLNError, match=r"imgs\.zip: unpack the images first, into .*imgs"):
        load_source(spec)


def test_missing_files(tmp_path):
    spec = SLAKE.make(tmp_path)
    (tmp_path / "validate.json").unlink()
    with pytest.raises(FastLNError, match=r"validate\.json: this file is missing"):
        load_source(spec)
