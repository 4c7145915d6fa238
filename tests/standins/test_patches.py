"""Patch embeddings in units for float32: where they run, and stock's results."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import fastln
from fastln.families.patches import is_patch_embedding
from fastln.standins.part import stock_class
from fastln_kernels.cpu import products, units

WHY_NOT = products.why_not("linear")
compiled = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


class Model(nn.Module):
    def __init__(self, conv, dtype=torch.bfloat16):
        super().__init__()
        self.patches, self.norm = conv, nn.LayerNorm(conv.out_channels)
        self.to(dtype)

    def forward(self, x):
        return self.norm(self.patches(x).flatten(2).transpose(1, 2))


@pytest.fixture
def float32_units(monkeypatch):
    monkeypatch.setenv(units.VARIABLE, "float32")


def conv(dims=2, channels=3, width=32, kernel=4, **given):
    torch.manual_seed(0)
    cls = (nn.Conv2d, nn.Conv3d)[dims - 2]
    return cls(channels, width, kernel, **{"stride": kernel, **given})


def put(model):
    plan = fastln.plan(model)
    fastln.apply(plan, model)
    return next((change for change in plan.changes if change.stand_in == "patches"), None)


@compiled
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("dims", "sizes", "kernel"),
    [(2, (16, 16), 4), (2, (19, 13), (4, 3)), (3, (4, 9, 8), (2, 4, 4))],
    ids=["square", "a rest", "video"],
)
def test_results_are_those_of_stock(float32_units, dims, sizes, kernel, bias):
    model = Model(conv(dims, 4, kernel=kernel, bias=bias))
    x = torch.randn(12, 4, *sizes).bfloat16()
    want = model.patches.double()(x.double())
    model.patches.bfloat16()
    assert put(model).products == "exact"
    got = model.patches(x)
    assert (got.shape, got.dtype) == (want.shape, torch.bfloat16)
    error = (got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error < 2**-8  # a rounding of the weight, which happened before, and one of the result
    assert got.flatten(2).transpose(1, 2).is_contiguous()  # what follows in a ViT copies nothing


@compiled
def test_pixels_get_their_gradient_too(float32_units):
    model = Model(conv())
    x = torch.randn(2, 3, 16, 16).bfloat16().requires_grad_()
    (want,) = torch.autograd.grad(model.patches(x).float().square().sum(), x)
    put(model)
    (got,) = torch.autograd.grad(model.patches(x).float().square().sum(), x)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@compiled
def test_float32_and_autocast_run_as_linear_layers_too(float32_units, monkeypatch):
    model = Model(conv(), torch.float32)
    x = torch.randn(2, 3, 16, 16)
    want = model.patches(x)
    put(model)
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    torch.testing.assert_close(model.patches(x), want, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.patches(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@compiled
def test_an_image_smaller_than_a_patch_is_stock_s_error(float32_units):
    model = Model(conv())
    put(model)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        model.patches(torch.randn(1, 3, 3, 16).bfloat16())


@compiled
def test_patches_of_14_pixels_run_in_the_kernel(float32_units, monkeypatch):
    model = Model(conv(kernel=14))
    x = torch.randn(8, 3, 28, 28).bfloat16()
    want = model.patches.double()(x.double())
    model.patches.bfloat16()
    put(model)
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # torch's own
    torch.testing.assert_close(model.patches(x).double(), want, rtol=0.05, atol=0.05)


@compiled
def test_restore_gives_the_convolution_back(float32_units):
    model = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    ).bfloat16()
    embedding = model.vit.embeddings.patch_embeddings.projection
    assert put(model).name == "vit.embeddings.patch_embeddings.projection"
    assert type(embedding) is not nn.Conv2d
    assert stock_class(embedding) is nn.Conv2d
    fastln.restore(model)
    assert type(embedding) is nn.Conv2d


@compiled
def test_torchs_convolutions_stay_where_their_units_are_the_fastest(monkeypatch):
    monkeypatch.setattr(units, "compute_dtype", lambda dtype, **_: dtype)
    plan = fastln.plan(Model(conv()))
    assert [stay.reason for stay in plan.stays if stay.kind == "patch embedding"] == [
        "torch's convolutions use the fastest units here"
    ]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_model_in_bfloat16_is_told_how_such_rows_are_multiplied(dtype, monkeypatch, caplog):
    monkeypatch.setattr(units, "rates", lambda: {"float32": 187e9})
    monkeypatch.delenv(units.VARIABLE, raising=False)
    caches = (units._for_bfloat16, units._tell_float32)
    for cached in caches:
        cached.cache_clear()
    try:
        with caplog.at_level("INFO", "fastln"):
            plan = fastln.plan(Model(conv(), dtype))
    finally:
        for cached in caches:
            cached.cache_clear()
    assert any(change.stand_in == "patches" for change in plan.changes)
    assert ("bfloat16 rows are multiplied" in caplog.text) == (dtype == torch.bfloat16)


def test_plain_pytorch_has_no_patches(monkeypatch):
    monkeypatch.setenv(units.VARIABLE, "float32")
    plan = fastln.plan(Model(conv()), backend="reference")
    assert not any(change.stand_in == "patches" for change in plan.changes)


@pytest.mark.parametrize(
    "given",
    [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 2, "channels": 4}, {"kernel": 1}, {"channels": 64}],
    ids=lambda given: next(iter(given)),
)
def test_other_convolutions_are_no_patch_embeddings(given):
    assert not is_patch_embedding(conv(**given))
    assert is_patch_embedding(conv())
    assert is_patch_embedding(conv(padding="valid"))
