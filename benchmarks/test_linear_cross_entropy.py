"""The language-model head on this machine's CPU: `.venv/bin/python -m pytest benchmarks/test_linear_cross_entropy.py`.

fastln's loss from hidden states beside what stock models run: the logits of all positions, then cross-entropy in
float32. The weight is frozen, and labels stand at some of the positions.
"""

import pytest
import torch
from torch.nn import functional

from fastln import ops

SHAPES = {  # positions, width, classes, share of the positions with a label
    "bert 8x128": (1024, 768, 30522, 0.15),
    "blip 2x8": (16, 768, 30524, 1.0),
    "llama 2x640": (1280, 1024, 32000, 1 / 80),
    "llama 2x640, all labels": (1280, 1024, 32000, 1.0),
}


def stock(hidden, weight, bias, labels):
    return functional.cross_entropy(functional.linear(hidden, weight, bias).float(), labels)


ENGINES = {"fastln": ops.linear_cross_entropy, "torch": stock}


def tensors(shape, dtype):
    n_rows, width, n_classes, share = SHAPES[shape]
    torch.manual_seed(0)
    hidden = torch.randn(n_rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(n_classes, width) / width**0.5).to(dtype)
    labels = torch.randint(0, n_classes, (n_rows,)).masked_fill_(torch.rand(n_rows) >= share, -100)
    return hidden, weight, None, labels


def measure(benchmark, function):
    benchmark.pedantic(function, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, shape, dtype, engine):
    benchmark.group = f"forward and backward, {shape}, {dtype}"
    given = tensors(shape, dtype)
    measure(benchmark, lambda: torch.autograd.grad(ENGINES[engine](*given), given[0]))
