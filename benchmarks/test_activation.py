"""Activations on this machine's CPU, fastln beside torch: `.venv/bin/python -m pytest benchmarks/test_activation.py`.

Shapes are those of a step: tokens of a batch x width of the MLP. Torch's gated activation is what transformers runs:
the activation, then a product. The call on a tiny tensor shows what a call costs before any work.
"""

import pytest
import torch
from torch.nn import functional

from fastln import ops

SHAPES = {"tiny": (4, 8), "bert 8x128": (1024, 3072), "vit 8x197": (1576, 3072), "llama 2x640": (1280, 2816)}
TORCH = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
}
PLAIN = {"fastln": ops.activation, "torch": lambda x, kind: TORCH[kind](x)}
GATED = {"fastln": ops.gated_activation, "torch": lambda gate, up, kind: TORCH[kind](gate) * up}


def leaves(n, shape, dtype):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(n)]


def measure(benchmark, function):
    benchmark.pedantic(function, rounds=30, iterations=5, warmup_rounds=3)


@pytest.mark.parametrize("engine", PLAIN)
@pytest.mark.parametrize("kind", ops.ACTIVATION_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, dtype, kind, engine):
    benchmark.group = f"forward, {kind}, {shape}, {dtype}"
    (x,) = leaves(1, SHAPES[shape], dtype)
    measure(benchmark, lambda: PLAIN[engine](x, kind))


@pytest.mark.parametrize("engine", PLAIN)
@pytest.mark.parametrize("kind", ops.ACTIVATION_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, shape, dtype, kind, engine):
    benchmark.group = f"forward and backward, {kind}, {shape}, {dtype}"
    (x,) = leaves(1, SHAPES[shape], dtype)
    dy = torch.randn(SHAPES[shape]).to(dtype)
    measure(benchmark, lambda: torch.autograd.grad(PLAIN[engine](x, kind), x, dy))


@pytest.mark.parametrize("engine", GATED)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_forward_and_backward(benchmark, shape, dtype, kind, engine):
    benchmark.group = f"gated forward and backward, {kind}, {shape}, {dtype}"
    tensors = leaves(2, SHAPES[shape], dtype)
    dy = torch.randn(SHAPES[shape]).to(dtype)
    measure(benchmark, lambda: torch.autograd.grad(GATED[engine](*tensors, kind), tensors, dy))
