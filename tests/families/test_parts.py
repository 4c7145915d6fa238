"""Attention, feed-forward networks, norms, heads and sub-models: exact counts, by formulas of the configurations."""

import family_models
import pytest
import torch
import transformers
from torch import nn

from fastln.engines import put_method
from fastln.errors import FastLNError
from fastln.families import find_norms, sub_models
from fastln.families.parts import attention_maps
from fastln.methods import count_parameters, get_method, select_parameters

D, F, N = 32, 64, 2  # width, hidden width and layers of every tiny model
KV = 16  # of Llama's kin: one key-value head
VOCABULARY, PATCH = family_models.N_CLASSES, 3 * 8 * 8


def linear(n_in, n_out, *, bias=True):
    return n_in * n_out + bias * n_out


def attention(*, bias=True, d=D):
    return 4 * linear(d, d, bias=bias)


def grouped(qkv_bias):
    return linear(D, D, bias=qkv_bias) + 2 * linear(D, KV, bias=qkv_bias) + linear(D, D, bias=False)


MLP = linear(D, F) + linear(F, D)
GATED = 3 * D * F
LN, RMS = 2 * D, D
# name: (norms, attention, feed-forward networks)
COUNTS = {
    # The embeddings' norm, two a layer, the language-model head's.
    "bert": (LN * (1 + 2 * N + 1), attention() * N, MLP * N),
    # A tower and the text encoder have one norm beside the layers', the decoder's head another; text layers have
    # cross-attention with a norm of its own.
    "blip": (LN * ((2 * N + 1) + (3 * N + 1) + (3 * N + 2)), attention() * 5 * N, MLP * 3 * N),
    "gpt2": (LN * (2 * N + 1), attention() * N, (linear(D, 4 * D) + linear(4 * D, D)) * N),
    "opt": (LN * (2 * N + 1), attention() * N, MLP * N),
    "llama": (RMS * (2 * N + 1), grouped(False) * N, GATED * N),
    "mistral": (RMS * (2 * N + 1), grouped(False) * N, GATED * N),
    "qwen2": (RMS * (2 * N + 1), grouped(True) * N, GATED * N),
    "gemma": (RMS * (2 * N + 1), grouped(False) * N, GATED * N),
    "vit": (LN * (2 * N + 1), attention() * N, MLP * N),
    "dinov2": (LN * (2 * N + 1), attention() * N, (linear(D, 4 * D) + linear(4 * D, D)) * N),
    # CLIP's vision tower has a norm before its layers too.
    "clip": (LN * ((2 * N + 1) + (2 * N + 2)), attention() * 2 * N, MLP * 2 * N),
    # SigLIP's pools by attention, with a norm and an MLP behind it.
    "siglip": (LN * (2 * (2 * N + 1) + 1), attention() * (2 * N + 1), MLP * (2 * N + 1)),
    # The image's features come from the last layer but one.
    "llava": (
        LN * (1 + 2 * (N - 1)) + RMS * (2 * N + 1),
        attention() * (N - 1) + grouped(False) * N,
        MLP * (N - 1) + GATED * N,
    ),
}


def counted(model, method, scope=None):
    names = select_parameters(model, get_method(method)[0], scope)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    model = family_models.make(name)
    assert tuple(counted(model, method) for method in ("layernorm", "attention", "ffn")) == COUNTS[name]


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2", "opt", "qwen2", "llava"])
def test_layernorm_full_adds_word_embeddings_head_and_projector(name):
    model = family_models.make(name)
    untied = name not in ("llama, tied", "gpt2", "opt")
    projector = linear(D, D) * 2 if name == "llava" else 0
    added = VOCABULARY * D * (1 + untied) + projector
    assert counted(model, "layernorm-full") == counted(model, "layernorm") + added


def test_layernorm_full_of_an_image_classifier_adds_its_classifier():
    model = family_models.make("vit")
    assert counted(model, "layernorm-full") == counted(model, "layernorm") + linear(D, 2)


@pytest.mark.parametrize("name", ["bert", "blip", "vit", "siglip", "qwen2.5-vl"])
def test_every_linear_map_of_a_layer_is_attention_or_feed_forward_and_none_is_both(name):
    model = family_models.make(name)
    parts = [select_parameters(model, get_method(method)[0], None) for method in ("layernorm", "attention", "ffn")]
    assert sum(map(len, parts)) == len(set().union(*parts))
    layers = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = {name for name, _ in model.named_parameters() if name.startswith(tuple(layers))}
    assert inside <= set().union(*parts)


