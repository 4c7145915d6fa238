"""Every operation in plain PyTorch: the definition that the other implementations are tested against.

Arithmetic is float32 for float32, bfloat16 and float16 inputs and float64 for float64 inputs; only results are rounded
to the dtype of what they stand for.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NormKind:
    """Which norm: `y = x_hat * (offset + weight) + bias`, with `x_hat = (x - mean) / sqrt(variance + eps)`.

    Attributes:
        eps: Added to the variance.
        centre: Whether the mean is subtracted (LayerNorm) or taken for 0 (RMSNorm).
        offset: Added to the weight: 1 where a weight of 0 stands for 1, as in Gemma.
        round_normed: Whether x_hat is rounded to the dtype of `x` before the weight multiplies it, as in Llama.
    """

    eps: float
    centre: bool = True
    offset: float = 0.0
    round_normed: bool = False


class NormForward(NamedTuple):
    """What `norm_forward` computes from.

    Attributes:
        x: `(n_rows, n_cols)`, any strides; float32, bfloat16, float16 or float64.
        weight: `(n_cols,)` or None for ones (and no offset).
        bias: `(n_cols,)` or None for zeros.
        kind: Which norm.
        residual: Shaped and typed like `x`, or None for zeros.
        dropout: Probability of dropping an element of `x`; from 0 to below 1, in steps of 2^-16.
        seed: `(1,)`, int64, of the numbers that decide which; may be None without dropout.
        want_stream: Whether to return the sum, which is then rounded to the dtype of `x` before it is normalised.
        want_normed: Whether to return x_hat.
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


class NormOutputs(NamedTuple):
    """What `norm_forward` returns.

    Attributes:
        y: `(n_rows, n_cols)`, contiguous, in the dtype of `x`.
        stream: `residual + dropout(x)`, likewise; None where it was not asked for.
        normed: x_hat, likewise.
        rstd: `(n_rows,)`, `1 / sqrt(variance + eps)`, in the dtype of the arithmetic.
    """

    y: Tensor
    stream: Tensor | None
    normed: Tensor | None
    rstd: Tensor


class NormBackward(NamedTuple):
    """What `norm_backward` computes from.

    Attributes:
        dy: `(n_rows, n_cols)`, the gradient of `y`.
        saved: What was normalised, or x_hat; may be None where only `dbias` is wanted.
        weight: As in the forward; read for `dx` and `dresidual` only.
        rstd: From the forward; may be None where `saved` may.
        kind: As in the forward.
        saved_is_normed: Whether `saved` is x_hat.
        dstream: `(n_rows, n_cols)`, the gradient that reached the returned sum by other ways, or None for none.
        dropout: As in the forward.
        seed: As in the forward; read for `dx` only.
        need_dx: Whether the gradient of `x` is wanted.
        need_dresidual: Whether the gradient of `residual` is wanted.
        need_dweight: Whether the gradient of the weight is wanted.
        need_dbias: Whether the gradient of the bias is wanted.
        grad_dtype: The dtype of the parameters' gradients; they are summed in the dtype of the arithmetic.
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


class NormGradients(NamedTuple):
    """What `norm_backward` returns; None for what is not wanted.

    Attributes:
        dx: `(n_rows, n_cols)`, contiguous, in the dtype of `dy`.
        dresidual: Likewise; where nothing was dropped the same numbers, so a caller need not ask for both.
        dweight: `(n_cols,)`.
        dbias: `(n_cols,)`.
    """

    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def norm_forward(request: NormForward) -> NormOutputs:
    """Normalise each row of `residual + dropout(x)`, then scale and shift it.

    The mean is rounded before it is subtracted, which costs a row with mean 1e4 and deviation 1 its fourth digit; so
    what the rounding left over, the mean of the differences, is subtracted too.
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
    y = _rounded_if(kind, normed, x.dtype)
    if request.weight is not None:
        y = y * (request.weight.to(y.dtype) + kind.offset)
    if request.bias is not None:
        y = y + request.bias
    # Copies: no two results may share their memory.
    kept = normed.to(x.dtype, copy=True).contiguous() if request.want_normed else None
    return NormOutputs(y.to(x.dtype).contiguous(), rounded, kept, rstd)


