"""What `save_adapter` accepts, `load_adapter` and peft load: for every family and every module that `also` names."""

import re
import warnings

import family_models
import peft
import pytest
import torch
from tuned import loss, move, tuned

import fastln
from fastln.errors import FastLNError

FAMILIES = [*family_models.MODELS, *family_models.VISION_MODELS]
SAMPLE = {  # one of each kind: words, a head, a list of blocks, a block, a projection, a whole tower
    "llama, tied": ("model.embed_tokens", "lm_head", "model.layers", "model.layers.1"),
    "bert": ("bert.embeddings", "cls.predictions.decoder", "bert.encoder.layer.0.attention.self.query"),
    "llava": ("model.multi_modal_projector", "lm_head", "model.vision_tower"),
}
SHARES, NO_NORM = "shares all its weights with", "no norm of this model trains"


def modules_of(name):
    """The modules that have parameters, one of each kind."""
    named = {re.sub(r"\d+", "0", n): n for n, m in family_models.make(name).named_modules() if n and [*m.parameters()]}
    return list(named.values())


def check(name, also, folder):
    """Save, load by fastln and by peft; return whether that was refused before anything was written."""
    try:
        model = tuned(name, [also])
    except FastLNError as error:
        if SHARES not in str(error):
            raise
        return "refused"
    try:
        fastln.save_adapter(model, folder)
    except FastLNError as error:
        if NO_NORM not in str(error) or folder.exists():
            raise
        return "refused"
    again = family_models.make(name)
    fastln.load_adapter(again, folder)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        wrapped = peft.PeftModel.from_pretrained(family_models.make(name), folder)
    # peft's wrapper of SigLIP's pooling attention leaves torch's fast path, which sums in another order.
    torch.testing.assert_close(loss(wrapped, name), loss(again, name), rtol=1e-6, atol=0)
    return "saved"


@pytest.mark.parametrize(("name", "also"), [(name, also) for name, given in SAMPLE.items() for also in given])
def test_an_adapter_that_was_saved_can_be_loaded(name, also, tmp_path):
    shared = {("llama, tied", "lm_head"), ("bert", "cls.predictions.decoder")}
    assert check(name, also, tmp_path / "adapter") == ("refused" if (name, also) in shared else "saved")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_that_holds_for_every_module_of_every_family(name, tmp_path):
    outcomes = [check(name, also, tmp_path / str(number)) for number, also in enumerate(modules_of(name))]
    assert outcomes.count("saved") > 10


@pytest.mark.parametrize("name", ["llama, tied", "llama"])
@pytest.mark.parametrize("also", [(), ("model.embed_tokens",)])
def test_a_resized_vocabulary_is_named_with_what_to_do_and_then_loads(name, also, tmp_path):
    def resized():
        model = family_models.make(name)
        torch.manual_seed(3)
        model.resize_token_embeddings(family_models.N_CLASSES + 8)
        return model

    model = fastln.prepare(resized(), also=also, backend="reference")
    move(model)
    fastln.save_adapter(model, tmp_path)
    with pytest.raises(
        FastLNError, match=r"has 168 tokens there and 160 here; call model\.resize_token_embeddings\(168\)"
    ):
        fastln.load_adapter(family_models.make(name), tmp_path)
    again = resized()
    fastln.load_adapter(again, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    other = family_models.make(name, seed=1)
    if not also:
        with pytest.raises(
            FastLNError, match=r"resize_token_embeddings\(168\).*; besides, \d+ of \d+ frozen parameters"
        ):
            fastln.load_adapter(other, tmp_path)
