"""Norms, dropout and linear layers in plain PyTorch: the definitions for testing the other implementations.

Arithmetic is float32 for float32, bfloat16 and float16 inputs, and float64 for float64 inputs. Only results are rounded
to their final dtype.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastln_kernels.reference_codes import decode_groups, encode_groups


@dataclass(frozen=True, slots=True)
class NormKind:
    """The kind of norm: `y = x_hat * (offset + weight) + bias`, with `x_hat = (x - mean) / sqrt(variance + eps)`.

    Attributes:
        eps: Added to the variance.
        centre: Whether to subtract the mean (LayerNorm) or to use 0 instead (RMSNorm).
        offset: Added to the weight: 1 for models such as Gemma, in which a weight of 0 means 1.
        round_normed: Whether x_hat is rounded to the dtype of `x` before the weight multiplies it, as in Llama.
    """

    eps: float
    centre: bool = True
    offset: float = 0.0
    round_normed: bool = False


class NormForward(NamedTuple):
    """The inputs of `norm_forward`.

    Attributes:
        x: `(n_rows, n_cols)`, any strides; float32, bfloat16, float16 or float64.
        weight: `(n_cols,)` or None for ones (and no offset).
        bias: `(n_cols,)` or None for zeros.
        kind: The kind of norm.
        residual: Same shape and dtype as `x`, or None for zeros.
        dropout: Probability of dropping an element of `x`, at least 0 and below 1, in steps of 2^-16.
        seed: `(1,)`, int64, the seed of dropout's random numbers; may be None without dropout.
        want_stream: Whether to return `residual + dropout(x)`. It is then rounded to the dtype of `x` before the norm.
        want_normed: Whether to return x_hat.
        want_codes: Whether to return x_hat in 8 bits instead, see `fastln_kernels.reference_codes`.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    kind: NormKind
    residual: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    want_stream: bool = False
    want_normed: bool = False
    want_codes: bool = False


class NormOutputs(NamedTuple):
    """The results of `norm_forward`.

    Attributes:
        y: `(n_rows, n_cols)`, contiguous, in the dtype of `x`.
        stream: `residual + dropout(x)`, likewise; None if not requested.
        normed: x_hat, likewise; or its codes, int8.
        rstd: `(n_rows,)`, `1 / sqrt(variance + eps)`, in the dtype of the arithmetic.
        scale: `(n_rows, ceil(n_cols / 64))`, float32, what the codes of 64 neighbouring columns are multiplied by; None
            without codes.
    """

    y: Tensor
    stream: Tensor | None
    normed: Tensor | None
    rstd: Tensor
    scale: Tensor | None = None


class NormBackward(NamedTuple):
    """The inputs of `norm_backward`.

    Attributes:
        dy: `(n_rows, n_cols)`, the gradient of `y`.
        saved: The norm's input, or x_hat, or its codes; may be None if only `dbias` is requested.
        weight: As in the forward; used only for `dx` and `dresidual`.
        rstd: From the forward; may be None if `saved` may be None.
        kind: As in the forward.
        saved_is_normed: Whether `saved` is x_hat, in full or in codes.
        dstream: `(n_rows, n_cols)`, the gradient of the returned `stream` from its other uses, or None if it has none.
        dropout: As in the forward.
        seed: As in the forward; used only for `dx`.
        need_dx: Whether to compute the gradient of `x`.
        need_dresidual: Whether to compute the gradient of `residual`.
        need_dweight: Whether to compute the gradient of the weight.
        need_dbias: Whether to compute the gradient of the bias.
        grad_dtype: The dtype of the parameters' gradients. They are summed in the dtype of the arithmetic.
        scale: From the forward, if `saved` holds codes.
    """

    dy: Tensor
    saved: Tensor | None
    weight: Tensor | None
    rstd: Tensor | None
    kind: NormKind
    saved_is_normed: bool = False
    dstream: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    need_dx: bool = False
    need_dresidual: bool = False
    need_dweight: bool = False
    need_dbias: bool = False
    grad_dtype: torch.dtype = torch.float32
    scale: Tensor | None = None


