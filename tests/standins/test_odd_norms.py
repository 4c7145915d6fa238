"""Norms whose classes do more than normalise: they keep their stock code, train, and are named in the log."""

import copy

import pytest
import torch
import transformers
from family_models import TEXT
from tiny import SIZES, WIDTH
from torch import nn
from transformers.models.moonshine_streaming.modeling_moonshine_streaming import MoonshineStreamingLayerNorm

import fastln
from fastln.families import find_norms
from fastln.methods import norm_parameters

SIZED = {**SIZES, **TEXT, "num_key_value_heads": 2, "head_dim": WIDTH // 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
MAMBA2 = {"num_heads": 4, "head_dim": 16, "state_size": 8, "chunk_size": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
LAYERS = ["linear_attention", "full_attention"]
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
GATED = {
    "one group": ("Mamba2", {**SIZED, **MAMBA2, "n_groups": 1}),
    "two groups": ("Mamba2", {**SIZED, **MAMBA2, "n_groups": 2}),
    "gate that may be left out": ("Bamba", {**SIZED, **MAMBA, "attn_layer_indices": [1]}),
    "gate after the norm": (
        "Qwen3Next",
        {**SIZED, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 32, "layer_types": LAYERS},
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in GATED), ("gate that may be left out", torch.bfloat16)],
)
def test_gated_norms_train_with_their_stock_code(name, dtype, caplog):
    torch.manual_seed(0)
    family, settings = GATED[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()
    gated = [key for key, module in model.named_modules() if type(module).__name__.endswith("RMSNormGated")]
    assert gated
    stock, trained = copy.deepcopy(model), norm_parameters(model)
    assert {f"{key}.weight" for key in gated} <= set(trained)
    for key, parameter in stock.named_parameters():
        parameter.requires_grad_(key in trained)
    ids = torch.randint(3, 90, (2, 16))
    with caplog.at_level("INFO"):
        fastln.prepare(model)
    assert all(f"{key} (" in caplog.text for key in gated)
    losses = [m(input_ids=ids, labels=ids).loss for m in (stock, model)]
    for loss in losses:
        loss.backward()
    error = size = 0.0
    for key in trained:
        got, want = (m.get_parameter(key).grad.double() for m in (model, stock))
        error, size = error + (got - want).square().sum().item(), size + want.square().sum().item()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(losses[1], losses[0], rtol=bound, atol=0.0)
    assert error**0.5 <= bound * size**0.5


def test_a_norm_is_one_whatever_its_vector_and_what_it_is_made_of_are_called(caplog):
    model = nn.ModuleDict({"norm": MoonshineStreamingLayerNorm(WIDTH), "linear": nn.Linear(WIDTH, WIDTH)}).bfloat16()
    assert [name for name, _ in find_norms(model)] == ["norm"]
    with caplog.at_level("INFO"):
        fastln.prepare(model)
    assert "norm (MoonshineStreamingLayerNorm)" in caplog.text
    assert "trains with stock code" in caplog.text
    y = model["norm"](torch.randn(2, WIDTH, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert model["norm"].gamma.grad.dtype == torch.float32


@pytest.mark.parametrize("family", ["Mamba", "FalconMamba"])
def test_code_that_casts_to_the_dtype_of_a_norm_gets_the_stock_one_back(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=100, hidden_size=WIDTH, num_hidden_layers=2, state_size=8
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16().train()
    ids = torch.randint(3, 90, (2, 16))
    want = model(input_ids=ids, labels=ids).loss.item()
    fastln.prepare(model)
    loss = model(input_ids=ids, labels=ids).loss
    assert loss.item() == pytest.approx(want, rel=1e-2)
    loss.backward()
    assert all(model.get_parameter(name).grad.dtype == torch.float32 for name in norm_parameters(model))


class AdaptiveLayerNorm(nn.Module):
    """A norm whose scale is computed from a condition."""

    def __init__(self, n_cols):
        super().__init__()
        self.norm = nn.LayerNorm(n_cols, elementwise_affine=False)
        self.scale = nn.Linear(n_cols, n_cols)

    def forward(self, x):
        return self.norm(x) * (1 + self.scale(x.mean(-2, keepdim=True)))


def odd_ones():
    parametrized = nn.utils.parametrize.register_parametrization(nn.LayerNorm(8), "weight", nn.Identity())
    parametrized.bias = None
    return nn.Sequential(
        nn.LayerNorm(8), nn.GroupNorm(2, 8), AdaptiveLayerNorm(8), nn.BatchNorm1d(8), nn.LayerNorm(8), parametrized
    )


@pytest.mark.parametrize(
    ("method", "also", "message"),
    [
        (
            "layernorm",
            (),
            "4 norms do not train, for example 1 (GroupNorm): norm tuning leaves out group and batch norms",
        ),
        ("layernorm", ("1", "3"), "2 norms do not train, for example 2 (AdaptiveLayerNorm): "),
        ("layernorm+bias", (), "1 norm does not train, for example 5 (ParametrizedLayerNorm): "),
        ("full", (), None),
    ],
)
def test_norms_that_stay_as_they_are_are_told_in_one_line(method, also, message, caplog):
    with caplog.at_level("WARNING", "fastln"):
        fastln.prepare(odd_ones(), method, also=also)
    told = [text for text in caplog.messages if "not train, for example" in text]
    assert len(told) == (message is not None)
    assert all(message in text for text in told)


def test_a_layer_that_says_it_has_no_norm_is_none(caplog):
    sizes = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
    model = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(**SIZES, **sizes, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    )
    fastln.prepare(model)
    assert "1 norm does not train, for example feature_extractor.conv_layers.0.layer_norm (GroupNorm)" in caplog.text


def test_a_parametrized_norm_keeps_its_code_and_is_told_of(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Softplus())
    model.bfloat16()
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    want = model(x)
    fastln.prepare(model)
    assert "1 norm does not train, for example 2 (ParametrizedLayerNorm)" in caplog.text
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]
    torch.testing.assert_close(model(x), want)


def test_a_sub_model_that_is_frozen_is_not_told_of(caplog):
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=SIZES, vision_config=SIZES, projection_dim=8))
    clip.vision_model.add_module("extra", nn.GroupNorm(2, 8))
    for scope, n_told in (("text", 0), ("vision", 1), (None, 1), ("LN-F-F", 0), ("F-LN-F", 1)):
        caplog.clear()
        fastln.restore(fastln.prepare(clip, scope=scope))
        assert sum("1 norm does not train" in text for text in caplog.messages) == n_told, scope


def test_what_a_forward_raises_that_looks_like_a_norms_is_in_the_debug_log(caplog):
    class Scale(nn.Module):
        eps = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            raise RuntimeError("takes pairs alone")

    model = nn.Sequential(Scale(), nn.LayerNorm(4))
    with caplog.at_level("DEBUG", "fastln"):
        assert [name for name, _ in find_norms(model)] == ["1"]
    assert "Scale is not taken for a norm: its forward raised RuntimeError('takes pairs alone')" in caplog.text
