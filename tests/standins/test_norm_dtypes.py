"""A trained norm is float32 in a bfloat16 model, and the code around it must not notice."""

import copy
import pickle

import pytest
import torch
import transformers
from family_models import TEXT
from tiny import SIZES, WIDTH
from torch import nn
from torch.nn import functional as F

import fastln
from fastln.methods import norm_parameters

SMALL_MAMBA = {"vocab_size": 100, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8}


class Block(nn.Module):
    """Code that reads its norm in every way, before a layer that takes bfloat16 alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)


class ByName(Block):
    def forward(self, x):
        return self.linear(x.to(self.norm.weight.dtype))


class ByBias(Block):
    def forward(self, x):
        return self.linear(x.to(dtype=self.norm.bias.dtype))


class ByVariable(Block):
    def forward(self, x):
        norm = self.norm
        return self.linear(x.to(norm.weight.dtype))


class ByLoop(Block):
    def forward(self, x):
        for module in (self.norm,):
            x = x.to(module.weight.dtype)
        return self.linear(x)


class ByProperty(Block):
    @property
    def own_dtype(self):
        return self.norm.weight.dtype

    def forward(self, x):
        return self.linear(x.to(self.own_dtype))


class ByValue(Block):
    def forward(self, x):
        x = x.to(self.norm.weight.dtype)
        return self.linear(F.layer_norm(x, (WIDTH,), self.norm.weight, self.norm.bias) * self.norm.weight)


class GatedByName(ByName):
    """A reader that becomes a stand-in itself, as it calls dropout."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.0, self.training)


class FromOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x):
        return self.blocks[0].linear(x.to(self.blocks[0].norm.weight.dtype))


READERS = [GatedByName, ByName, ByBias, ByVariable, ByLoop, ByProperty, ByValue, FromOutside]


def copies(model):
    yield model
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("cls", READERS)
def test_code_of_the_model_sees_the_models_dtype_and_everyone_else_the_parameter(cls):
    torch.manual_seed(0)
    stock = cls().bfloat16()
    x = torch.randn(3, WIDTH)
    want = stock(x)
    for model in copies(fastln.prepare(copy.deepcopy(stock))):
        norm = next(module for module in model.modules() if isinstance(module, nn.LayerNorm))
        assert type(norm.weight) is nn.Parameter
        assert norm.weight.dtype == norm.bias.dtype == torch.float32
        got = model(x)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, want)
        if cls is ByValue:
            got.float().square().sum().backward()
            assert norm.weight.grad.dtype == torch.float32
            assert norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cls", READERS)
def test_compiled_code_of_the_model_sees_it_too(cls):
    torch.manual_seed(0)
    stock, x = cls().bfloat16(), torch.randn(3, WIDTH)
    want = stock(x)
    model = fastln.prepare(stock)
    got = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want)


def test_a_user_who_reads_a_norm_from_a_module_around_the_model_gets_the_parameter():
    class Lightning(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def parameters_to_train(self):
            norm = self.model.norm
            assert norm.weight.dtype == torch.float32
            return [self.model.norm.weight, self.model.norm.bias]

    model = fastln.prepare(ByName().bfloat16())
    trained = Lightning(model).parameters_to_train()
    assert all(a is b for a, b in zip(trained, model.norm.parameters(), strict=True))


def mamba(family):
    return lambda: (
        getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**SMALL_MAMBA)),
        {"input_ids": torch.randint(3, 90, (2, 8))},
    )


def ibert(dtype=torch.bfloat16):
    config = transformers.IBertConfig(**SIZES, **TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.IBertModel(config), {"input_ids": torch.randint(3, 90, (2, 8))}


def q_former():
    config = transformers.Blip2QFormerConfig(
        **SIZES, vocab_size=100, encoder_hidden_size=WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    images = torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)
    queries = torch.randn(2, 4, WIDTH, dtype=torch.bfloat16)
    return transformers.Blip2QFormerModel(config), {"query_embeds": queries, "encoder_hidden_states": images}


MODELS = {
    "Mamba": mamba("Mamba"),
    "FalconMamba": mamba("FalconMamba"),
    "IBert, whose norms return pairs": ibert,
    "BLIP-2's Q-Former, which casts the images too": q_former,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_read_their_norms(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = model.bfloat16().eval()
    with torch.no_grad():
        want = model(**inputs)[0]
        got = fastln.prepare(model)(**inputs)[0]
    assert got.dtype == want.dtype
    assert (got - want).float().norm() <= 2e-2 * want.float().norm()
    assert model.dtype == torch.bfloat16
    model.train()(**inputs)[0].float().square().mean().backward()
    assert all(model.get_parameter(key).grad.dtype == torch.float32 for key in norm_parameters(model))


def test_a_norm_that_returns_pairs_is_stocks_in_float32():
    torch.manual_seed(0)
    model, inputs = ibert()
    model.eval()
    with torch.no_grad():
        want = model(**inputs)[0]
        torch.testing.assert_close(fastln.prepare(model)(**inputs)[0], want)


class QKNorm(nn.Module):
    """As LlamaRMSNorm: a float32 weight makes the result of a bfloat16 input float32."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(WIDTH)), 1e-6

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def test_under_autocast_a_norm_returns_the_dtype_that_stock_code_returns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), QKNorm())
    x = torch.randn(5, WIDTH)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        got = fastln.prepare(model)(x)
    assert got.dtype == want.dtype == torch.float32
    assert (got - exact).norm() <= (want - exact).norm()


class Follows(QKNorm):
    """As T5's: the result has the dtype of the weight, if that has 16 bits."""

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (normed.to(self.weight.dtype) if self.weight.dtype == torch.bfloat16 else normed)


@pytest.mark.parametrize("trains", ["0", "1", "2"])
@pytest.mark.parametrize("cls", [QKNorm, Follows])
def test_a_float32_input_of_a_norm_in_16_bits_gives_what_stock_gives(cls, trains):
    torch.manual_seed(0)
    model = nn.Sequential(cls(), nn.LayerNorm(WIDTH), cls()).bfloat16()
    x = torch.randn(5, WIDTH)
    want = [model[0](x), model[2](x)]
    fastln.prepare(model, "head", also=trains)
    for index, result in zip((0, 2), want, strict=True):
        got = model[index](x)
        assert got.dtype == result.dtype
        torch.testing.assert_close(got, result)
