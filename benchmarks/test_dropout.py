"""Dropout on this machine's CPU, fastln beside torch: `.venv/bin/python -m pytest benchmarks/test_dropout.py`.

fastln keeps a seed and draws the same numbers again in the backward; torch keeps the mask. The call on a tiny tensor
shows what a call costs before any work.
"""

import pytest
import torch

from fastln import ops

SHAPES = {"tiny": (4, 8), "bert 8x128": (1024, 768), "vit 8x197": (1576, 768), "gpt2 8x128 mlp": (1024, 3072)}
ENGINES = {"fastln": ops.dropout, "torch": torch.nn.functional.dropout}


def measure(benchmark, function):
    benchmark.pedantic(function, rounds=30, iterations=5, warmup_rounds=3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, dtype, engine):
    benchmark.group = f"forward, {shape}, {dtype}"
    x = torch.randn(SHAPES[shape]).to(dtype).requires_grad_()
    measure(benchmark, lambda: ENGINES[engine](x, 0.1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, shape, dtype, engine):
    benchmark.group = f"forward and backward, {shape}, {dtype}"
    x = torch.randn(SHAPES[shape]).to(dtype).requires_grad_()
    dy = torch.randn(SHAPES[shape]).to(dtype)
    measure(benchmark, lambda: torch.autograd.grad(ENGINES[engine](x, 0.1), x, dy))
