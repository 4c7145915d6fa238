"""Every operation in plain PyTorch: the definition that the other implementations are tested against.

Arithmetic is float32 for float32, bfloat16 and float16 inputs and float64 for float64 inputs; only results are rounded
to the dtype of what they stand for.
"""

import torch
from torch import Tensor

N_STATS = 3
"""Rows of `stats`, what the forward of a norm keeps of each of its rows."""


def layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise each row, then scale and shift it.

    The mean is rounded before it is subtracted, which costs a row with mean 1e4 and deviation 1 its fourth digit; so
    what the rounding left over, the mean of the differences, is subtracted too.

    Args:
        x: `(n_rows, n_cols)`, any strides; float32, bfloat16, float16 or float64.
        weight: `(n_cols,)` or None for ones.
        bias: `(n_cols,)` or None for zeros.
        eps: Added to the variance.

    Returns:
        `y`, contiguous, shaped and typed like `x`; and `stats` `(3, n_rows, 1)`, in the dtype of the arithmetic: the
        rounded mean, its residual, and `1 / sqrt(variance + eps)`.
    """
    x_wide = x.to(_arithmetic(x))
    mean = x_wide.mean(-1, keepdim=True)
    residual = (x_wide - mean).mean(-1, keepdim=True)
    centred = (x_wide - mean) - residual
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous(), torch.stack((mean, residual, rstd))


def layer_norm_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    *,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    grad_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the wanted ones of the three gradients, and nothing else.

    Args:
        dy: `(n_rows, n_cols)`, the gradient of `y`.
        x: As in the forward; None will do where only `dbias` is wanted.
        weight: As in the forward; looked at for `dx` only.
        stats: From the forward; None will do where `x` may be None.
        need_dx: Whether the gradient of `x` is wanted.
        need_dweight: Whether the gradient of the weight is wanted.
        need_dbias: Whether the gradient of the bias is wanted.
        grad_dtype: The dtype of the parameters' gradients; they are summed in the dtype of the arithmetic.

    Returns:
        `dx` `(n_rows, n_cols)` in the dtype of `x`, `dweight` and `dbias` `(n_cols,)`; None for what is not wanted.
    """
    dy_wide = dy.to(_arithmetic(dy))
    dx = dweight = None
    if need_dx or need_dweight:
        assert x is not None
        assert stats is not None
        mean, residual, rstd = stats
        normed = (x.to(dy_wide.dtype) - mean - residual) * rstd
        if need_dx:
            dnormed = dy_wide if weight is None else dy_wide * weight
            along_normed = (dnormed * normed).mean(-1, keepdim=True)
            dx = (rstd * (dnormed - dnormed.mean(-1, keepdim=True) - normed * along_normed)).to(x.dtype).contiguous()
        if need_dweight:
            dweight = (dy_wide * normed).sum(0).to(grad_dtype)
    dbias = dy_wide.sum(0).to(grad_dtype) if need_dbias else None
    return dx, dweight, dbias


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
