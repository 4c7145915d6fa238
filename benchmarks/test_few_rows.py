"""A frozen linear layer with few rows on a CPU, in 8 bits beside exact: `python -m pytest benchmarks/test_few_rows.py`.

Generation has a row per sequence, a pooler a row per example. The time includes the rounding of the rows, as no kernel
has made them here.
"""

import pytest
import torch

from fastln import ops
from fastln_kernels.cpu import native_int8

ROWS = (1, 8, 32, 128)
SHAPES = {"768 to 768": (768, 768), "768 to 3,072": (768, 3072), "1,024 to 2,816": (1024, 2816)}


@pytest.mark.parametrize("products", ["exact", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows(benchmark, shape, n_rows, dtype, products):
    benchmark.group = f"{shape}, {n_rows} rows, {dtype}"
    n_inner, n_cols = SHAPES[shape]
    torch.manual_seed(0)
    weight, bias = torch.randn(n_cols, n_inner).to(dtype), torch.randn(n_cols).to(dtype)
    rounded = native_int8.quantise_weight(weight, turned=True)
    given = [torch.randn(n_rows, n_inner).to(dtype) for _ in range(50)]  # rows of one tensor stay at hand

    def run() -> None:
        x = given.pop()
        given.insert(0, x)
        if products == "exact":
            ops.linear(x, weight, bias)
        else:
            ops.int8_linear(x, rounded, bias)

    with torch.no_grad():
        benchmark.pedantic(run, rounds=40, iterations=1, warmup_rounds=5)
