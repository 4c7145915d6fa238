"""LayerNorm on this machine's CPU, fastln beside torch: `.venv/bin/python -m pytest benchmarks/test_layer_norm.py`.

Shapes are those of a step: tokens of a batch x width. `parameters` is norms-only tuning where the first norm needs no
dx; `all` is every other norm. The call on a tiny tensor shows what a call costs before any work.
"""

import pytest
import torch

from fastln import ops

SHAPES = {"tiny": (4, 8), "bert 8x128": (1024, 768), "vit 8x197": (1576, 768), "dinov2 16x257": (4112, 384)}
ENGINES = {
    "fastln": ops.layer_norm,
    "torch": lambda x, weight, bias: torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias),
}


def leaves(shape, dtype, need_dx, parameter_dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_(need_dx)
    weight, bias = (torch.randn(shape[-1]).to(parameter_dtype).requires_grad_() for _ in range(2))
    return x, weight, bias


def measure(benchmark, function):
    benchmark.pedantic(function, rounds=30, iterations=5, warmup_rounds=3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, dtype, engine):
    benchmark.group = f"forward, {shape}, {dtype}"
    tensors = leaves(SHAPES[shape], dtype, True, torch.float32)
    measure(benchmark, lambda: ENGINES[engine](*tensors))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("need_dx", [True, False], ids=["all", "parameters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, shape, dtype, need_dx, engine):
    benchmark.group = f"forward and backward, {shape}, {dtype}, {'all' if need_dx else 'parameters'}"
    tensors = leaves(SHAPES[shape], dtype, need_dx, torch.float32)
    dy = torch.randn(SHAPES[shape]).to(dtype)
    wanted = [t for t in tensors if t.requires_grad]
    measure(benchmark, lambda: torch.autograd.grad(ENGINES[engine](*tensors), wanted, dy))
