"""Adapters: what is saved comes back, through peft in both directions."""

import json
import warnings

import family_models
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaConfig, Qwen2_5_VLConfig
from tuned import loss, move, tuned

import fastln
from fastln import adapters
from fastln.adapters import CONFIG, WEIGHTS
from fastln.errors import FastLNError
from fastln.families import find_norms
from fastln.fingerprint import FINGERPRINT, fingerprint
from fastln.methods import norm_parameters

FAMILIES = {
    "bert": ["cls"],
    "vit": ["classifier"],
    "llama": [],
    "llama, tied": [],
    "gpt2": [],
    "blip": [],
    "clip": [],
    "llava": [],
}


@pytest.mark.parametrize(("name", "also"), FAMILIES.items())
def test_peft_loads_what_fastln_saved(name, also, tmp_path):
    model = tuned(name, also)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fastln.save_adapter(model, tmp_path)
    base = family_models.make(name)
    before = loss(base, name)
    fastln.restore(model)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys that it misses
        assert torch.equal(loss(loaded, name), loss(model, name))
    assert loss(model, name) != before
    wrapped = {n.removeprefix("base_model.model.") for n, m in loaded.named_modules() if hasattr(m, "ln_tuning_layers")}
    inside = tuple(f"{module}." for module in also)
    norms = {n for n, _ in find_norms(family_models.make(name)) if not n.startswith(inside)}
    # LLaVA takes its features from the last vision layer but one: the norms above do not train.
    assert wrapped == {n for n in norms if f"{n}.weight" in trained}
    assert wrapped == norms or name == "llava"


@pytest.mark.parametrize(("name", "also"), {**FAMILIES, "bert": []}.items())
def test_fastln_loads_what_peft_saved(name, also, tmp_path):
    base = family_models.make(name)
    inside = tuple(f"{module}." for module in also)
    norms = [n for n, _ in find_norms(base) if not n.startswith(inside)]
    config = peft.LNTuningConfig(target_modules=norms, modules_to_save=also or None)
    wrapped = peft.get_peft_model(base, config)
    move(wrapped)
    wrapped.save_pretrained(tmp_path)
    for prepared in (False, True):
        model = family_models.make(name)
        if prepared:
            fastln.prepare(model, also=also, backend="reference")
        fastln.load_adapter(model, tmp_path)
        if prepared:
            fastln.restore(model)
        assert torch.equal(loss(model, name), loss(wrapped, name))
    assert loss(model, name) != loss(family_models.make(name), name)


@pytest.mark.parametrize(("name", "also"), FAMILIES.items())
def test_fastln_loads_what_it_saved_bit_for_bit_in_bfloat16(name, also, tmp_path):
    model = tuned(name, also, torch.bfloat16)
    fastln.save_adapter(model, tmp_path)
    again = fastln.prepare(family_models.make(name).bfloat16(), also=also, backend="reference")
    fastln.load_adapter(again, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    names = [name for name in norm_parameters(model) if model.get_parameter(name).requires_grad]
    assert all(again.get_parameter(name).dtype == torch.float32 for name in names)
    stored = load_file(tmp_path / WEIGHTS)
    assert all(tensor.dtype == torch.float32 for name, tensor in stored.items() if "ln_tuning_layers" in name)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == (also or None)


def test_half_precision_takes_half_the_bytes_and_says_what_it_rounds(tmp_path):
    model = tuned("llama", dtype=torch.bfloat16)
    fastln.save_adapter(model, tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"float16 rounds [\d,]+ of [\d,]+ tuned values, by up to .*a wider dtype"):
        fastln.save_adapter(model, tmp_path / "half", dtype=torch.float16)
    whole, half = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "half"))
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in whole.items())
    again = fastln.prepare(family_models.make("llama").bfloat16(), backend="reference")
    fastln.load_adapter(again, tmp_path / "half")
    for name in norm_parameters(model):
        assert again.get_parameter(name).dtype == torch.float32
        assert torch.equal(again.get_parameter(name), model.get_parameter(name).half().float())
    with pytest.raises(FastLNError, match="an adapter in torch"):
        fastln.save_adapter(model, tmp_path / "half", dtype=torch.int16)
    with torch.no_grad():
        model.model.norm.weight[3] = 7e4
    with pytest.raises(FastLNError, match=r"model\.norm\.weight has values beyond the range of torch\.float16"):
        fastln.save_adapter(model, tmp_path / "half", dtype=torch.float16)


LARGE = {
    "LLaVA-Med's layout": LlavaConfig(
        text_config={
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
        },
    ),
    "Qwen2.5-VL": Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_adapters_of_seven_billion_parameters_are_below_a_megabyte_in_half_precision(name, tmp_path, monkeypatch):
    with torch.device("meta"):
        model = fastln.prepare(AutoModelForImageTextToText.from_config(LARGE[name]), backend="reference")
    assert sum(p.numel() for p in model.parameters()) > 7e9
    for _, norm in find_norms(model):
        norm.to_empty(device="cpu")
        for parameter in norm.parameters(recurse=False):
            nn.init.ones_(parameter)
    monkeypatch.setattr(adapters, "fingerprint", lambda *_: 64 * "0")  # there are no frozen weights to look at
    for dtype in (torch.float16, torch.float32):
        fastln.save_adapter(model, tmp_path, dtype=dtype)
        n_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert (n_bytes < 1e6) == (dtype == torch.float16), n_bytes


def test_a_tied_weight_with_a_value_of_its_own_is_refused(tmp_path):
    """peft copies BERT's head, and trains what was one with the word embeddings apart from them."""
    wrapped = peft.get_peft_model(
        family_models.make("bert"),
        peft.LNTuningConfig(target_modules=["bert.embeddings.LayerNorm"], modules_to_save=["cls"]),
    )
    move(wrapped)
    wrapped.save_pretrained(tmp_path)
    model = family_models.make("bert")
    with pytest.raises(FastLNError, match=r"this model shares it with bert\.embeddings.word_embeddings.weight"):
        fastln.load_adapter(model, tmp_path)
    stock = family_models.make("bert").state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in model.state_dict().items())


