"""`load_dataset`: specs, splits, the validation share."""

import pytest

from fastln.data import load_dataset
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
        (("phantom", "validation"), 0, "validation_fraction, now 0"),
        (("phantom", "train"), 1.0, "up to but not including 1, not 1.0"),
        (("phantom", "train"), -0.1, "not -0.1"),
        (("phantom", "train"), float("nan"), "not nan"),
        (("phantom", "validation"), 1e-9, "the validation split holds no question with validation_fraction 1e-09"),
        (("phantm", "train"), 0, "there is no data folder 'phantm'; give the folder of a dataset, or 'phantom'"),
    ],
)
def test_bad_arguments(arguments, fraction, reason):
    with pytest.raises(FastLNError) as caught:
        load_dataset(*arguments, validation_fraction=fraction)
    assert reason in str(caught.value)


def test_an_unknown_layout_tells_what_was_looked_for(tmp_path):
    with pytest.raises(FastLNError) as caught:
        load_dataset(str(tmp_path), "train")
    assert str(tmp_path) in str(caught.value)
    assert "looked for: trainset.json and testset.json, or 'VQA_RAD Dataset Public.json'" in str(caught.value)


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
