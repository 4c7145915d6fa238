"""Attention on this machine's CPU, fastln beside torch: `.venv/bin/python -m pytest benchmarks/test_attention.py`.

Shapes are those of a step: batch x heads x tokens x width of a head. `frozen` is what cross-attention over a frozen
encoder needs: the gradient of the queries alone. `int8` takes 8 bits wherever it can, whether or not that pays.
"""

import functools

import pytest
import torch

from fastln import ops
from fastln.ops.attention import SWITCH

SHAPES = {
    "bert 8x128": ((8, 12, 128, 64), {}),
    "bert 8x128, dropout": ((8, 12, 128, 64), {"dropout": 0.1}),
    "vit 8x197": ((8, 12, 197, 64), {}),
    "blip 2x901": ((2, 12, 901, 64), {}),
    "llama 2x640": ((2, 16, 640, 64), {"causal": True}),
    "long 1x4096": ((1, 4, 4096, 64), {"causal": True}),
}


def stock(q, k, v, causal=False, dropout=0.0):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, None, dropout, causal)


IN_8_BITS = functools.partial(ops.attention, settings=ops.OpSettings(products="int8"))
ENGINES = {"fastln": ops.attention, "int8": IN_8_BITS, "torch": stock}


@pytest.fixture(autouse=True)
def always_in_8_bits(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")


def tensors(shape, dtype, wanted=(0, 1, 2)):
    b, h, s, d = SHAPES[shape][0]
    torch.manual_seed(0)
    made = [torch.randn(b, s, h, d).to(dtype).transpose(1, 2) for _ in range(4)]
    return [x.requires_grad_(i in wanted) for i, x in enumerate(made)]


def measure(benchmark, function):
    benchmark.pedantic(function, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, dtype, engine):
    benchmark.group = f"forward, {shape}, {dtype}"
    q, k, v, _ = tensors(shape, dtype)
    measure(benchmark, lambda: ENGINES[engine](q, k, v, **SHAPES[shape][1]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,)], ids=["all", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(benchmark, shape, dtype, wanted, engine):
    benchmark.group = f"backward, {shape}, {dtype}, {'all' if len(wanted) == 3 else 'frozen'}"
    *leaves, dout = tensors(shape, dtype, wanted)
    out = ENGINES[engine](*leaves, **SHAPES[shape][1])
    grads = [x for x in leaves if x.requires_grad]
    measure(benchmark, lambda: torch.autograd.grad(out, grads, dout, retain_graph=True))
