"""Activations that keep codes for their backward and whose results are written in 8 bits too: whole rows.

As in `activation_rows.py`, a row fits into the registers and is read once. As in `activation_codes.py`, codes are
written forward and read backward by the same kernels. A pointer that is None removes its part of a kernel.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
import triton
import triton.language as tl

from fastln_kernels.activation_values import times_slope, value
from fastln_kernels.code_values import (
    decode_slope,
    decode_symmetric,
    encode_slope,
    pack,
    symmetric,
    times_decoded,
    unpack,
)
from fastln_kernels.int8_rows import store_rounded
from fastln_kernels.tiles import load_tile, store_tile


@triton.jit
def _store_symmetric(
    codes_ptr,
    scale_ptr,
    tile,
    rows,
    in_rows,
    cols,
    N_COLS: tl.constexpr,
    PIECES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store a tile of rows as symmetric codes, with a scale for each `GROUP` columns."""
    ROWS: tl.constexpr = rows.shape[0]
    PIECE: tl.constexpr = cols.shape[0]
    codes = ()
    scales = ()
    for k in tl.static_range(PIECES):
        mask = (cols + k * PIECE < N_COLS)[None, :] & (in_rows | True)[:, None]
        groups = tl.reshape(tile[k], [ROWS * PIECE // GROUP, GROUP])
        code, scale = symmetric(groups, tl.reshape(mask, [ROWS * PIECE // GROUP, GROUP]), BITS)
        codes += (tl.reshape(code, [ROWS, PIECE * BITS // 8]),)
        scales += (tl.reshape(scale, [ROWS, PIECE // GROUP]),)
    places = tl.arange(0, PIECE * BITS // 8)
    store_tile(codes_ptr, codes, rows, in_rows, places, (N_COLS * BITS + 7) // 8, PIECES)
    store_tile(scale_ptr, scales, rows, in_rows, tl.arange(0, PIECE // GROUP), (N_COLS + GROUP - 1) // GROUP, PIECES)


@triton.jit(do_not_specialize=["n_rows"])
def forward_rows_codes_kernel(
    x_ptr,
    up_ptr,
    y_ptr,
    values_ptr,
    scale_ptr,
    codes_ptr,
    slopes_ptr,
    codes_scale_ptr,
    slopes_scale_ptr,
    n_rows,
    x_stride,
    up_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    KIND: tl.constexpr,
    TURN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    """Compute `activation(x)`, or `activation(x) * up`, of a tile of rows; write it in full and in 8 bits.

    Write the codes of the derivative, or, if there is an `up`, those of the factors of both gradients.
    """
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
    if up_ptr is None:
        codes = ()
        for k in tl.static_range(PIECES):
            wide = x[k].to(tl.float32)
            code = encode_slope(times_slope(tl.full(wide.shape, 1.0, tl.float32), wide, KIND), BOUNDS, BITS)
            if (k + 1) * PIECE > N_COLS:
                code = tl.where((cols + k * PIECE < N_COLS)[None, :], code, 0)
            codes += (pack(code, BITS),)
        places = tl.arange(0, PIECE * BITS // 8)
        store_tile(codes_ptr, codes, rows, in_rows, places, (N_COLS * BITS + 7) // 8, PIECES)
    else:
        values = ()
        slopes = ()
        for k in tl.static_range(PIECES):
            wide = x[k].to(tl.float32)
            values += (value(wide, KIND),)
            slopes += (times_slope(up[k].to(tl.float32), wide, KIND),)
        _store_symmetric(codes_ptr, codes_scale_ptr, values, rows, in_rows, cols, N_COLS, PIECES, BITS, GROUP)
        _store_symmetric(slopes_ptr, slopes_scale_ptr, slopes, rows, in_rows, cols, N_COLS, PIECES, BITS, GROUP)


@triton.jit
def _load_factors(
    codes_ptr,
    scale_ptr,
    rows,
    in_rows,
    cols,
    N_COLS: tl.constexpr,
    PIECES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Return a tile of the factors, in float32, that codes stand for: symmetric ones if there is a scale."""
    ROWS: tl.constexpr = rows.shape[0]
    PIECE: tl.constexpr = cols.shape[0]
    CODES: tl.constexpr = (N_COLS * BITS + 7) // 8
    codes = load_tile(codes_ptr, rows, CODES, in_rows, tl.arange(0, PIECE * BITS // 8), CODES, PIECES)
    factors = ()
    if scale_ptr is None:
        for k in tl.static_range(PIECES):
            factors += (decode_slope(unpack(codes[k], BITS), LEVELS, BITS),)
    else:
        N_GROUPS: tl.constexpr = (N_COLS + GROUP - 1) // GROUP
        scales = load_tile(scale_ptr, rows, N_GROUPS, in_rows, tl.arange(0, PIECE // GROUP), N_GROUPS, PIECES)
        for k in tl.static_range(PIECES):
            scale = tl.reshape(scales[k], [ROWS * PIECE // GROUP])
            code = tl.reshape(codes[k], [ROWS * PIECE // GROUP, GROUP * BITS // 8])
            factors += (tl.reshape(decode_symmetric(code, scale, BITS), [ROWS, PIECE]),)
    return factors


@triton.jit(do_not_specialize=["n_rows"])
def backward_rows_codes_kernel(
    dy_ptr,
    dx_ptr,
    dup_ptr,
    factors_ptr,
    values_ptr,
    scale_ptr,
    up_factors_ptr,
    up_values_ptr,
    up_scale_ptr,
    codes_ptr,
    slopes_ptr,
    codes_scale_ptr,
    slopes_scale_ptr,
    n_rows,
    dy_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Compute the requested gradients of a tile of rows from codes; write them in full and, times factors, in 8 bits.

    `slopes` are the codes of dx's factor, `codes` of dup's, if there is one.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    cols = tl.arange(0, PIECE)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    dy = load_tile(dy_ptr, rows, dy_stride, in_rows, cols, N_COLS, PIECES)
    dx = ()
    dup = ()
    if dx_ptr is not None:
        slope = _load_factors(slopes_ptr, slopes_scale_ptr, rows, in_rows, cols, N_COLS, PIECES, BITS, GROUP, LEVELS)
        for k in tl.static_range(PIECES):
            if slopes_scale_ptr is None:
                dx += (times_decoded(dy[k].to(tl.float32), slope[k], KIND).to(dtype),)
            else:
                dx += ((dy[k].to(tl.float32) * slope[k]).to(dtype),)
        store_tile(dx_ptr, dx, rows, in_rows, cols, N_COLS, PIECES)
    if dup_ptr is not None:
        values = _load_factors(codes_ptr, codes_scale_ptr, rows, in_rows, cols, N_COLS, PIECES, BITS, GROUP, LEVELS)
        for k in tl.static_range(PIECES):
            dup += ((dy[k].to(tl.float32) * values[k]).to(dtype),)
        store_tile(dup_ptr, dup, rows, in_rows, cols, N_COLS, PIECES)
    if values_ptr is not None:
        store_rounded(values_ptr, scale_ptr, factors_ptr, dx, rows, in_rows, cols, N_COLS, PIECES, False, dtype)
    if up_values_ptr is not None:
        store_rounded(
            up_values_ptr, up_scale_ptr, up_factors_ptr, dup, rows, in_rows, cols, N_COLS, PIECES, False, dtype
        )
