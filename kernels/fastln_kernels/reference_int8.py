"""Frozen linear layers in 8 bits: the definition in plain PyTorch that all kernels are tested against.

A weight `W` `(n_cols, n_inner)` is rounded once, with a scale per column of the result. Rows `x` are rounded in each
call, with a scale per row:

    W ≈ w_scale[:, None] * w,    x ≈ x_scale[:, None] * q,    y = (q wᵀ) * x_scale[:, None] * w_scale + bias

`q wᵀ` is a product of whole numbers, which is exact. The gradient of x takes the same `w`. Its scales lie along the
sum, so they go into the gradient before it is rounded:

    dx = (g w) * g_scale[:, None],    where g_scale[:, None] * g ≈ dy * w_scale

*Turning.* One number much larger than the rest of its row makes the row's step too coarse for the others. A Hadamard
matrix H (orthogonal, entries ±1/√64) spreads it over a block of 64 columns. `(x H) (W H)ᵀ = x Wᵀ`, so a weight may be
stored turned; then each row is turned before it is rounded, and dx is turned back after the product. See QuaRot
(arXiv 2404.00456).

*Two terms.* What the rounding of a weight leaves over may be rounded to a second weight in 8 bits. Its product with the
same rows, added to y, takes the weight's error out of y. dx takes the first weight alone.

A row that holds NaN or Inf becomes NaN as a whole. Rows without numbers above 1e-30 become zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
"""The largest whole number; -128 is not used, so that signs are symmetric."""

TURNED = 64
"""The columns of a block that is turned."""

SMALLEST = 1e-30
"""A row whose largest number is smaller counts as zero."""


BLOCK = 2**20
"""A weight is rounded and summed in blocks of so many numbers where that takes wider copies of them."""


class Rows8(NamedTuple):
    """Rows in 8 bits.

    Attributes:
        values: `(n_rows, n_cols)`, int8, from -127 to 127.
        scale: `(n_rows,)`, float32; NaN for a row that held NaN or Inf.
    """

    values: Tensor
    scale: Tensor


class Weight8(NamedTuple):
    """A frozen weight in 8 bits.

    Attributes:
        values: `(n_cols, n_inner)`, int8, from -127 to 127, contiguous; turned along `n_inner` if `turned`.
        scale: `(n_cols,)`, float32.
        turned: Whether each block of 64 inner columns is turned.
        row_sums: `(n_cols,)`, int32: sums of the whole numbers over `n_inner`. Units that take unsigned rows need them.
        col_sums: `(n_inner,)`, int32: their sums over `n_cols`.
    """

    values: Tensor
    scale: Tensor
    turned: bool
    row_sums: Tensor
    col_sums: Tensor

    @classmethod
    def of(cls, values: Tensor, scale: Tensor, turned: bool) -> Weight8:
        """Return the weight with its sums."""
        return cls(values, scale, turned, *sums_of(values))


def sums_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of whole numbers `(n_rows, n_cols)`, int8, over each row and over each column, int32.

    torch sums int8 by way of a copy in int32, four times as large. So this takes blocks of rows.
    """
    n_rows, n_cols = values.shape
    row_sums = values.new_empty(n_rows, dtype=torch.int32)
    col_sums = values.new_zeros(n_cols, dtype=torch.int32)
    for rows in _blocks(values):
        wide = values[rows].to(torch.int32)
        row_sums[rows] = wide.sum(1, dtype=torch.int32)
        col_sums += wide.sum(0, dtype=torch.int32)
    return row_sums, col_sums