class NormAgain(NamedTuple):
    """The inputs of `norm_again`.

    Attributes:
        saved: `(n_rows, n_cols)`, what was kept: the norm's input (the stream, if there is one), x_hat, or its codes.
        weight: As in the forward.
        bias: As in the forward.
        rstd: From the forward; used only if `saved` is the input.
        kind: As in the forward.
        saved_is_normed: Whether `saved` is x_hat, in full or in codes.
        scale: From the forward, if `saved` holds codes.
        dtype: The dtype of the forward's result.
    """

    saved: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rstd: Tensor | None
    kind: NormKind
    saved_is_normed: bool
    scale: Tensor | None
    dtype: torch.dtype


class NormGradients(NamedTuple):
    """The results of `norm_backward`; None for those that were not requested.

    Attributes:
        dx: `(n_rows, n_cols)`, contiguous, in the dtype of `dy`.
        dresidual: Likewise. Without dropout it has the same values as `dx`, so a caller need not request both.
        dweight: `(n_cols,)`.
        dbias: `(n_cols,)`.
    """

    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def norm_forward(request: NormForward) -> NormOutputs:
    """Normalise each row of `residual + dropout(x)`, then scale and shift it.

    The mean is rounded before it is subtracted. For a row with mean 1e4 and deviation 1 that costs the fourth digit. So
    the rounding error, which is the mean of the differences, is subtracted too.
    """
    x, kind = request.x, request.kind
    stream = x.to(arithmetic_dtype(x))
    if request.dropout:
        stream = _dropped_out(stream, request.dropout, request.seed)
    if request.residual is not None:
        stream = stream + request.residual
    rounded = stream.to(x.dtype, copy=True).contiguous() if request.want_stream else None
    if rounded is not None:
        stream = rounded.to(stream.dtype)
    if kind.centre:
        stream = _centred(stream)
    rstd = (stream.square().mean(-1) + kind.eps).rsqrt()
    normed = stream * rstd[:, None]
    y = _scaled(normed, request.weight, request.bias, kind, x.dtype)
    # Copies: no two results may share their memory.
    kept = normed.to(x.dtype, copy=True).contiguous() if request.want_normed else None
    scale = None
    if request.want_codes:
        assert kept is None
        kept, scale = encode_groups(normed, 8)
    return NormOutputs(y, rounded, kept, rstd, scale)


def norm_again(request: NormAgain) -> Tensor:
    """Return the forward's y, `(n_rows, n_cols)`, from what was kept of it.

    From the input it is the same; from x_hat or its codes it has their rounding errors, times the weight.
    """
    saved, kind, dtype = request.saved, request.kind, request.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normed = saved.to(wide) if request.scale is None else decode_groups(saved, request.scale, saved.shape, wide)
    if not request.saved_is_normed:
        assert request.rstd is not None
        normed = (_centred(normed) if kind.centre else normed) * request.rstd[:, None]
    return _scaled(normed, request.weight, request.bias, kind, dtype)


def norm_backward(request: NormBackward) -> NormGradients:
    """Compute only the requested gradients."""
    dy, kind = request.dy, request.kind
    dy_wide = dy.to(arithmetic_dtype(dy))
    dx = dresidual = dweight = None
    need_rows = request.need_dx or request.need_dresidual
    if need_rows or request.need_dweight:
        assert request.saved is not None
        assert request.rstd is not None
        rstd = request.rstd[:, None]
        if request.scale is None:
            normed = request.saved.to(dy_wide.dtype)
        else:
            normed = decode_groups(request.saved, request.scale, dy.shape, dy_wide.dtype)
        if not request.saved_is_normed:
            normed = (_centred(normed) if kind.centre else normed) * rstd
        if need_rows:
            weight = request.weight
            dnormed = dy_wide if weight is None else dy_wide * (weight.to(dy_wide.dtype) + kind.offset)
            inner = dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)
            if kind.centre:
                inner = inner - dnormed.mean(-1, keepdim=True)
            inner = rstd * inner
            if request.dstream is not None:
                inner = inner + request.dstream
            if request.need_dresidual:
                dresidual = inner.to(dy.dtype).contiguous()
            if request.need_dx:
                dx = _dropped_out(inner, request.dropout, request.seed) if request.dropout else inner
                dx = dx.to(dy.dtype, copy=request.need_dresidual).contiguous()
        if request.need_dweight:
            dweight = (dy_wide * _rounded_if(kind, normed, dy.dtype)).sum(0).to(request.grad_dtype)
    dbias = dy_wide.sum(0).to(request.grad_dtype) if request.need_dbias else None
    return NormGradients(dx, dresidual, dweight, dbias)


