"""Fingerprints: what they notice, and that they hold whichever dtype a checkpoint is loaded in."""

from types import SimpleNamespace

import family_models
import pytest
import torch
from torch import nn
from tuned import tuned

from fastln.errors import FastLNError
from fastln.fingerprint import difference, fingerprint
from fastln.methods import norm_parameters

# The fingerprint of the model in the test for it, computed before fingerprints had versions.
BEFORE = "a0f03e49e43873519042f1bd3634ef23c5d08de4ad0c1bf6cd5d102165611474"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bert(*dtypes, seed=0):
    model = family_models.make("bert", seed)
    with torch.no_grad():
        # Some too small for float16's full precision, one too large.
        model.bert.encoder.layer[0].output.dense.weight[:8] *= 1e-4
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = 1e5
    for dtype in dtypes:
        model.to(dtype)
    return model


def test_a_fingerprint_notices_the_frozen_weights_and_nothing_else():
    model = family_models.make("bert")
    norms = norm_parameters(model)
    found = fingerprint(model, norms)
    assert fingerprint(tuned("bert"), norms) == found, "the norms are left out"
    assert difference(found, model, norms) is None
    assert fingerprint(family_models.make("bert"), norms[1:]) != found
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight *= 1.01
    assert (
        "1 of 30 frozen parameters differ from those it was saved beside, for example bert.encoder.layer.1.output"
        in difference(found, model, norms)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float32_checkpoint_has_one_base_in_every_dtype(dtype):
    assert difference(fingerprint(bert(dtype)), bert()) is None
    assert difference(fingerprint(bert()), bert(dtype)) is None
    assert difference(fingerprint(bert(dtype)), bert(dtype, torch.float32)) is None
    assert "of 42 frozen parameters differ" in difference(fingerprint(bert()), bert(dtype, seed=1))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", DTYPES)
def test_so_has_a_checkpoint_of_16_bits(stored, loaded):
    assert difference(fingerprint(bert(stored)), bert(stored, loaded)) is None
    assert difference(fingerprint(bert(stored, loaded)), bert(stored)) is None


@pytest.mark.parametrize(("one", "other"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_where_two_dtypes_cannot_be_compared_the_message_names_them(one, other):
    found = fingerprint(bert(getattr(torch, one)))
    differs = difference(found, bert(getattr(torch, other)))
    assert f"the fingerprint is of {one}, the weights are {other}" in differs
    assert "load the base in float32" in differs
    assert difference(found, bert()) is None


def test_a_fingerprint_without_a_version_is_compared_by_its_own_rule():
    model = nn.Linear(12, 9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 7)
    model.config = SimpleNamespace(answers=["yes", "no"])
    assert difference(BEFORE, model) is None
    assert difference(BEFORE, model.bfloat16()) is None
    model.config.answers = ["no", "yes"]
    differs = difference(BEFORE, model)
    assert "the answers that the model chooses from, differ" in differs
    assert "float16" not in differs
    assert "the fingerprint is of bfloat16, the weights are float16" in difference(BEFORE, model.half())


def test_an_old_fingerprint_that_does_not_fit_says_why_that_may_be():
    differs = difference(BEFORE, nn.Linear(12, 9))
    assert "the fingerprint is of the older form, which does not know the dtype of its base" in differs


def test_a_base_that_is_quantised_twice_is_one_base():
    def quantised(seed):
        base = family_models.make("llama", seed)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if parameter.dim() == 2:
                    scale = parameter.abs().amax() / 127
                    owner, _, own = name.rpartition(".")
                    whole = (parameter / scale).round().to(torch.int8)
                    setattr(base.get_submodule(owner), own, nn.Parameter(whole, requires_grad=False))
                    base.get_submodule(owner).register_buffer("scale", scale)
        return base

    norms = norm_parameters(quantised(0))
    assert difference(fingerprint(quantised(0), norms), quantised(0), norms) is None
    assert "frozen parameters differ" in difference(fingerprint(quantised(0), norms), quantised(1), norms)


def test_a_fingerprint_of_a_later_version_says_so():
    with pytest.raises(FastLNError, match="of version v3; this fastln reads up to v2"):
        difference("v3 sha=1", bert())
