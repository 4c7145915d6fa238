"""Backward of attention in bf16, fastln and torch: `pytest benchmarks/test_attention.py`."""

import pytest
import torch

from fastln_kernels.cpu.attention import attention_backward, attention_forward

SHAPES = [(32, 6, 257, 64), (8, 12, 197, 64), (8, 12, 128, 64), (2, 12, 901, 64)]


def fastln(dout, q, k, v, out, lse, scale):
    return attention_backward(
        dout, q, k, v, out, lse, scale=scale, causal=False, mask=None, need_dq=True, need_dk=True, need_dv=True
    )


def stock(dout, q, k, v, out, lse, scale):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(dout, q, k, v, out, lse, 0.0, False, scale=scale)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("engine", [fastln, stock])
def test_backward(benchmark, engine, shape):
    b, h, s, d = shape
    dout, q, k, v = (torch.randn(b, s, h, d).to(torch.bfloat16).transpose(1, 2) for _ in range(4))
    out, lse = attention_forward(q, k, v, scale=d**-0.5, causal=False, mask=None)
    benchmark.pedantic(engine, (dout, q, k, v, out, lse, d**-0.5), rounds=20, warmup_rounds=3)