def test_a_norm_inside_attention_is_a_norm():
    config = transformers.Qwen3Config(**family_models.LLAMA)
    model = transformers.Qwen3ForCausalLM(config)
    norms = {f"{name}.weight" for name, _ in find_norms(model)}
    assert {name for name in norms if "q_norm" in name}
    assert norms == select_parameters(model, get_method("layernorm")[0], None)
    assert not norms & select_parameters(model, get_method("attention")[0], None)


def test_layer_scale_class_tokens_and_positions_train_under_full_alone():
    model = family_models.make("dinov2")
    odd = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in ("lambda1", "cls_token")}
    odd |= {"dinov2.embeddings.position_embeddings", "dinov2.embeddings.mask_token"}
    for method in ("layernorm", "layernorm+bias", "layernorm-full", "bitfit", "attention", "ffn"):
        assert not odd & select_parameters(model, get_method(method)[0], None)
    assert odd <= select_parameters(model, get_method("full")[0], None)


def test_fused_and_expert_matrices_are_linear_maps():
    config = transformers.MixtralConfig(**family_models.LLAMA, num_local_experts=3)
    model = transformers.MixtralForCausalLM(config)
    assert counted(model, "ffn") == N * (3 * GATED + 3 * D)
    fused = nn.TransformerEncoderLayer(D, 2, F)
    assert counted(fused, "attention") == attention()
    assert counted(fused, "ffn") == MLP
    assert len(attention_maps(fused)) == 2


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("blip", ["vision", "text", "decoder"]),
        ("llava", ["vision", "projector", "decoder"]),
        ("qwen2.5-vl", ["vision", "projector", "decoder"]),
        ("clip", ["text", "vision", "projector"]),
        ("t5", ["text", "decoder"]),
        ("bert", []),
        ("llama", []),
    ],
)
def test_sub_models(name, parts):
    model = family_models.make(name)
    found = sub_models(model)
    assert list(found) == parts
    names = [name for part in found.values() for name in part]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Blip2ForConditionalGeneration", ["vision", "text", "projector", "decoder"]),
        ("Qwen3VLForConditionalGeneration", ["vision", "projector", "decoder"]),
    ],
)
def test_sub_models_of_models_of_full_size(name, parts):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        found = sub_models(cls(cls.config_class()))
    assert list(found) == parts
    mergers = [name for name in found["projector"] if "merger" in name]
    assert any("deepstack" in name for name in mergers) == (name == "Qwen3VLForConditionalGeneration")


def test_the_head_of_a_model_with_a_decoder_is_the_decoders():
    assert "lm_head.weight" in sub_models(family_models.make("llava"))["decoder"]
    assert all(".merger." in name for name in sub_models(family_models.make("qwen2.5-vl"))["projector"])


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_one_code_for_each_sub_model():
    parts = sub_models(family_models.make("blip"))
    model = put_method(family_models.make("blip"), "LN-F-T")
    norms = {f"{name}.{own}" for name, norm in find_norms(model) for own, _ in norm.named_parameters()}
    assert trained(model) == (norms & set(parts["vision"])) | set(parts["decoder"])
    as_scope = put_method(family_models.make("blip"), scope="LN-F-T")
    assert trained(as_scope) == trained(model)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model = put_method(family_models.make("blip"), "F-ATT-FFN")
    assert trained(model) == {
        name
        for name, _ in model.named_parameters()
        if (name.startswith("text_encoder") and "attention." in name and "LayerNorm" not in name)
        or (name.startswith("text_decoder") and (".intermediate.dense" in name or "r.0.output.d" in name))
        or (name.startswith("text_decoder") and "r.1.output.d" in name)
    }
    assert trained(put_method(family_models.make("llama"), "LN")) == trained(put_method(family_models.make("llama")))


@pytest.mark.parametrize(
    ("method", "scope", "message"),
    [
        ("LN-F", None, "has 2 codes, but BlipForQuestionAnswering has 3 sub-models: vision, text, decoder"),
        ("F-F-F", None, "trains nothing: every code is F"),
        ("LN-F-T", "vision", "leave out the scope 'vision'"),
        ("lora", "LN-F-T", "leave out the method 'lora'"),
        ("LN-F-X", None, "unknown method 'LN-F-X'"),
    ],
)
def test_codes_that_do_not_fit_are_refused(method, scope, message):
    model = family_models.make("blip")
    with pytest.raises(FastLNError, match=message):
        put_method(model, method, scope=scope)
    assert count_parameters(model)[0] == count_parameters(model)[1]
