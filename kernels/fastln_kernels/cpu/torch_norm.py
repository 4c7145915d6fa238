"""LayerNorm for CPU tensors by torch's fused kernel, but with float32 sums where torch would sum in the dtype of `x`.

The functions have the arguments and results of those in `fastln_kernels.reference`, with three differences. The kind
must be LayerNorm (centred, no offset, no rounding). There is no dropout or residual before the norm. `rstd` holds the
two statistics that torch's backward reads, mean and rstd, as `(2, n_rows, 1)`.
"""

import functools

import torch
from torch import Tensor

from fastln_kernels.reference import NormBackward, NormForward, NormGradients, NormOutputs, arithmetic_dtype

_aten = torch.ops.aten
_BLOCK_ROWS = 512
N_STATS = 2
"""How many numbers per row `rstd` holds."""


def norm_forward(request: NormForward) -> NormOutputs:
    """Normalise each row of `x`, then scale and shift it."""
    x, weight, bias, kind = request[:4]
    dtype = arithmetic_dtype(x)
    if weight is None and x.dtype != dtype:
        # With a float32 weight torch does not round the statistics to the dtype of x.
        weight = _ones(x.shape[-1], dtype)
    y, mean, rstd = _aten.native_layer_norm.default(x, x.shape[-1:], _cast(weight, dtype), _cast(bias, dtype), kind.eps)
    return NormOutputs(y, None, None, torch.stack((mean, rstd)))


def norm_backward(request: NormBackward) -> NormGradients:
    """Compute only the requested gradients."""
    dy, saved, weight, stats = request[:4]
    dtype = arithmetic_dtype(dy)
    if saved is None or stats is None:
        return NormGradients(None, None, None, dy.sum(0, dtype=dtype).to(request.grad_dtype))
    n_rows, n_cols = saved.shape
    ones = _ones(n_cols, dtype)  # torch requires parameters, even if it reads only their shape
    parameters = (ones if weight is None else _cast(weight, dtype), ones)
    wanted = [request.need_dx, request.need_dweight, request.need_dbias]
    torch_backward = _aten.native_layer_norm_backward.default
    mean, rstd = stats
    if n_rows and saved.dtype != dtype and (request.need_dweight or request.need_dbias):
        # For a bfloat16 x torch sums the parameters' gradients in bfloat16, which is inexact for many rows. So cast the
        # rows to float32, one block at a time, so that the block stays in the cache.
        dx = torch.empty_like(saved, memory_format=torch.contiguous_format) if request.need_dx else None
        sums: list[Tensor | None] = [None, None]
        for rows in (slice(start, start + _BLOCK_ROWS) for start in range(0, n_rows, _BLOCK_ROWS)):
            block = (dy[rows].to(dtype), saved[rows].to(dtype), (n_cols,), mean[rows], rstd[rows])
            block_dx, *block_sums = torch_backward(*block, *parameters, wanted)
            if dx is not None:
                dx[rows] = block_dx
            sums = [b if a is None else a.add_(b) for a, b in zip(sums, block_sums, strict=True)]
    else:
        dx, *sums = torch_backward(dy, saved, (n_cols,), mean, rstd, *parameters, wanted)
    return NormGradients(dx, None, *(_cast(grad, request.grad_dtype) for grad in sums))


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


@functools.cache
def _ones(n_cols: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(n_cols, dtype=dtype)
