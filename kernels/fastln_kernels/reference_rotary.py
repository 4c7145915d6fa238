"""The definition of rotary positions: what `fastln_kernels` computes, in plain PyTorch.

Source: RoFormer (arXiv 2104.09864), in the form of transformers' `apply_rotary_pos_emb`: column i of a head turns
together with column i + D / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastln_kernels.reference import arithmetic_dtype


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """Compute `x cos + turned(x) sin`, where `turned` maps halves (a, b) of a head to (-b, a), or its gradient.

    Args:
        x: `(B, H, S, D)`, any floating dtype, D even. The gradient of the result if `backward`.
        cos: `(B or 1, S, D)`.
        sin: `(B or 1, S, D)`.
        backward: Whether to compute the gradient: `x cos + turned^T(x sin)`. It needs no result of the forward.

    Returns:
        `(B, H, S, D)` in the dtype of `x`, with the memory layout `(B, S, H, D)`. Arithmetic is float32, or float64 for
        float64, and rounds once.
    """
    dtype = arithmetic_dtype(x)
    wide, cos, sin = x.to(dtype), cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    if backward:
        low, high = (wide * sin).chunk(2, -1)
        turned = torch.cat((high, -low), -1)
    else:
        low, high = wide.chunk(2, -1)
        turned = torch.cat((-high, low), -1) * sin
    y = (wide * cos + turned).to(x.dtype)
    return y.transpose(1, 2).contiguous().transpose(1, 2)
