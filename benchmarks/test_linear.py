"""Frozen linear layers on a CPU, fastln beside torch: `.venv/bin/python -m pytest benchmarks/test_linear.py`.

`kernel` also takes float32 rows that `fastln` leaves to torch, where its product is measured as faster.
Shapes are tokens of a batch x argument's width x result's width. The backward is that of the argument alone.
"""

import pytest
import torch
from torch.nn import functional

from fastln import ops
from fastln_kernels.cpu import units

SHAPES = {
    "bert 8x128": (1024, 768, 768),
    "bert 8x128, up": (1024, 768, 3072),
    "bert 8x128, down": (1024, 3072, 768),
    "vit 8x197, up": (1576, 768, 3072),
    "llama 2x640, gate": (1280, 1024, 2752),
    "blip 2x901": (1802, 768, 2304),
    "dinov2 small 32x257": (8224, 384, 1536),
}
ENGINES = {"fastln": ops.linear, "kernel": ops.linear, "torch": functional.linear}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(benchmark, shape, dtype, way, engine, monkeypatch):
    if engine == "kernel":
        monkeypatch.setattr(units, "float32_pays", lambda _: True)
    benchmark.group = f"{way}, {shape}, {dtype}"
    n_rows, n_inner, n_cols = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(n_rows, n_inner).to(dtype).requires_grad_()
    weight, bias = torch.randn(n_cols, n_inner).to(dtype), torch.randn(n_cols).to(dtype)
    dy = torch.randn(n_rows, n_cols).to(dtype)
    y = ENGINES[engine](x, weight, bias)

    def backward() -> None:
        torch.autograd.grad(y, x, dy, retain_graph=True)

    with torch.no_grad():
        run = backward if way == "backward" else lambda: ENGINES[engine](x, weight, bias)
        benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=2)
