"""Frozen linear layers in 8 bits in Triton: rows rounded to int8, and the two products with the rounded weight.

The functions are those of `fastln_kernels.reference_int8`. Both products read the same row-major weight: the forward
sums along its rows, the backward along its columns. Sums are int32, so they are exact. The epilogue multiplies by the
scales, in float32, and rounds once.

Row addresses are int64. The number of rows is a run-time argument on which Triton does not specialise. Widths of
products are run-time arguments too: at compile time only one thing is known about them, whether 16 divides them.
Otherwise loads are narrow.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastln_kernels import launch
from fastln_kernels.int8_rows import magnitude, scales, store_rounded, turn, whole
from fastln_kernels.reference_int8 import TURNED, Rows8, Weight8
from fastln_kernels.tiles import load_tile

MOST_INNER = 2**17
"""The most summands of a product: sums of more could exceed 32 bits."""


class Rounding(NamedTuple):
    """How a kernel writes the rows that it makes in 8 bits too.

    Attributes:
        rows: Where it writes them.
        factors: `(n_cols,)`, float32, contiguous: what they are multiplied by first. None for ones.
        turned: Whether they are turned.
    """

    rows: Rows8
    factors: Tensor | None
    turned: bool

    def after(self, x: Tensor) -> None:
        """Write rows `x` `(n_rows, n_cols)` in 8 bits, by a kernel of its own: for rows too wide for the registers."""
        quantise(x, self.factors, turned=self.turned, out=self.rows)


@triton.jit(do_not_specialize=["n_rows"])
def quantise_kernel(
    x_ptr,
    factors_ptr,
    values_ptr,
    scale_ptr,
    n_rows,
    x_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    TURN: tl.constexpr,
):
    """Round one tile of rows: read it once, write it once."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    cols = tl.arange(0, PIECE)
    tile = load_tile(x_ptr, rows, x_stride, in_rows, cols, N_COLS, PIECES)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    store_rounded(values_ptr, scale_ptr, factors_ptr, tile, rows, in_rows, cols, N_COLS, PIECES, TURN, DTYPE)