def _blocks(x: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix in blocks of about `BLOCK` numbers; a tensor without values is one block."""
    n_rows = max(1, len(x) if x.is_meta else BLOCK // max(1, x.shape[1]))
    return (slice(start, start + n_rows) for start in range(0, len(x), n_rows))


def turn(x: Tensor) -> Tensor:
    """Multiply each block of 64 columns by the Hadamard matrix; `turn(turn(x))` is x.

    The order of the sums is part of the definition, so that kernels give the same bits: halves 32 apart first, then 16,
    8, 4, 2 and 1; at the end a product with 1/8.

    Args:
        x: `(..., n_cols)`, float32 or float64; `n_cols` is a multiple of 64.
    """
    shape = x.shape
    x = x.reshape(-1, TURNED)
    for apart in (32, 16, 8, 4, 2, 1):
        pairs = x.view(-1, TURNED // (2 * apart), 2, apart)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).reshape(-1, TURNED)
    return (x / math.sqrt(TURNED)).view(shape)


def quantise(x: Tensor, factors: Tensor | None = None, *, turned: bool = False) -> Rows8:
    """Round each row of `x * factors` to whole numbers from -127 to 127 times the row's scale.

    Args:
        x: `(n_rows, n_cols)`.
        factors: `(n_cols,)`, float32, or None for ones.
        turned: Whether to turn the row first.
    """
    values = x.to(torch.float32)
    if factors is not None:
        values = values * factors
    finite = values.isfinite().all(-1)
    if turned:
        values = turn(values)
        finite &= values.isfinite().all(-1)
    top = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(len(values))
    is_zero = ~(top >= SMALLEST)
    # A number divided by a tensor would be a product with its reciprocal, which rounds twice.
    inverse = torch.where(is_zero | ~finite, 0.0, torch.full_like(top, LARGEST) / top)
    scale = torch.where(finite, torch.where(is_zero, 0.0, top / LARGEST), math.nan)
    values = torch.where(finite[:, None], values, 0.0)
    return Rows8((values * inverse[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale)


def quantise_twice(x: Tensor, factors: Tensor) -> tuple[Rows8, Rows8]:
    """Round `x * factors` to 8 bits, and round what that leaves over to 8 bits more; their sum has 16.

    Args:
        x, factors: As for `quantise`.
    """
    first = quantise(x, factors)
    return first, quantise(x.to(torch.float32) * factors - first.values * first.scale[:, None])


def quantise_weight(weight: Tensor, *, turned: bool = False) -> Weight8:
    """Round a weight `(n_cols, n_inner)` with a scale per column of the result.

    Args:
        weight: The weight, of a floating dtype.
        turned: Whether to turn each block of 64 inner columns first; `n_inner` must be a multiple of 64.
    """
    values, scale = quantise(weight, turned=turned)
    return Weight8.of(values, scale, turned)


def left_over(weight: Tensor, rounded: Weight8) -> Tensor:
    """Return what rounding left over of a weight, in float32, turned if the rounded weight is.

    `quantise_weight` makes the second term of it, without turning it again. Both terms are equally `turned`.

    Args:
        weight: `(n_cols, n_inner)`, of a floating dtype.
        rounded: What `quantise_weight` made of it.
    """
    values = weight.to(torch.float32)
    return (turn(values) if rounded.turned else values) - rounded.values * rounded.scale[:, None]


def second_term(weight: Tensor, rounded: Weight8, rounds: Callable[..., Weight8] | None = None) -> Weight8:
    """Return what rounding left over of a weight in 8 bits more, turned if the rounded weight is.

    Args:
        weight, rounded: As for `left_over`.
        rounds: The function that rounds the blocks; `quantise_weight` by default.
    """
    rounds = rounds or quantise_weight
    values, scale = torch.empty_like(rounded.values), torch.empty_like(rounded.scale)
    for rows in _blocks(weight):
        block = Weight8(rounded.values[rows], rounded.scale[rows], rounded.turned, *rounded[3:])
        made = rounds(left_over(weight[rows], block), turned=False)
        values[rows], scale[rows] = made.values, made.scale
    return Weight8.of(values, scale, rounded.turned)


def dequantise_weight(weight: Weight8, rest: Weight8 | None = None) -> Tensor:
    """Return the float32 weight that an 8-bit one stands for, with its second term if it has one."""
    values = weight.values.to(torch.float32) * weight.scale[:, None]
    if rest is not None:
        values += rest.values * rest.scale[:, None]
    return turn(values) if weight.turned else values


def linear(
    rows: Rows8, weight: Weight8, bias: Tensor | None, dtype: torch.dtype, rest: Weight8 | None = None
) -> Tensor:
    """Multiply rows by the transpose of a weight: `(n_rows, n_cols)`.

    Args:
        rows: `(n_rows, n_inner)`, turned if the weight is.
        weight: `(n_cols, n_inner)`.
        bias: `(n_cols,)`, of any floating dtype, or None.
        dtype: The dtype of the result, rounded once.
        rest: The weight's second term, or None. Its product is added in float32: the sum is rounded, not the terms.
    """
    y = _product(rows.values, weight.values.t()) * rows.scale[:, None] * weight.scale
    y = y if bias is None else y + bias.to(torch.float32)
    return (y if rest is None else y + linear(rows, rest, None, torch.float32)).to(dtype)


def linear_backward(rows: Rows8, weight: Weight8, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a linear layer's input: `(n_rows, n_inner)`.

    Args:
        rows: `quantise(dy, weight.scale)`, `(n_rows, n_cols)`.
        weight: `(n_cols, n_inner)`.
        dtype: The dtype of the result, rounded once.
    """
    dx = _product(rows.values, weight.values) * rows.scale[:, None]
    return (turn(dx) if weight.turned else dx).to(dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply whole numbers exactly; the result is rounded to float32 once."""
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.float32)
