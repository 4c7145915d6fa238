"""Which of transformers' and torch's activations are which of fastln's; and the modules that stand in for them."""

import functools

import pytest
import torch
import transformers
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2CLS, ACT2FN, SiLUActivation
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import fastln
from fastln.families import activation_kind
from fastln.ops import ACTIVATION_KINDS, OpSettings, activation
from fastln.standins.activation import Activation
from fastln.standins.gated_mlp import GatedMLP
from fastln.standins.part import stand_back, stand_in

MAKERS = {name: functools.partial(ACT2FN.__getitem__, name) for name in ACT2CLS} | {
    "nn.GELU": nn.GELU,
    "nn.GELU tanh": lambda: nn.GELU(approximate="tanh"),
    "nn.SiLU": nn.SiLU,
    "nn.ReLU": nn.ReLU,
    "nn.ReLU in place": lambda: nn.ReLU(inplace=True),
    "nn.ELU": nn.ELU,
}
KNOWN = [name for name in MAKERS if activation_kind(MAKERS[name]())]


def points():
    """Enough to tell every two activations apart, clipped ones too."""
    return torch.linspace(-12, 12, 4001, dtype=torch.float64)


@pytest.mark.parametrize("name", MAKERS)
def test_a_module_has_the_kind_that_it_computes_and_no_other(name):
    module = MAKERS[name]().double()
    with torch.no_grad():
        values = module(points())
        # gelu_fast's constant has ten digits.
        same = [k for k in ACTIVATION_KINDS if torch.allclose(activation(points(), k), values, rtol=0, atol=1e-9)]
    kind = activation_kind(module)
    assert same == ([] if kind is None else [kind])


def test_all_five_are_recognised_somewhere():
    assert {activation_kind(MAKERS[name]()) for name in KNOWN} == set(ACTIVATION_KINDS)


def test_a_subclass_is_something_else():
    class Doubled(SiLUActivation):
        def forward(self, input):
            return 2 * super().forward(input)

    assert activation_kind(Doubled()) is None


@pytest.mark.parametrize("name", KNOWN)
def test_standing_in_for_a_stock_module_and_back(name):
    module, x = MAKERS[name](), torch.randn(3, 5, requires_grad=True)
    before, want, kind = dict(vars(module)), MAKERS[name]()(x.clone()), activation_kind(module)
    stand_in(module, Activation, OpSettings(), kind)
    packed = []
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = module(x)
    assert isinstance(module, Activation)
    assert isinstance(module, type(MAKERS[name]()))
    assert len(packed) == 1
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x) for t in (y, want)))
    stand_back(module)
    assert type(module) is type(MAKERS[name]())
    assert vars(module) == before


def test_the_gated_mlp_is_llamas_and_keeps_gate_and_up_alone():
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=20)).requires_grad_(False)
    x = torch.randn(2, 3, 32, requires_grad=True)
    want = mlp(x)
    packed = []
    weights = {parameter.data_ptr() for parameter in mlp.parameters()}
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = stand_in(mlp, GatedMLP, OpSettings(), activation_kind(mlp.act_fn))(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x) for t in (y, want)))
    assert [t.shape for t in packed if t.data_ptr() not in weights] == [(2, 3, 20)] * 2


class Shared(nn.Module):
    """A model that takes its activations from tables of its Python module, as OpenAI-GPT and XLM do."""

    def __init__(self, activation):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(4), activation

    def forward(self, x):
        return self.act(self.norm(x))


ONE, TABLE = nn.GELU(), {"relu": nn.ReLU()}


@pytest.mark.parametrize("activation", [ONE, TABLE["relu"], transformers.activations.gelu_new])
def test_an_activation_that_a_python_module_holds_for_all_models_stays_as_it_is(activation):
    model, other, before = Shared(activation), Shared(activation), type(activation)
    fastln.prepare(model)
    assert type(activation) is type(other.act) is before
    assert isinstance(model.act, Activation)
    fastln.restore(model)
    assert model.act is activation


def test_openai_gpt_takes_its_relu_from_a_table():
    sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "afn": "relu"}
    first, second = (transformers.OpenAIGPTModel(transformers.OpenAIGPTConfig(**sizes)) for _ in range(2))
    assert first.h[0].mlp.act is second.h[0].mlp.act
    fastln.prepare(first)
    assert type(second.h[0].mlp.act) is nn.ReLU