@triton.jit
def _block(x_ptr, factors_ptr, row, start, cols, x_stride, N_COLS: tl.constexpr, TURN: tl.constexpr):
    """Return a block `(1, COLS)` of a row in float32, and its mask."""
    at = start + cols[None, :]
    mask = at < N_COLS
    x = tl.load(x_ptr + row[:, None] * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    if factors_ptr is not None:
        x *= tl.load(factors_ptr + at, mask=mask, other=0.0)
    if TURN:
        x = turn(x)
    return x, mask


@triton.jit
def quantise_wide_kernel(
    x_ptr,
    factors_ptr,
    values_ptr,
    scale_ptr,
    x_stride,
    N_COLS: tl.constexpr,
    COLS: tl.constexpr,
    TURN: tl.constexpr,
):
    """Round one row in blocks of columns, which are read twice."""
    cols = tl.arange(0, COLS)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    top = tl.zeros((1, COLS), tl.int32)
    for start in range(0, N_COLS, COLS):
        x, _ = _block(x_ptr, factors_ptr, row, start, cols, x_stride, N_COLS, TURN)
        top = tl.maximum(top, magnitude(x))
    inverse, scale = scales(tl.max(top, axis=1))
    for start in range(0, N_COLS, COLS):
        x, mask = _block(x_ptr, factors_ptr, row, start, cols, x_stride, N_COLS, TURN)
        tl.store(values_ptr + row[:, None] * N_COLS + start + cols[None, :], whole(x, inverse), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _tile_of(n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """Return this program's rows (int64) and columns. `GROUP` tiles of rows take turns, so caches keep the weight."""
    n_down = tl.cdiv(n_rows, ROWS)
    group = GROUP * tl.cdiv(n_cols, COLS)
    program = tl.program_id(0)
    first = program // group * GROUP
    height = tl.minimum(n_down - first, GROUP)
    down = first + program % group % height
    across = program % group // height
    return down.to(tl.int64) * ROWS + tl.arange(0, ROWS), across * COLS + tl.arange(0, COLS)


@triton.jit(do_not_specialize=["n_rows"])
def product_kernel(
    values_ptr,
    scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    addend_ptr,
    result_ptr,
    n_rows,
    n_cols,
    n_inner,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    ALONG_ROWS: tl.constexpr,
    TURN: tl.constexpr,
):
    """Compute a tile of `y`, or of `dx`.

    The weight is `(n_cols, n_inner)` if `ALONG_ROWS`, else `(n_inner, n_cols)`.
    """
    rows, cols = _tile_of(n_rows, n_cols, ROWS, COLS, GROUP)
    in_rows, in_cols = rows < n_rows, cols < n_cols
    inner = tl.arange(0, INNER)
    sums = tl.zeros((ROWS, COLS), tl.int32)
    for start in range(0, n_inner, INNER):
        at = start + inner
        within = at < n_inner
        a_at = rows[:, None] * n_inner + at[None, :]
        a = tl.load(values_ptr + a_at, mask=in_rows[:, None] & within[None, :], other=0)
        if ALONG_ROWS:
            w_at = cols.to(tl.int64)[None, :] * n_inner + at[:, None]
        else:
            w_at = at.to(tl.int64)[:, None] * n_cols + cols[None, :]
        w = tl.load(w_ptr + w_at, mask=within[:, None] & in_cols[None, :], other=0)
        sums = tl.dot(a, w, sums, out_dtype=tl.int32)
    result = sums.to(tl.float32) * tl.load(scale_ptr + rows, mask=in_rows, other=0.0)[:, None]
    if w_scale_ptr is not None:
        result *= tl.load(w_scale_ptr + cols, mask=in_cols, other=0.0)[None, :]
    if bias_ptr is not None:
        result += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if TURN:
        result = turn(result)
    result_at, inside = rows[:, None] * n_cols + cols[None, :], in_rows[:, None] & in_cols[None, :]
    if addend_ptr is not None:
        result += tl.load(addend_ptr + result_at, mask=inside, other=0.0)
    tl.store(result_ptr + result_at, result, mask=inside)


def empty_rows(n_rows: int, n_cols: int, device: torch.device, *, turned: bool) -> Rows8:
    """Allocate rows in 8 bits.

    Raises:
        ValueError: If they are turned and no whole blocks of 64 columns.
    """
    if turned and n_cols % TURNED:
        raise ValueError(f"rows of {n_cols} columns are no whole blocks of {TURNED}, so they can't be turned")
    values = torch.empty((n_rows, n_cols), dtype=torch.int8, device=device)
    return Rows8(values, torch.empty((n_rows,), dtype=torch.float32, device=device))


def quantise(x: Tensor, factors: Tensor | None = None, *, turned: bool = False, out: Rows8 | None = None) -> Rows8:
    """Round each row of `x * factors`; arguments and results are those of `reference_int8.quantise`.

    The bits are those of the definition too, except after `factors` and turning together, where a product and a sum may
    be contracted. `out` may be given to be written to.
    """
    n_rows, n_cols = x.shape
    x = x if x.stride(1) == 1 or n_cols == 1 else x.contiguous()
    result = empty_rows(n_rows, n_cols, x.device, turned=turned) if out is None else out
    if n_rows == 0 or n_cols == 0:
        result.scale.zero_()
        return result
    tensors = (x, None if factors is None else factors.contiguous(), *result)
    with launch.on_device(x.device):
        tile = launch.quantise_tile(n_cols, x.element_size(), x.device, wider=turned or factors is not None)
        if tile:
            grid, options = (triton.cdiv(n_rows, tile.rows),), launch.row_options(tile)
            quantise_kernel[grid](*tensors, n_rows, x.stride(0), n_cols, TURN=turned, **options)
        else:
            options = launch.wide_quantise_options(x.element_size())
            quantise_wide_kernel[(n_rows,)](*tensors, x.stride(0), n_cols, TURN=turned, **options)
    return result


def rounding(like: Tensor, factors: Tensor | None = None, *, turned: bool = False) -> tuple[Rows8, Rounding]:
    """Return memory for rows in 8 bits, and what tells a kernel that makes the rows to write them there.

    Args:
        like: A tensor shaped like the rows, `(..., n_cols)`, on their device.
        factors, turned: As for `quantise`, whose result the kernel writes bit for bit.
    """
    n_cols = like.shape[-1]
    rows = empty_rows(like.numel() // max(n_cols, 1), n_cols, like.device, turned=turned)
    return rows, Rounding(rows, None if factors is None else factors.contiguous(), turned)


def quantise_weight(weight: Tensor, *, turned: bool = False) -> Weight8:
    """Round a weight; arguments and results are those of `reference_int8.quantise_weight`."""
    return Weight8.of(*quantise(weight, turned=turned), turned)


def linear(
    rows: Rows8, weight: Weight8, bias: Tensor | None, dtype: torch.dtype, rest: Weight8 | None = None
) -> Tensor:
    """Multiply rows by the transpose of a weight; arguments and results are those of `reference_int8.linear`."""
    n_cols, n_inner = weight.values.shape
    bias = bias if bias is None else bias.contiguous()
    addend = None if rest is None else linear(rows, rest, None, torch.float32)
    tensors = (weight.values, weight.scale, bias, addend)
    return multiply(rows, tensors, n_cols, n_inner, dtype, backward=False, turned=False)


def linear_backward(rows: Rows8, weight: Weight8, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the input; arguments and results are those of `reference_int8.linear_backward`."""
    n_inner, n_cols = weight.values.shape
    tensors = (weight.values, None, None, None)
    return multiply(rows, tensors, n_cols, n_inner, dtype, backward=True, turned=weight.turned)


def multiply(
    rows: Rows8,
    others: tuple[Tensor | None, ...],
    n_cols: int,
    n_inner: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    turned: bool,
) -> Tensor:
    """Launch the kernel of products.

    Args:
        rows: `(n_rows, n_inner)`.
        others: The weight's whole numbers; its scale and a bias, both `(n_cols,)`, and what is added to the result,
            `(n_rows, n_cols)` in float32, each of which may be None.
        n_cols: The columns of the result.
        n_inner: The length of its sums.
        dtype: The dtype of the result.
        backward: Whether sums go over the weight's rows.
        turned: Whether the result is turned back.
    """
    if n_inner > MOST_INNER:
        raise ValueError(f"sums of {n_inner:,} products may not fit into 32 bits; at most {MOST_INNER:,} do")
    n_rows, device = len(rows.values), rows.values.device
    result = torch.empty((n_rows, n_cols), dtype=dtype, device=device)
    if result.numel() == 0:
        return result
    with launch.on_device(device):
        adds = others[3] is not None
        tile = launch.product_tile(n_rows, n_cols, dtype.itemsize, device, backward=backward, turned=turned, adds=adds)
        grid = (triton.cdiv(n_rows, tile.rows) * triton.cdiv(n_cols, tile.cols),)
        options: dict[str, Any] = {
            "ROWS": tile.rows,
            "COLS": tile.cols,
            "INNER": tile.inner,
            "GROUP": tile.group,
            "ALONG_ROWS": not backward,
            "TURN": turned,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
        }
        product_kernel[grid](rows.values.contiguous(), rows.scale, *others, result, n_rows, n_cols, n_inner, **options)
    return result
