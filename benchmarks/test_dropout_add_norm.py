"""Dropout, residual and norm on this machine's CPU: fastln's one operation beside torch's three.

`.venv/bin/python -m pytest benchmarks/test_dropout_add_norm.py`. Post-norm as in BERT (LayerNorm, the sum goes nowhere
else) and pre-norm as in Llama (RMSNorm, no dropout, the sum goes on). A copy of one tensor says what memory allows.
"""

import pytest
import torch
from torch.nn import functional

from fastln import ops
from fastln.ops import NormKind

SHAPES = {"bert 8x128": (1024, 768), "vit 8x197": (1576, 768), "llama 2x640": (1280, 1024)}
DTYPES = [torch.float32, torch.bfloat16]


def post_norm(x, residual, weight, bias):
    return ops.dropout_add_norm(x, residual, weight, bias, NormKind(1e-12), dropout=0.1)


def torch_post_norm(x, residual, weight, bias):
    return functional.layer_norm(functional.dropout(x, 0.1) + residual, x.shape[-1:], weight, bias, 1e-12)


def pre_norm(x, residual, weight, bias):
    return ops.dropout_add_norm(x, residual, weight, None, NormKind(1e-6, centre=False), return_stream=True)


def torch_pre_norm(x, residual, weight, bias):
    stream = x + residual
    return functional.rms_norm(stream, x.shape[-1:], weight, 1e-6), stream


FUNCTIONS = {
    "post-norm": {"fastln": post_norm, "torch": torch_post_norm},
    "pre-norm": {"fastln": pre_norm, "torch": torch_pre_norm},
}


def tensors(shape, dtype):
    torch.manual_seed(0)
    x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).to(dtype).requires_grad_() for _ in range(2))
    return x, residual, weight, bias


def measure(benchmark, function):
    benchmark.pedantic(function, rounds=30, iterations=5, warmup_rounds=3)


@pytest.mark.parametrize("engine", ["fastln", "torch"])
@pytest.mark.parametrize("place", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, dtype, place, engine):
    benchmark.group = f"forward, {place}, {shape}, {dtype}"
    given = tensors(SHAPES[shape], dtype)
    measure(benchmark, lambda: FUNCTIONS[place][engine](*given))


@pytest.mark.parametrize("engine", ["fastln", "torch"])
@pytest.mark.parametrize("place", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, shape, dtype, place, engine):
    benchmark.group = f"forward and backward, {place}, {shape}, {dtype}"
    given = tensors(SHAPES[shape], dtype)
    grads = [torch.randn(SHAPES[shape]).to(dtype) for _ in range(2)]
    wanted = given if place == "post-norm" else given[:3]

    def step():
        outputs = FUNCTIONS[place][engine](*given)
        outputs = (outputs,) if place == "post-norm" else outputs
        return torch.autograd.grad(outputs, wanted, grads[: len(outputs)])

    measure(benchmark, step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_copy(benchmark, shape, dtype):
    benchmark.group = f"copy, {shape}, {dtype}"
    x = torch.randn(SHAPES[shape]).to(dtype)
    y = torch.empty_like(x)
    measure(benchmark, lambda: y.copy_(x))
