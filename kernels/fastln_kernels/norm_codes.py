"""x_hat in codes of 8 bits: the kernels of norms write them forward and read them backward.

A scale belongs to a group of 64 neighbouring columns of a row. Wherever columns begin in a multiple of 64 their groups
are whole, up to the row's end; the numbers of a group lie in lanes beside each other.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
import triton
import triton.language as tl

from fastln_kernels import reference_codes
from fastln_kernels.code_values import decode_symmetric, symmetric
from fastln_kernels.tiles import tile_mask

GROUP = tl.constexpr(reference_codes.GROUPS[8])


@triton.jit
def _scale_places(rows, in_rows, first, N_COLS: tl.constexpr, COLS: tl.constexpr):
    """Return the places and the mask of the scales of `COLS` columns from `first` on: `(ROWS, groups)`."""
    A_ROW: tl.constexpr = (COLS + GROUP - 1) // GROUP
    N_GROUPS: tl.constexpr = (N_COLS + GROUP - 1) // GROUP
    groups = first // GROUP + tl.arange(0, A_ROW)
    return rows[:, None] * N_GROUPS + groups[None, :], in_rows[:, None] & (groups < N_GROUPS)[None, :]


@triton.jit
def load_scales(ptr, rows, in_rows, first, N_COLS: tl.constexpr, COLS: tl.constexpr):
    """Load the scales of `COLS` columns of rows (int64) from `first` on, row after row; 0 beyond the last."""
    at, mask = _scale_places(rows, in_rows, first, N_COLS, COLS)
    return tl.reshape(tl.load(ptr + at, mask=mask, other=0.0), [at.numel])


@triton.jit
def decoded(codes, scales):
    """Return what a tile of codes stands for, in float32, given the scales of its groups, row after row."""
    groups = tl.reshape(codes, [scales.shape[0], codes.numel // scales.shape[0]])
    return tl.reshape(decode_symmetric(groups, scales, 8), codes.shape)


@triton.jit
def store_codes(codes_ptr, scale_ptr, x_hat, rows, in_rows, first, mask, N_COLS: tl.constexpr):
    """Store codes of some columns of x_hat, `(ROWS, COLS)`, from `first` on, and their scales.

    Columns that `mask` leaves out may hold anything.
    """
    COLS: tl.constexpr = x_hat.shape[1]
    tl.static_assert(COLS % GROUP == 0 or COLS >= N_COLS)
    at, in_groups = _scale_places(rows, in_rows, first, N_COLS, COLS)
    groups: tl.constexpr = [at.numel, x_hat.numel // at.numel]
    counts = tl.reshape(tl.broadcast_to(mask, x_hat.shape), groups)
    codes, scale = symmetric(tl.reshape(x_hat, groups), counts, 8)
    cols = first + tl.arange(0, COLS)
    tl.store(codes_ptr + rows[:, None] * N_COLS + cols[None, :], tl.reshape(codes, x_hat.shape), mask=mask)
    tl.store(scale_ptr + at, tl.reshape(scale, at.shape), mask=in_groups)


@triton.jit
def store_tile_codes(
    codes_ptr, scale_ptr, x, statistics, rows, in_rows, cols, N_COLS: tl.constexpr, PIECES: tl.constexpr
):
    """Store codes of a tile's x_hat, piece after piece. It is computed again, which takes fewer registers than to keep
    it in float32.

    Args:
        codes_ptr: Where the codes go.
        scale_ptr: Where their scales go.
        x: The tile before the norm.
        statistics: The rows' means, what these leave over, and rstd.
        rows: The rows' numbers, int64.
        in_rows: Which of them exist.
        cols: The columns of a piece.
        N_COLS: Columns in a row.
        PIECES: Pieces in a row.
    """
    mean, residual_mean, rstd = statistics
    PIECE: tl.constexpr = cols.shape[0]
    for k in tl.static_range(PIECES):
        x_hat = (x[k].to(tl.float32) - mean[:, None] - residual_mean[:, None]) * rstd[:, None]
        mask = tile_mask(in_rows, cols, k, N_COLS)
        store_codes(codes_ptr, scale_ptr, x_hat, rows, in_rows, k * PIECE, mask, N_COLS)