DROPOUT_STEPS = 1 << 16
"""Dropout compares 16 random bits with a threshold, so probabilities are multiples of 1 / DROPOUT_STEPS."""


def dropout_threshold(dropout: float) -> int:
    """Return how many of the `DROPOUT_STEPS` possible random numbers drop an element."""
    return min(round(dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1)


def dropout_scale(dropout: float) -> float:
    """Return the factor on kept elements that preserves the expected value."""
    return DROPOUT_STEPS / (DROPOUT_STEPS - dropout_threshold(dropout))


def dropout_keep(n_rows: int, n_cols: int, dropout: float, seed: Tensor, first_row: int = 0) -> Tensor:
    """Return which elements dropout keeps: `(n_rows, n_cols)`, bool, a function only of seed, row and column.

    Row numbers start at `first_row`.

    One call of Philox-4x32-10 (Salmon et al., SC 2011) with the key `seed` and the counter `(column // 8, row, row >>
    32, 0)` gives 128 random bits for 8 neighbouring columns. Column `8 g + j` takes 16 of them from word `j // 2`: the
    low half if `j` is even, the high half if it is odd. The element is kept if they are at least the threshold.
    """
    device = seed.device
    groups = torch.arange((n_cols + 7) // 8, device=device)
    rows = torch.arange(first_row, first_row + n_rows, device=device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = _philox(groups, rows & _LOW, rows >> 32, zero, (seed & _LOW, (seed >> 32) & _LOW))
    numbers = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (numbers >= dropout_threshold(dropout)).flatten(1)[:, :n_cols]


def dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """Return `x` with dropout applied: `(n_rows, n_cols)`, contiguous, in its dtype.

    Args:
        x: `(n_rows, n_cols)`, any strides; float32, bfloat16, float16 or float64.
        dropout: Probability of dropping an element, at least 0 and below 1, in steps of 2^-16.
        seed: `(1,)`, int64, the seed of the random numbers.
    """
    return _dropped_out(x.to(arithmetic_dtype(x)), dropout, seed).to(x.dtype).contiguous()


def _dropped_out(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    assert seed is not None
    # Select instead of multiply, so that dropped elements are 0 even if they are NaN or infinite.
    return torch.where(dropout_keep(x.shape[0], x.shape[1], dropout, seed), x * dropout_scale(dropout), 0.0)


_LOW = 0xFFFFFFFF


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transpose: bool = True) -> Tensor:
    """Compute `x weightᵀ + bias`, or `x weight + bias` if `transpose` is False.

    Args:
        x: `(n_rows, n_inner)`, any floating dtype.
        weight: `(n_cols, n_inner)`, or `(n_inner, n_cols)` if `transpose` is False.
        bias: `(n_cols,)` or None for zeros.
        transpose: Whether the rows of `weight` belong to the columns of the result, as in `torch.nn.Linear`.

    Returns:
        `(n_rows, n_cols)`, in the dtype of `x`.
    """
    dtype = arithmetic_dtype(x)
    y = x.to(dtype) @ (weight.t() if transpose else weight).to(dtype)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10. Each int64 holds a 32-bit word."""
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _product(0xD2511F53, c0)
        high_2, low_2 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _product(factor: int, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of the product of two 32-bit numbers, without exceeding 63 bits."""
    with_low, with_high = factor * (number & 0xFFFF), factor * (number >> 16)
    upper = (with_low >> 16) + with_high
    return upper >> 16, ((upper & 0xFFFF) << 16) | (with_low & 0xFFFF)


def _centred(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred - centred.mean(-1, keepdim=True)


def _scaled(normed: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind, dtype: torch.dtype) -> Tensor:
    y = _rounded_if(kind, normed, dtype)
    if weight is not None:
        y = y * (weight.to(y.dtype) + kind.offset)
    if bias is not None:
        y = y + bias
    return y.to(dtype).contiguous()


def _rounded_if(kind: NormKind, normed: Tensor, dtype: torch.dtype) -> Tensor:
    return normed.to(dtype).to(normed.dtype) if kind.round_normed else normed


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic for operations on `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
