"""A tile of whole rows as a tuple of pieces, each `(rows, PIECE)`, so that a width need not be a power of two.

A piece is as wide as the lanes that share a row load at once, 16 bytes each; so every warp has rows of its own where a
row is one warp wide, and what is summed along a row stays inside it: no barrier, no shared memory. Pieces keep the
dtype they were loaded in, which takes half the registers of float32, and are cast where they are used.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import triton
import triton.language as tl


@triton.jit
def tile_mask(in_rows, cols, k: tl.constexpr, N_COLS: tl.constexpr):
    """Return the mask of piece `k`; only a last piece that is not full needs to look at its columns."""
    PIECE: tl.constexpr = cols.shape[0]
    mask = in_rows[:, None]
    if (k + 1) * PIECE > N_COLS:
        mask = mask & (cols + k * PIECE < N_COLS)[None, :]
    return mask


@triton.jit
def load_tile(ptr, rows, stride, in_rows, cols, N_COLS: tl.constexpr, PIECES: tl.constexpr):
    """Load `rows` (int64), `stride` elements apart; 0 beyond the last row and the last column."""
    tile = ()
    for k in tl.static_range(PIECES):
        at = rows[:, None] * stride + (cols + k * cols.shape[0])[None, :]
        tile += (tl.load(ptr + at, mask=tile_mask(in_rows, cols, k, N_COLS), other=0.0),)
    return tile


@triton.jit
def store_tile(ptr, tile, rows, in_rows, cols, N_COLS: tl.constexpr, PIECES: tl.constexpr):
    """Store a tile into a contiguous tensor."""
    for k in tl.static_range(PIECES):
        at = rows[:, None] * N_COLS + (cols + k * cols.shape[0])[None, :]
        tl.store(ptr + at, tile[k], mask=tile_mask(in_rows, cols, k, N_COLS))


@triton.jit
def load_vector(ptr, in_rows, cols, N_COLS: tl.constexpr, PIECES: tl.constexpr):
    """Load a vector as wide as a row, once per row: so it lies in registers like the rows, with no exchange."""
    same = (in_rows & False).to(tl.int32)
    tile = ()
    for k in tl.static_range(PIECES):
        at = same[:, None] + (cols + k * cols.shape[0])[None, :]
        tile += (tl.load(ptr + at, mask=at < N_COLS, other=0.0),)
    return tile


@triton.jit
def two_means(a, b, N_COLS: tl.constexpr):
    """Return the rows' means of two tiles; summed together, they wait for each other half as often."""
    mean_a, mean_b = tl.split(tl.sum(tl.join(a, b), axis=1) / N_COLS)
    return mean_a, mean_b


@triton.jit
def centred(tile, mean, k: tl.constexpr, cols, N_COLS: tl.constexpr):
    """Return the differences of piece `k` from its rows' means; 0 beyond the last column."""
    PIECE: tl.constexpr = cols.shape[0]
    difference = tile[k].to(tl.float32) - mean[:, None]
    if (k + 1) * PIECE > N_COLS:
        difference = tl.where((cols + k * PIECE < N_COLS)[None, :], difference, 0.0)
    return difference


@triton.jit
def about_the_mean(squares, residual_mean):
    """Return the variance, from the mean square about the rounded mean and what the rounding left over.

    Rounding may take a constant row's just below zero; a NaN stays one, which the hardware's maximum would drop.
    """
    return tl.maximum(squares - residual_mean * residual_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
