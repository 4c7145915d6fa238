"""LayerNorm for CPU tensors by torch's own fused kernel, with float32 sums where torch's have the dtype of `x`.

The functions take and return what those of `fastln_kernels.reference` do, with three differences: the mean is always
subtracted, nothing comes before the norm, and in place of `rstd` are the two numbers per row that torch's backward
reads: `(2, n_rows, 1)`, mean and rstd. torch knows no codes of x_hat; what they take is computed as the reference does.
"""

import functools

import torch
from torch import Tensor

from fastln_kernels import reference
from fastln_kernels.reference import (
    NormAgain,
    NormBackward,
    NormForward,
    NormGradients,
    NormKind,
    NormOutputs,
    arithmetic_dtype,
)
from fastln_kernels.reference_codes import encode_groups

_aten = torch.ops.aten
_BLOCK_ROWS = 512
N_STATS = 2
"""How many numbers per row are in place of `rstd`."""


def norm_forward(request: NormForward) -> NormOutputs:
    """Normalise each row of `x`, then scale and shift it."""
    x, kind = request.x, request.kind
    dtype = arithmetic_dtype(x)
    weight, bias = _gain(request.weight, kind, dtype), _cast(request.bias, dtype)
    # torch rounds the statistics to the dtype of x, unless the weight is float32.
    ones = None if x.dtype == dtype else _ones(x.shape[-1], dtype)
    if kind.round_normed and x.dtype != dtype:
        x_hat, mean, rstd = _aten.native_layer_norm.default(x, x.shape[-1:], ones, None, kind.eps)
        y = x_hat.to(dtype)
        y = y if weight is None else y * weight
        y = (y if bias is None else y + bias).to(x.dtype)
    else:
        weight = ones if weight is None else weight
        y, mean, rstd = _aten.native_layer_norm.default(x, x.shape[-1:], weight, bias, kind.eps)
    codes = scale = None
    if request.want_codes:
        codes, scale = encode_groups((x.to(dtype) - mean) * rstd, 8)
    return NormOutputs(y, None, codes, torch.stack((mean, rstd)), scale)


def norm_again(request: NormAgain) -> Tensor:
    """Return the forward's y from what was kept of it."""
    if request.saved_is_normed:
        return reference.norm_again(request)
    return norm_forward(NormForward(request.saved, request.weight, request.bias, request.kind)).y


def norm_backward(request: NormBackward) -> NormGradients:
    """Compute the gradients that are wanted, and nothing else."""
    dy, saved, stats, kind = request.dy, request.saved, request.rstd, request.kind
    dtype = arithmetic_dtype(dy)
    if saved is None or stats is None:
        return NormGradients(None, None, None, dy.sum(0, dtype=dtype).to(request.grad_dtype))
    if request.scale is not None:
        return reference.norm_backward(request._replace(rstd=stats[1].flatten()))
    n_rows, n_cols = saved.shape
    ones = _ones(n_cols, dtype)  # torch asks for parameters, if only for their shape
    weight = _gain(request.weight, kind, dtype)
    parameters = (ones if weight is None else weight, ones)
    wanted = [request.need_dx, request.need_dweight, request.need_dbias]
    torch_backward = _aten.native_layer_norm_backward.default
    mean, rstd = stats
    if n_rows and saved.dtype != dtype and (request.need_dweight or request.need_dbias):
        # Over a bfloat16 x torch sums the parameters' gradients in bfloat16: a few percent off at 1,000 rows. So the
        # rows are cast to float32, a block at a time that stays in the cache.
        dx = torch.empty_like(saved, memory_format=torch.contiguous_format) if request.need_dx else None
        sums: list[Tensor | None] = [None, None]
        for rows in (slice(start, start + _BLOCK_ROWS) for start in range(0, n_rows, _BLOCK_ROWS)):
            block = (dy[rows].to(dtype), saved[rows].to(dtype), (n_cols,), mean[rows], rstd[rows])
            block_dx, *block_sums = torch_backward(*block, *parameters, wanted)
            if dx is not None:
                dx[rows] = block_dx
            if kind.round_normed and request.need_dweight:
                x_hat = ((block[1] - mean[rows]) * rstd[rows]).to(saved.dtype)
                block_sums[0] = (block[0] * x_hat).sum(0)
            sums = [b if a is None else a.add_(b) for a, b in zip(sums, block_sums, strict=True)]
    else:
        dx, *sums = torch_backward(dy, saved, (n_cols,), mean, rstd, *parameters, wanted)
    return NormGradients(dx, None, *(_cast(grad, request.grad_dtype) for grad in sums))


def _gain(weight: Tensor | None, kind: NormKind, dtype: torch.dtype) -> Tensor | None:
    """What x_hat is multiplied by; None for ones."""
    weight = _cast(weight, dtype)
    return weight + kind.offset if weight is not None and kind.offset else weight


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


@functools.cache
def _ones(n_cols: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(n_cols, dtype=dtype, device="cpu")