SHARED = {
    "llama, tied": ("model.embed_tokens", ["lm_head"]),
    "gpt2": ("transformer.wte", ["lm_head"]),
    "t5": ("shared", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    "bert": ("bert.embeddings.word_embeddings", ["cls.predictions.decoder"]),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_weight_that_trains_is_saved_for_every_module_that_shares_it(name, tmp_path):
    first, others = SHARED[name]
    model = tuned(name, [first])
    fastln.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == [first, *others]
    again = family_models.make(name)
    fastln.load_adapter(again, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert loss(again, name) != loss(family_models.make(name), name)
    wrapped = peft.PeftModel.from_pretrained(family_models.make(name), tmp_path)
    assert torch.equal(loss(wrapped, name), loss(again, name))


@pytest.mark.parametrize("name", ["llama, tied", "gpt2"])
def test_a_module_whose_weights_all_belong_to_another_says_to_which(name):
    with pytest.raises(FastLNError, match=rf"'lm_head' shares all its weights with '{SHARED[name][0]}'"):
        fastln.prepare(family_models.make(name), also="lm_head")


def test_two_values_for_a_shared_weight_are_refused(tmp_path):
    """peft trains copies of the two apart."""
    config = peft.LNTuningConfig(target_modules=["model.norm"], modules_to_save=["model.embed_tokens", "lm_head"])
    wrapped = peft.get_peft_model(family_models.make("llama, tied"), config)
    move(wrapped)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(FastLNError, match=r"has a value of its own .* load the base with tie_word_embeddings=False"):
        fastln.load_adapter(family_models.make("llama, tied"), tmp_path)
    untied = family_models.make("llama")
    fastln.load_adapter(untied, tmp_path)
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


def test_a_shared_weight_that_stayed_frozen_keeps_the_bases_digits(tmp_path):
    """The head's product in BERT is by the word embeddings, which belong to no task head."""
    fastln.save_adapter(tuned("bert", ["cls"], torch.bfloat16), tmp_path)
    model = family_models.make("bert")
    fastln.load_adapter(model, tmp_path)
    stock = family_models.make("bert").bert.embeddings.word_embeddings.weight
    assert torch.equal(model.cls.predictions.decoder.weight, stock)


@pytest.mark.parametrize(("name", "auto"), [("llama", "ForCausalLM"), ("llama", ""), ("vit", "")])
def test_pefts_auto_classes_find_the_base(name, auto, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    family_models.make(name).save_pretrained(tmp_path / "base")
    model = type(family_models.make(name)).from_pretrained(tmp_path / "base")
    fastln.prepare(model, backend="reference")
    move(model)
    fastln.save_adapter(model, tmp_path / "adapter")
    loaded = getattr(peft, f"AutoPeftModel{auto}").from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is type(family_models.make(name))
    assert torch.equal(loss(loaded, name), loss(fastln.restore(model), name))


def test_a_scope_saves_its_norms_alone(tmp_path):
    model = tuned("clip", scope="vision")
    fastln.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    norms = [name for name in norm_parameters(model) if name.startswith("vision_model.")]
    assert len(stored) == len(norms)
    assert all(".vision_model." in name for name in stored)


def test_peft_takes_no_module_whose_name_ends_like_a_norms(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.block = nn.ModuleDict({"norm": nn.LayerNorm(4)})

        def forward(self, x):
            return self.norm(self.block["norm"](x) + x)

    model = fastln.prepare(Model(), backend="reference")
    model.block["norm"].requires_grad_(False)
    move(model)
    fastln.save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path)
    assert hasattr(loaded.base_model.model.norm, "ln_tuning_layers")
    assert not hasattr(loaded.base_model.model.block["norm"], "ln_tuning_layers")
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), fastln.restore(model)(x))


def test_whole_modules_may_hold_norms_of_their_own(tmp_path):
    model = tuned("bert", ["cls"])
    fastln.save_adapter(model, tmp_path)
    again = family_models.make("bert")
    fastln.load_adapter(again, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert not any(name.startswith("cls") for name in targets)


def test_merging_in_float32_warns_of_nothing_and_loading_into_bfloat16_does(tmp_path):
    model = tuned("llama")
    fastln.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastln.merge_adapter(model, tmp_path / "merged")
        merged = type(model).from_pretrained(tmp_path / "merged")
        loaded = family_models.make("llama")
        fastln.load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loss(merged, "llama"), loss(loaded, "llama"))
    with pytest.warns(UserWarning, match=r"bfloat16 rounds .*call fastln.prepare\(model\) before loading"):
        fastln.load_adapter(family_models.make("llama").bfloat16(), tmp_path / "adapter")


def test_the_fingerprint_is_in_the_tensors_file(tmp_path):
    model = tuned("bert")
    fastln.save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata()[FINGERPRINT] == fingerprint(model, norm_parameters(model))


@pytest.mark.slow(pool="large")
def test_the_adapter_of_blip_vqa_is_below_a_megabyte(tmp_path):
    from transformers import BlipConfig, BlipForQuestionAnswering

    model = fastln.prepare(BlipForQuestionAnswering(BlipConfig()).bfloat16())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 153_600
    fastln.save_adapter(model, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1e6
