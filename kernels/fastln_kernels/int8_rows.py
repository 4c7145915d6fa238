"""Rounding tiles of rows to 8 bits, for kernels that hold whole rows in registers. kernels/README.md has the formulas.

The largest magnitude is found on the bit patterns, as whole numbers: NaN and Inf are then the largest, so one maximum
finds them too, and no hardware maximum can drop a NaN.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import triton
import triton.language as tl

from fastln_kernels import reference_int8
from fastln_kernels.tiles import load_vector_piece, store_tile

LARGEST = tl.constexpr(float(reference_int8.LARGEST))
SMALLEST = tl.constexpr(reference_int8.SMALLEST)
TURNED = tl.constexpr(reference_int8.TURNED)
ROUNDER = tl.constexpr(1.5 * 2**23)  # added to a small number, it leaves the nearest whole number in the low bits


@triton.jit
def _signs(AXIS: tl.constexpr):
    """Return 1 and -1 along one axis of a hypercube of 64 elements."""
    return tl.reshape(1 - 2 * tl.arange(0, 2), [1] * AXIS + [2] + [1] * (6 - AXIS)).to(tl.float32)


@triton.jit
def turn(x):
    """Multiply each block of 64 columns of a tile by the Hadamard matrix, with the definition's order of sums.

    An exchange between neighbours is a shuffle inside the warp, or none if one lane holds both.
    """
    blocks = tl.reshape(x, [x.shape[0] * x.shape[1] // TURNED, 2, 2, 2, 2, 2, 2])
    for axis in tl.static_range(1, 7):
        bits = blocks.to(tl.int32, bitcast=True)
        # The pair's sum as whole numbers, less one, is the other: exact, and free beside the exchange. The detour by 64
        # bits is for the interpreter, whose sums don't wrap around.
        other = (tl.sum(bits, axis, keep_dims=True) - bits).to(tl.int64).to(tl.int32)
        blocks = other.to(tl.float32, bitcast=True) + blocks * _signs(axis)
    return tl.reshape(blocks, x.shape) * 0.125


@triton.jit
def magnitude(x):
    """Return the bit pattern of `|x|`, which as a whole number has the order of the magnitudes, NaN last."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales(top, LARGEST: tl.constexpr = LARGEST):
    """Return the factor that makes whole numbers of a row (0 if it has none), and the row's scale.

    Args:
        top: The largest `magnitude` of each row.
        LARGEST: The largest whole number.
    """
    finite = top < 0x7F800000
    largest = top.to(tl.float32, bitcast=True)
    counts = finite & (largest >= SMALLEST)
    inverse = tl.where(counts, tl.div_rn(LARGEST, tl.where(counts, largest, 1.0)), 0.0)
    scale = tl.where(finite, tl.where(counts, tl.div_rn(largest, LARGEST), 0.0), float("nan"))
    return inverse, scale


@triton.jit
def whole(x, inverse, LARGEST: tl.constexpr = LARGEST):
    """Return the whole numbers nearest to `x * inverse`, as int8; ties go to the even one."""
    # A factor of 0 is that of a row of zeros, NaN or Inf.
    x = tl.where((inverse > 0)[:, None], x, 0.0) * inverse[:, None]
    # Besides their meaning, the bounds keep product and sum from being contracted into one rounding.
    x = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return (x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _times(piece, factors_ptr, in_rows, cols, k: tl.constexpr, N_COLS: tl.constexpr):
    """Return piece `k` of rows in float32, times the factors if there are any."""
    piece = piece.to(tl.float32)
    if factors_ptr is not None:
        piece *= load_vector_piece(factors_ptr, in_rows, cols, k, N_COLS)
    return piece


@triton.jit
def store_rounded(
    values_ptr,
    scale_ptr,
    factors_ptr,
    tile,
    rows,
    in_rows,
    cols,
    N_COLS: tl.constexpr,
    PIECES: tl.constexpr,
    TURN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Store in 8 bits what a tile becomes in `DTYPE`. Columns beyond the last one may hold anything.

    Factors are loaded twice, which takes fewer registers than to keep them, or the products, which are float32.
    """
    PIECE: tl.constexpr = cols.shape[0]
    kept = ()
    for k in tl.static_range(PIECES):
        piece = tile[k]
        if (k + 1) * PIECE > N_COLS:
            piece = tl.where((cols + k * PIECE < N_COLS)[None, :], piece.to(tl.float32), 0.0)
        piece = piece.to(DTYPE)
        if TURN:
            piece = turn(_times(piece, factors_ptr, in_rows, cols, k, N_COLS))
        kept += (piece,)
    if TURN:
        _store_kept(values_ptr, scale_ptr, None, kept, rows, in_rows, cols, N_COLS, PIECES)
    else:
        _store_kept(values_ptr, scale_ptr, factors_ptr, kept, rows, in_rows, cols, N_COLS, PIECES)


@triton.jit
def _store_kept(
    values_ptr, scale_ptr, factors_ptr, kept, rows, in_rows, cols, N_COLS: tl.constexpr, PIECES: tl.constexpr
):
    top = magnitude(_times(kept[0], factors_ptr, in_rows, cols, 0, N_COLS))
    for k in tl.static_range(1, PIECES):
        top = tl.maximum(top, magnitude(_times(kept[k], factors_ptr, in_rows, cols, k, N_COLS)))
    inverse, scale = scales(tl.max(top, axis=1))
    values = ()
    for k in tl.static_range(PIECES):
        values += (whole(_times(kept[k], factors_ptr, in_rows, cols, k, N_COLS), inverse),)
    store_tile(values_ptr, values, rows, in_rows, cols, N_COLS, PIECES)
    tl.store(scale_ptr + rows, scale, mask=in_rows)
