"""A tile of whole rows, stored as a tuple of pieces `(rows, PIECE)`, so that widths need not be powers of two.

The lanes that share a row load 16 bytes each; together that is one piece. If one warp covers a row, each warp has its
own rows, and sums along a row stay inside the warp: no barrier, no shared memory. Pieces keep the dtype in which they
were loaded and are cast at each use, because 16-bit pieces take half the registers of float32.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import triton
import triton.language as tl


@triton.jit
def tile_mask(in_rows, cols, k: tl.constexpr, N_COLS: tl.constexpr):
    """Return the mask of piece `k`. Only a last piece that is not full must check its columns."""
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
def load_vector_piece(ptr, in_rows, cols, k: tl.constexpr, N_COLS: tl.constexpr):
    """Load piece `k` of a vector as wide as a row, once per row. So it has the rows' layout and needs no exchange."""
    at = (in_rows & False).to(tl.int32)[:, None] + (cols + k * cols.shape[0])[None, :]
    return tl.load(ptr + at, mask=at < N_COLS, other=0.0)


@triton.jit
def load_vector(ptr, in_rows, cols, N_COLS: tl.constexpr, PIECES: tl.constexpr):
    """Load all pieces of a vector as wide as a row."""
    tile = ()
    for k in tl.static_range(PIECES):
        tile += (load_vector_piece(ptr, in_rows, cols, k, N_COLS),)
    return tile


@triton.jit
def two_means(a, b, N_COLS: tl.constexpr):
    """Return the row means of two tiles. Summing both at once halves the number of exchanges between lanes."""
    mean_a, mean_b = tl.split(tl.sum(tl.join(a, b), axis=1) / N_COLS)
    return mean_a, mean_b


@triton.jit
def centred(tile, mean, k: tl.constexpr, cols, N_COLS: tl.constexpr):
    """Return the differences between piece `k` and its rows' means; 0 beyond the last column."""
    PIECE: tl.constexpr = cols.shape[0]
    difference = tile[k].to(tl.float32) - mean[:, None]
    if (k + 1) * PIECE > N_COLS:
        difference = tl.where((cols + k * PIECE < N_COLS)[None, :], difference, 0.0)
    return difference


@triton.jit
def about_the_mean(squares, residual_mean):
    """Return the variance, given the mean square about the rounded mean and the mean's rounding error.

    Rounding can make a constant row's variance slightly negative, so it is clamped at 0. NaN stays NaN, which the
    hardware's maximum would not ensure.
    """
    return tl.maximum(squares - residual_mean * residual_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