def norm_backward(request: NormBackward) -> NormGradients:
    """Compute the gradients that are wanted, and nothing else."""
    dy, kind = request.dy, request.kind
    dy_wide = dy.to(arithmetic_dtype(dy))
    dx = dresidual = dweight = None
    need_rows = request.need_dx or request.need_dresidual
    if need_rows or request.need_dweight:
        assert request.saved is not None
        assert request.rstd is not None
        rstd = request.rstd[:, None]
        normed = request.saved.to(dy_wide.dtype)
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
"""Dropout compares 16 random bits with a threshold, so probabilities are multiples of one in this many."""


def dropout_threshold(dropout: float) -> int:
    """Return how many of the `DROPOUT_STEPS` random numbers mean that an element is dropped."""
    return min(round(dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1)


def dropout_scale(dropout: float) -> float:
    """Return what kept elements are multiplied by, so that the expected value stays."""
    return DROPOUT_STEPS / (DROPOUT_STEPS - dropout_threshold(dropout))


def dropout_keep(n_rows: int, n_cols: int, dropout: float, seed: Tensor, first_row: int = 0) -> Tensor:
    """Return which elements dropout keeps: `(n_rows, n_cols)`, bool, a function of seed, row and column alone.

    Rows are counted from `first_row` on.

    One call of Philox-4x32-10 (Salmon et al., SC 2011) under the key `seed`, at the counter `(column // 8, row, row >>
    32, 0)`, gives 128 random bits for 8 neighbouring columns. Column `8 g + j` takes 16 of them: of word `j // 2` the
    low half where `j` is even, the high half where it is odd. It is kept where they make at least the threshold.
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
        dropout: Probability of dropping an element; from 0 to below 1, in steps of 2^-16.
        seed: `(1,)`, int64, of the numbers that decide which.
    """
    return _dropped_out(x.to(arithmetic_dtype(x)), dropout, seed).to(x.dtype).contiguous()


def _dropped_out(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    assert seed is not None
    # Chosen and not multiplied: what is dropped is 0, be it NaN or infinite.
    return torch.where(dropout_keep(x.shape[0], x.shape[1], dropout, seed), x * dropout_scale(dropout), 0.0)


_LOW = 0xFFFFFFFF


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transpose: bool = True) -> Tensor:
    """Compute `x weightᵀ + bias`, or `x weight + bias` without `transpose`.

    Args:
        x: `(n_rows, n_inner)`, any floating dtype.
        weight: `(n_cols, n_inner)`, or `(n_inner, n_cols)` without `transpose`.
        bias: `(n_cols,)` or None for zeros.
        transpose: Whether the rows of `weight` belong to the columns of the result, as in `torch.nn.Linear`.

    Returns:
        `(n_rows, n_cols)`, in the dtype of `x`.
    """
    dtype = arithmetic_dtype(x)
    y = x.to(dtype) @ (weight.t() if transpose else weight).to(dtype)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 in int64, each of whose numbers holds 32 bits."""
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _product(0xD2511F53, c0)
        high_2, low_2 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _product(factor: int, number: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two numbers of 32 bits, without leaving 63."""
    with_low, with_high = factor * (number & 0xFFFF), factor * (number >> 16)
    upper = (with_low >> 16) + with_high
    return upper >> 16, ((upper & 0xFFFF) << 16) | (with_low & 0xFFFF)


def _centred(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred - centred.mean(-1, keepdim=True)


def _rounded_if(kind: NormKind, normed: Tensor, dtype: torch.dtype) -> Tensor:
    return normed.to(dtype).to(normed.dtype) if kind.round_normed else normed


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which operations on `x` are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
