"""Shapes: what a specification makes, and what a wrong one gets."""

import pytest
import torch

from fastln.errors import FastLNError
from fastln.methods import count_parameters
from fastln.models.shapes import FAMILIES, Shape, is_shape, make_shape, parse_shape
from fastln.training.tasks import apply_method

# Parameters as the models' papers and checkpoints have them, and those of the norms.
COUNTS = {
    "BertForMaskedLM:8x128": (109_515_834, 39_936),
    "ViTForImageClassification:8x224": (85_800_194, 38_400),
    "BlipForQuestionAnswering:2x480": (361_478_972, 153_600),
    "LlamaForCausalLM:2x640": (168_313_856, 17_408),
}


@pytest.mark.parametrize("spec", COUNTS)
def test_sizes_are_those_of_the_published_models(spec):
    shape = parse_shape(spec)
    with torch.device("meta"):
        model = FAMILIES[shape.family].make(shape.size, shape.n_layers)
    total, _ = count_parameters(model)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name.lower())
    assert (total, norms) == COUNTS[spec]


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_its_own_batch(family):
    size = 24 if "LM" in family else 56
    task = make_shape(f"{family}:3x{size}:1")
    assert {len(t) for t in task.batch.values()} == {3}
    assert task.model(**task.batch).loss.isfinite()


def test_same_seed_same_task():
    spec = "ViTForImageClassification:2x32:1"
    one, same, other = (make_shape(spec, dtype=torch.bfloat16, seed=seed) for seed in (3, 3, 4))
    assert one.batch["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(one.batch["pixel_values"], same.batch["pixel_values"])
    assert not torch.equal(one.batch["pixel_values"], other.batch["pixel_values"])
    losses = [task.model(**one.batch).loss for task in (one, same, other)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("method", "engine"), [("layernorm", "fastln"), ("layernorm", "peft"), ("lora", "peft")])
def test_methods_train_nothing_else(method, engine):
    task = make_shape("ViTForImageClassification:1x32:2")
    assert task.random_weights
    trained, _ = count_parameters(apply_method(task, method, engine))
    assert trained == {"layernorm": 5 * 2 * 768, "lora": 2 * 2 * 2 * 8 * 768}[method]


def test_labels_are_where_the_task_has_them():
    masked, causal = (FAMILIES[name].batch(2, 40)["labels"] for name in ("BertForMaskedLM", "LlamaForCausalLM"))
    assert (masked != -100).sum(1).tolist() == [6, 6]
    assert (causal != -100).nonzero()[:, 1].tolist() == [*range(32, 40)] * 2


def test_what_is_a_shape():
    assert is_shape("BertForMaskedLM:8x128")
    assert parse_shape("BertForMaskedLM:8x128") == Shape("BertForMaskedLM", 8, 128, 12)
    assert parse_shape("LlamaForCausalLM:2x640:3").n_layers == 3
    assert not any(map(is_shape, ("dual", "dual:a,b", "blip:a.json", "some/folder")))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("BertForMaskedLM", "not of the form CLASS:BATCHxSIZE"),
        ("BertForMaskedLM:0x8", "not of the form"),
        ("BertForMaskedLM:8x128:", "not of the form"),
        ("BertForMaskdLM:8x128", r"there is no 'BertForMaskdLM' \(did you mean 'BertForMaskedLM'\?\)"),
    ],
)
def test_a_wrong_shape_is_told(spec, message):
    assert is_shape(spec)
    with pytest.raises(FastLNError, match=message):
        parse_shape(spec)
