"""AdamW's step on this machine's CPU: `.venv/bin/python -m pytest benchmarks/test_optimizer.py`.

fastln's optimizer of every engine beside torch's AdamW, by default and fused, on the norms of whole models: many small
vectors. In bfloat16 fastln's keeps float32 copies, which the others lack.
"""

import pytest
import torch
from torch import nn

from fastln.training import MasterAdamW

NORMS = {"bert": (26, 768), "blip-vqa": (100, 768), "llama of 8 layers, weights alone": (17, 1024)}
ENGINES = {
    "fastln": MasterAdamW,
    "torch": torch.optim.AdamW,
    "torch fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", NORMS)
def test_step_and_zero_grad(benchmark, model, dtype, engine):
    benchmark.group = f"step, {model}, {dtype}"
    n_norms, width = NORMS[model]
    n_vectors = n_norms * (1 if "llama" in model else 2)
    parameters = [nn.Parameter(torch.ones(width, dtype=dtype)) for _ in range(n_vectors)]
    gradients = [torch.randn(width).to(dtype) for _ in parameters]
    optimizer = ENGINES[engine](parameters)

    def step():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    benchmark.pedantic(step, rounds=50, iterations=2, warmup_rounds=3)
