"""What trains, counted."""

import pytest
import tiny
import torch
from transformers import BlipConfig, BlipForQuestionAnswering

import fastln
from fastln.engines import apply_method
from fastln.errors import FastLNError
from fastln.methods import METHODS, count_parameters, get_method, norm_parameters


def trained(task):
    return {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}


def test_counts_of_the_published_small_model():
    """arXiv 2404.16385's small model: ViT-B/16 at 480 x 480, two 12-layer BERTs; 361.48M in all, 153,600 in norms."""
    with torch.device("meta"):
        model = BlipForQuestionAnswering(
            BlipConfig(
                vision_config={"image_size": 480},
                text_config={"num_attention_heads": 12, "vocab_size": 30524},
            )
        )
    model.tie_weights()
    fastln.prepare(model)
    n_trained, n_total = count_parameters(model)
    assert n_trained == 153_600
    assert round(n_total / 1e6, 2) == 361.48


@pytest.mark.parametrize("kind", tiny.TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_engine_trains_as_many_parameters(kind, method, tmp_path):
    data = tiny.phantom()
    counts = set()
    for engine in METHODS[method].engines:
        task = tiny.TASKS[kind](tmp_path, data)
        counts.add(count_parameters(apply_method(task, method, engine))[0])
    assert len(counts) == 1
    assert counts.pop() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_starts_random_trains_under_every_method(method, tmp_path):
    task = tiny.dual(tmp_path, tiny.phantom())
    n_head = count_parameters(task.model.fusion_head)[1]
    apply_method(task, method)
    assert count_parameters(task.model.fusion_head)[0] == n_head


def test_selections(tmp_path):
    data = tiny.phantom()

    def selection(method):
        task = tiny.dual(tmp_path, data)
        apply_method(task, method, "torch")
        return {name for name in trained(task) if not name.startswith("fusion_head.")}

    everything = selection("full")
    norms = set(norm_parameters(tiny.dual(tmp_path, data).model))
    assert selection("layernorm") == norms
    assert selection("bitfit") == {name for name in everything if name.endswith(".bias")}
    assert selection("head") == set()
    # Two norms per layer, two layers and one norm more, in each of two towers; a weight and a bias each.
    assert len(norms) == 2 * (2 * 2 + 1) * 2
    assert len(everything) > len(norms)


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(FastLNError, match=r"unknown method 'lra'; did you mean 'lora'\? \(valid: layernorm, lora"):
        get_method("lra")
    with pytest.raises(FastLNError, match=r"does not run on engine 'fastln' \(valid: peft\)"):
        get_method("lora", "fastln")


def test_a_module_to_train_also_must_exist(tmp_path):
    model = tiny.dual(tmp_path, tiny.phantom()).model
    with pytest.raises(FastLNError, match="there is no module 'fusion_haed' with parameters"):
        fastln.prepare(model, also=["fusion_haed"])


def test_a_method_that_trains_nothing_says_so(tmp_path):
    model = tiny.dual(tmp_path, tiny.phantom()).model
    with pytest.raises(FastLNError, match="name the task head's modules with `also`"):
        fastln.prepare(model, "head")
    fastln.prepare(model, "head", also="fusion_head")
    assert count_parameters(model)[0] == count_parameters(model.fusion_head)[1]
