"""Activations whose results are written in 8 bits too: whole rows, because a row's scale needs its largest element.

`activation_values.py` has the functions of one element. A row fits into the registers and is read once. Rounded is what
a result becomes in its own dtype, in which it is written too. A pointer that is None removes its part of the kernel at
compile time.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import triton
import triton.language as tl

from fastln_kernels.activation_values import times_slope, value
from fastln_kernels.int8_rows import store_rounded
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
    """Compute `activation(x)`, or `activation(x) * up`, of a tile of rows; write it in full and in 8 bits."""
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
    store_tile(y_ptr, y, rows, in_rows, cols, N_COLS, PIECES)
    store_rounded(values_ptr, scale_ptr, None, y, rows, in_rows, cols, N_COLS, PIECES, TURN, dtype)


@triton.jit(do_not_specialize=["n_rows"])
def backward_rows_kernel(
    dy_ptr,
    x_ptr,
    up_ptr,
    dx_ptr,
    dup_ptr,
    factors_ptr,
    values_ptr,
    scale_ptr,
    up_factors_ptr,
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
    """Compute the requested gradients of `x` and `up` of a tile of rows; write them in full and, times factors, in 8
    bits, where these are wanted. A plain activation has no `up` and no `dup`.
    """
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
        if dup_ptr is not None:
            dup += ((dvalue * value(wide, KIND)).to(dtype),)
        if dx_ptr is not None:
            if up_ptr is not None:
                dvalue *= up[k].to(tl.float32)
            dx += (times_slope(dvalue, wide, KIND).to(dtype),)
    # Both in full, then both in 8 bits: one after the other takes 150 registers on an MI300X (SwiGLU, 4,096 columns,
    # bfloat16, compiled), where this takes 100.
    if dx_ptr is not None:
        store_tile(dx_ptr, dx, rows, in_rows, cols, N_COLS, PIECES)
    if dup_ptr is not None:
        store_tile(dup_ptr, dup, rows, in_rows, cols, N_COLS, PIECES)
    if values_ptr is not None:
        store_rounded(values_ptr, scale_ptr, factors_ptr, dx, rows, in_rows, cols, N_COLS, PIECES, False, dtype)
    if up_values_ptr is not None:
        store_rounded(
            up_values_ptr, up_scale_ptr, up_factors_ptr, dup, rows, in_rows, cols, N_COLS, PIECES, False, dtype
        )
