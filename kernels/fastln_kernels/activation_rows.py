"""Activations whose results are rounded to 8 bits: whole rows, because a row's scale needs its largest element.

`activation.py` has the functions of one element. A row that fits into the registers is read once. The result may be
written in its own dtype too; rounded is what it becomes in that dtype.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastln_kernels import activation, int8, launch
from fastln_kernels.activation import times_slope, value
from fastln_kernels.int8_rows import store_rounded
from fastln_kernels.reference_activation import ActivationKind
from fastln_kernels.reference_int8 import Rows8
from fastln_kernels.tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["n_rows"])
def forward_rows_kernel(
    x_ptr,
    up_ptr,
    y_ptr,
    values_ptr,
    scale_ptr,
    n_rows,
    x_stride,
    up_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    KIND: tl.constexpr,
    TURN: tl.constexpr,
):
    """Compute `activation(x)`, or `activation(x) * up`, of a tile of rows, in 8 bits and, if wanted, in full."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    cols = tl.arange(0, PIECE)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = load_tile(x_ptr, rows, x_stride, in_rows, cols, N_COLS, PIECES)
    if up_ptr is not None:
        up = load_tile(up_ptr, rows, up_stride, in_rows, cols, N_COLS, PIECES)
    y = ()
    for k in tl.static_range(PIECES):
        piece = value(x[k].to(tl.float32), KIND)
        if up_ptr is not None:
            piece *= up[k].to(tl.float32)
        y += (piece.to(dtype),)
    if y_ptr is not None:
        store_tile(y_ptr, y, rows, in_rows, cols, N_COLS, PIECES)
    store_rounded(values_ptr, scale_ptr, None, y, rows, in_rows, cols, N_COLS, PIECES, TURN, dtype)


@triton.jit(do_not_specialize=["n_rows"])
def backward_rows_kernel(
    dy_ptr,
    x_ptr,
    up_ptr,
    factors_ptr,
    up_factors_ptr,
    values_ptr,
    scale_ptr,
    up_values_ptr,
    up_scale_ptr,
    n_rows,
    dy_stride,
    x_stride,
    up_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    KIND: tl.constexpr,
):
    """Compute the gradients of `x`, and of `up` if there is one, of a tile of rows, times their factors, in 8 bits."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    cols = tl.arange(0, PIECE)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    dy = load_tile(dy_ptr, rows, dy_stride, in_rows, cols, N_COLS, PIECES)
    x = load_tile(x_ptr, rows, x_stride, in_rows, cols, N_COLS, PIECES)
    if up_ptr is not None:
        up = load_tile(up_ptr, rows, up_stride, in_rows, cols, N_COLS, PIECES)
    dx = ()
    dup = ()
    for k in tl.static_range(PIECES):
        dvalue = dy[k].to(tl.float32)
        wide = x[k].to(tl.float32)
        if up_ptr is not None:
            dup += ((dvalue * value(wide, KIND)).to(dtype),)
            dvalue *= up[k].to(tl.float32)
        dx += (times_slope(dvalue, wide, KIND).to(dtype),)
    store_rounded(values_ptr, scale_ptr, factors_ptr, dx, rows, in_rows, cols, N_COLS, PIECES, False, dtype)
    if up_ptr is not None:
        store_rounded(
            up_values_ptr, up_scale_ptr, up_factors_ptr, dup, rows, in_rows, cols, N_COLS, PIECES, False, dtype
        )


def forward(
    x: Tensor, up: Tensor | None, kind: ActivationKind, *, turned: bool = False, want_y: bool = False
) -> tuple[Tensor | None, Rows8]:
    """Compute `y = activation(x)`, or `activation(x) * up`, and round it to 8 bits.

    Args:
        x: `(n_rows, n_cols)`, float32, bfloat16 or float16.
        up: Likewise, or None.
        kind: The kind of activation.
        turned: Whether rows are turned before they are rounded.
        want_y: Whether y is returned too.

    Returns:
        y or None, and `quantise(y, turned=turned)`.
    """
    n_rows, n_cols = x.shape
    tile = launch.activation_tile(n_cols, x.element_size(), x.device, n_inputs=1 + (up is not None))
    if tile is None or x.numel() == 0:
        full = activation.activation_forward(x, kind) if up is None else activation.gated_forward(x, up, kind)
        return full if want_y else None, int8.quantise(full, turned=turned)
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device) if want_y else None
    rows8 = int8.empty_rows(n_rows, n_cols, x.device, turned=turned)
    x, up = _unit_columns(x), None if up is None else _unit_columns(up)
    strides = (x.stride(0), 0 if up is None else up.stride(0))
    _launch(forward_rows_kernel, (x, up, y, *rows8), strides, x, tile, KIND=kind, TURN=turned)
    return y, rows8


def backward(
    dy: Tensor,
    x: Tensor,
    up: Tensor | None,
    kind: ActivationKind,
    factors: Tensor | None,
    up_factors: Tensor | None = None,
) -> tuple[Rows8, Rows8 | None]:
    """Compute the gradients of `x` and `up`, and round them to 8 bits.

    Args:
        dy: `(n_rows, n_cols)`, the gradient of the result.
        x: As in the forward.
        up: As in the forward.
        kind: As in the forward.
        factors: `(n_cols,)`, float32, contiguous: the scales of the weight that multiplies dx. None for ones.
        up_factors: Likewise, for the gradient of `up`.

    Returns:
        `quantise(dx, factors)` and, if there is an `up`, `quantise(dup, up_factors)`.
    """
    n_rows, n_cols = x.shape
    tile = launch.activation_tile(n_cols, x.element_size(), x.device, n_inputs=2 + (up is not None))
    if tile is None or x.numel() == 0:
        if up is None:
            return int8.quantise(activation.activation_backward(dy, x, kind), factors), None
        dx, dup = activation.gated_backward(dy, x, up, kind, need_dgate=True, need_dup=True)
        assert dx is not None
        assert dup is not None
        return int8.quantise(dx, factors), int8.quantise(dup, up_factors)
    rows8 = int8.empty_rows(n_rows, n_cols, x.device, turned=False)
    up_rows8 = None if up is None else int8.empty_rows(n_rows, n_cols, x.device, turned=False)
    dy, x, up = _unit_columns(dy), _unit_columns(x), None if up is None else _unit_columns(up)
    strides = (dy.stride(0), x.stride(0), 0 if up is None else up.stride(0))
    tensors = (dy, x, up, factors, up_factors, *rows8, *(up_rows8 or (None, None)))
    _launch(backward_rows_kernel, tensors, strides, x, tile, KIND=kind)
    return rows8, up_rows8


def _launch(
    kernel: Any, tensors: tuple[Tensor | None, ...], strides: tuple[int, ...], x: Tensor, tile: Any, **constants: Any
) -> None:
    n_rows, n_cols = x.shape
    with launch.on_device(x.device):
        grid = (triton.cdiv(n_rows, tile.rows),)
        kernel[grid](*tensors, n_rows, *strides, N_COLS=n_cols, **constants, **launch.row_options(tile))


def _unit_columns(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
