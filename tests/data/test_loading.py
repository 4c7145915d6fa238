"""`load_dataset`: specs, splits, the validation share."""

import dataclasses
import json

import pytest
from PIL import Image

from fastln.data import DataOptions, load_dataset, load_source
from fastln.data.loading import READERS
from fastln.errors import FastLNError


@pytest.mark.parametrize(
    ("arguments", "fraction", "reason"),
    [
        (
            ("phantom", "tset"),
            0,
            "there is no split 'tset'; the splits are train, validation, test; did you mean 'test'?",
        ),
        (("phantom", ""), 0, "the splits are train, validation, test"),
        (("phantom", "validation"), 0, "--validation (validation_fraction), now 0"),
        (("phantom", "train"), 1.0, "up to but not including 1, not 1.0"),
        (("phantom", "train"), -0.1, "not -0.1"),
        (("phantom", "train"), float("nan"), "not nan"),
        (("phantom", "validation"), 1e-9, "the validation split holds no usable row with validation_fraction 1e-09"),
        (("phantm", "train"), 0, "there is no data 'phantm'; give the folder or file of a dataset, or 'phantom'"),
    ],
)
def test_bad_arguments(arguments, fraction, reason):
    with pytest.raises(FastLNError) as caught:
        load_dataset(*arguments, validation_fraction=fraction)
    assert reason in str(caught.value)


def test_an_unknown_layout_tells_what_each_looks_like(tmp_path):
    with pytest.raises(FastLNError) as caught:
        load_source(str(tmp_path))
    first, *known = str(caught.value).splitlines()
    assert first == f"{tmp_path}: no known layout. The known ones:"
    assert [line.split(":")[0].strip() for line in known] == list(READERS)
    assert "  vqa-rad: trainset.json and testset.json, or 'VQA_RAD Dataset Public.json'" in known[0]


def test_the_layout_can_be_named(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"image": "a.png", "question": "Q", "answer": "A", "conversations": ""}))
    with pytest.raises(FastLNError, match="must be a list of questions"):
        load_source(str(file))
    assert load_source(str(file), DataOptions(layout="plain")).splits["train"][0].answer == "A"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            DataOptions(layout="slak"),
            "there is no layout 'slak'; the layouts are vqa-rad, slake, path-vqa, parquet, iu-xray",
        ),
        (DataOptions(layout="slak"), "did you mean 'slake'?"),
        (DataOptions(layout="vqa-rad"), "no folder of images; looked for 'images' and 'VQA_RAD Image Folder'"),
        (DataOptions(layout="slake"), "no folder of images; looked for 'imgs'"),
        (DataOptions(layout="path-vqa"), "no folder of images; looked for 'images'"),
        (DataOptions(layout="parquet"), "no Parquet files; looked for train-*.parquet, train.parquet and train/*"),
        (DataOptions(layout="iu-xray"), "no folder of images; looked for 'images'"),
        (DataOptions(layout="llava-med"), "no file of rows; looked for train, validation (or val), test.json|.jsonl"),
        (DataOptions(layout="plain"), "no file of rows"),
        (DataOptions(layout="plain", language="en"), "no language 'en' to choose: it has one"),
        (DataOptions(layout="slake", language="de"), "no language 'de' to choose: it has en, zh"),
    ],
)
def test_options_that_do_not_go_with_the_data(tmp_path, options, reason):
    with pytest.raises(FastLNError) as caught:
        load_source(str(tmp_path), options)
    assert reason in str(caught.value)


def test_a_published_validation_split_is_the_one():
    source = load_source("phantom")
    with pytest.raises(
        FastLNError,
        match=r"has no validation split, only train, test; --validation \(validation_fraction\), now 0, can",
    ):
        source.dataset("validation")
    published = dataclasses.replace(source, splits=source.splits | {"validation": source.splits["test"]})
    assert published.dataset("validation").samples == source.splits["test"]
    with pytest.raises(FastLNError, match=r"already has a validation split: validation_fraction must be 0, not 0.1"):
        published.dataset("train", validation_fraction=0.1)


def test_validation_is_a_fixed_share_of_training_whole_images_at_a_time():
    whole = load_dataset("phantom", "train").samples
    train, validation = (
        load_dataset("phantom", split, validation_fraction=0.2).samples for split in ("train", "validation")
    )
    assert [s for s in whole if s in set(train)] == train
    assert sorted(s.id for s in train + validation) == sorted(s.id for s in whole)
    assert 0.15 < len(validation) / len(whole) < 0.25
    assert not {s.image for s in train} & {s.image for s in validation}
    larger = load_dataset("phantom", "validation", validation_fraction=0.3).samples
    assert set(validation) < set(larger)
    assert load_dataset("phantom", "test", validation_fraction=0.2).samples == load_dataset("phantom", "test").samples
