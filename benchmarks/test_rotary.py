"""Rotary positions on a CPU, fastln beside stock code: `.venv/bin/python -m pytest benchmarks/test_rotary.py`.

Both turn queries and keys as projections leave them in memory: heads of a token side by side. So are the gradients.
"""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastln import ops

# Batches, heads of queries, heads of keys, tokens, columns of a head.
SHAPES = {"tiny": (1, 2, 1, 4, 8), "smollm2 8x128": (8, 9, 3, 128, 64), "llama3.2-1b 1x512": (1, 32, 8, 512, 64)}


def by_fastln(q, k, cos, sin):
    return ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)


ENGINES = {"fastln": by_fastln, "stock": apply_rotary_pos_emb}


def tensors(shape, dtype):
    n_batches, n_queries, n_keys, n_tokens, dim = SHAPES[shape]
    heads = [torch.randn(n_batches, n_tokens, n, dim).to(dtype).transpose(1, 2) for n in (n_queries, n_keys)]
    angles = torch.rand(1, n_tokens, dim // 2).repeat(1, 1, 2) * 6
    return [x.requires_grad_() for x in heads], angles.cos().to(dtype), angles.sin().to(dtype)


def measure(benchmark, function):
    benchmark.pedantic(function, rounds=30, iterations=5, warmup_rounds=3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, dtype, engine):
    benchmark.group = f"forward, {shape}, {dtype}"
    heads, cos, sin = tensors(shape, dtype)
    measure(benchmark, lambda: ENGINES[engine](*heads, cos, sin))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, shape, dtype, engine):
    benchmark.group = f"forward and backward, {shape}, {dtype}"
    heads, cos, sin = tensors(shape, dtype)
    gradients = [torch.randn_like(x) for x in heads]
    measure(benchmark, lambda: torch.autograd.grad(ENGINES[engine](*heads, cos, sin), heads, gradients))
