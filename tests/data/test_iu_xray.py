"""R2Gen's chest X-ray reports: views, and what its file can have wrong beside what every reader tells."""

import json

import pytest
from layouts import LAYOUTS, without

from fastln.data import load_source
from fastln.errors import FastLNError

IU = LAYOUTS["iu-xray"]


@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_a_study_has_all_its_views(tmp_path, n_views):
    paths = ["CXR0_IM-0001/0.png", "CXR0_IM-0001/1.png", "CXR1_IM-0001/0.png"][:n_views]
    (sample,) = load_source(IU.make(tmp_path, train=[IU.row(0) | {"image_path": paths}])).splits["train"]
    assert list(sample.images) == paths
    assert sample.is_report


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_path": []}, "field 'image_path' must be a list of at least one image, not []"),
        ({"image_path": "a.png"}, "field 'image_path' must be a list of at least one image, not \"a.png\""),
        ({"image_path": [3]}, "an image of field 'image_path' must be a text, not 3"),
        ({"report": 3}, "field 'report' must be a text, not 3"),
        ({"id": None}, "field 'id' must be a text, not null"),
    ],
)
def test_bad_fields(tmp_path, change, reason):
    with pytest.raises(FastLNError) as caught:
        load_source(IU.make(tmp_path, validation=[IU.row(0) | change]))
    assert "annotation.json: val: row 0 (id " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("field", ["id", "report", "image_path"])
def test_missing_fields(tmp_path, field):
    with pytest.raises(FastLNError, match=f"field '{field}' "):
        load_source(IU.make(tmp_path, train=[without(IU.row(0), field)]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "annotation.json: an object with the lists train, val and test is needed, this begins with '['"),
        ("", "annotation.json: an object with the lists train, val and test is needed, this begins with '\"'"),
        ({"train": [], "val": [], "dev": {}}, "annotation.json: no list test; R2Gen's file has train, val and test"),
        ({"train": [], "val": {}}, "annotation.json: val: a JSON list of rows is needed, this begins with '{'"),
    ],
)
def test_a_file_without_the_lists(tmp_path, content, reason):
    spec = IU.make(tmp_path)
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    with pytest.raises(FastLNError) as caught:
        load_source(spec)
    assert reason in str(caught.value)
