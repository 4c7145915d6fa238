"""LayerNorm and RMSNorm of rows that fit into the registers (`launch.RowTile`).

A pointer that is None removes its part of the kernel at compile time.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import triton
import triton.language as tl

from fastln_kernels.dropout import dropped_out
from fastln_kernels.int8_rows import store_rounded
from fastln_kernels.norm_codes import decoded, load_scales, store_tile_codes
from fastln_kernels.tiles import about_the_mean, centred, load_tile, load_vector, store_tile, two_means


@triton.jit
def _summed(x, residual, seed, rows, cols, PIECES: tl.constexpr, THRESHOLD: tl.constexpr, dtype: tl.constexpr):
    """Return the tile `residual + dropout(x)` in float32. `residual` is empty if there is none."""
    stream = ()
    for k in tl.static_range(PIECES):
        piece = x[k].to(tl.float32)
        if THRESHOLD > 0:
            piece = dropped_out(piece, seed, rows, k * cols.shape[0], THRESHOLD, dtype)
        if len(residual) > 0:
            piece += residual[k].to(tl.float32)
        stream += (piece,)
    return stream


@triton.jit
def _cast(tile, PIECES: tl.constexpr, dtype: tl.constexpr):
    cast = ()
    for k in tl.static_range(PIECES):
        cast += (tile[k].to(dtype),)
    return cast


@triton.jit(do_not_specialize=["n_rows"])
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    stream_ptr,
    normed_ptr,
    rstd_ptr,
    codes_scale_ptr,
    values_ptr,
    scale_ptr,
    n_rows,
    x_stride,
    residual_stride,
    eps,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    CENTRE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    TURN: tl.constexpr = False,
):
    """Normalise one tile of rows: read it once, normalise it in registers, write it once (and once in 8 bits).

    x_hat is written as codes of 8 bits if there is room for their scales.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    cols = tl.arange(0, PIECE)
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    x = load_tile(x_ptr, rows, x_stride, in_rows, cols, N_COLS, PIECES)
    if THRESHOLD > 0 or residual_ptr is not None or stream_ptr is not None:
        residual = ()
        if residual_ptr is not None:
            residual = load_tile(residual_ptr, rows, residual_stride, in_rows, cols, N_COLS, PIECES)
        seed = 0
        if THRESHOLD > 0:
            # No load moves across a barrier, so the rows are requested before the generator starts.
            tl.debug_barrier()
            seed = tl.load(seed_ptr)
        x = _summed(x, residual, seed, rows, cols, PIECES, THRESHOLD, dtype)
        if stream_ptr is not None:
            # Normalise the rounded sum, because that is what the next layers see.
            x = _cast(x, PIECES, dtype)
            store_tile(stream_ptr, x, rows, in_rows, cols, N_COLS, PIECES)

    mean = tl.zeros((ROWS,), tl.float32)
    residual_mean = tl.zeros((ROWS,), tl.float32)
    differences = tl.zeros((ROWS, PIECE), tl.float32)
    squares = tl.zeros((ROWS, PIECE), tl.float32)
    if CENTRE:
        for k in tl.static_range(PIECES):
            differences += x[k].to(tl.float32)
        mean = tl.sum(differences, axis=1) / N_COLS
        differences = tl.zeros((ROWS, PIECE), tl.float32)
    for k in tl.static_range(PIECES):
        difference = centred(x, mean, k, cols, N_COLS)
        differences += difference
        squares += difference * difference
    if CENTRE:
        residual_mean, mean_square = two_means(differences, squares, N_COLS)
        variance = about_the_mean(mean_square, residual_mean)
    else:
        variance = tl.sum(squares, axis=1) / N_COLS
    rstd = tl.rsqrt(variance + eps)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)

    if weight_ptr is not None:
        weight = load_vector(weight_ptr, in_rows, cols, N_COLS, PIECES)
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, in_rows, cols, N_COLS, PIECES)
    KEEP_NORMED: tl.constexpr = normed_ptr is not None and codes_scale_ptr is None
    y = ()
    normed = ()
    for k in tl.static_range(PIECES):
        piece = (x[k].to(tl.float32) - mean[:, None] - residual_mean[:, None]) * rstd[:, None]
        if KEEP_NORMED:
            normed += (piece,)
        if ROUND_NORMED:
            piece = piece.to(dtype).to(tl.float32)
        if weight_ptr is not None:
            piece *= weight[k].to(tl.float32) + OFFSET
        if bias_ptr is not None:
            piece += bias[k].to(tl.float32)
        y += (piece,)
    store_tile(y_ptr, y, rows, in_rows, cols, N_COLS, PIECES)
    if KEEP_NORMED:
        store_tile(normed_ptr, normed, rows, in_rows, cols, N_COLS, PIECES)
    if codes_scale_ptr is not None:
        statistics = (mean, residual_mean, rstd)
        store_tile_codes(normed_ptr, codes_scale_ptr, x, statistics, rows, in_rows, cols, N_COLS, PIECES)
    if values_ptr is not None:
        store_rounded(values_ptr, scale_ptr, None, y, rows, in_rows, cols, N_COLS, PIECES, TURN, dtype)


@triton.jit
def _dnormed(dy, weight, k: tl.constexpr, OFFSET: tl.constexpr):
    """Return piece `k` of the gradient of x_hat, in float32."""
    dnormed = dy[k].to(tl.float32)
    if len(weight) > 0:
        dnormed *= weight[k].to(tl.float32) + OFFSET
    return dnormed


@triton.jit
def _load_inputs(
    dy_ptr,
    saved_ptr,
    rstd_ptr,
    codes_scale_ptr,
    dstream_ptr,
    tile,
    n_rows,
    dy_stride,
    saved_stride,
    dstream_stride,
    cols,
    ROWS: tl.constexpr,
    N_COLS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Return the inputs for a tile of rows: dy, the saved tensor, rstd, the scales of its codes and dstream.

    Missing ones are empty.
    """
    rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_rows = rows < n_rows
    saved = ()
    rstd = tl.zeros((ROWS,), tl.float32)
    codes_scale = ()
    dstream = ()
    # Zeros in dy beyond the width keep those columns out of every sum.
    dy = load_tile(dy_ptr, rows, dy_stride, in_rows, cols, N_COLS, PIECES)
    if saved_ptr is not None:
        saved = load_tile(saved_ptr, rows, saved_stride, in_rows, cols, N_COLS, PIECES)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        if codes_scale_ptr is not None:
            PIECE: tl.constexpr = cols.shape[0]
            for k in tl.static_range(PIECES):
                codes_scale += (load_scales(codes_scale_ptr, rows, in_rows, k * PIECE, N_COLS, PIECE),)
    if dstream_ptr is not None:
        dstream = load_tile(dstream_ptr, rows, dstream_stride, in_rows, cols, N_COLS, PIECES)
    return dy, saved, rstd, codes_scale, dstream


@triton.jit
def _decoded_tile(saved, codes_scale, PIECES: tl.constexpr):
    """Return a saved tile, in float32 if it holds codes, which have scales."""
    if len(codes_scale) > 0:
        tile = ()
        for k in tl.static_range(PIECES):
            tile += (decoded(saved[k], codes_scale[k]),)
        return tile
    else:
        return saved


@triton.jit(do_not_specialize=["n_rows"])
def backward_kernel(
    dy_ptr,
    saved_ptr,
    weight_ptr,
    rstd_ptr,
    codes_scale_ptr,
    dstream_ptr,
    seed_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    factors_ptr,
    values_ptr,
    scale_ptr,
    n_rows,
    dy_stride,
    saved_stride,
    dstream_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    CENTRE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SAVED_IS_NORMED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Compute dx (also in 8 bits, times factors) and dresidual of tiles of rows and, from the same loads, partial sums
    of dweight and dbias.

    `saved` is codes of x_hat if these have scales.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, PIECE)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    NEED_ROWS: tl.constexpr = dx_ptr is not None or dresidual_ptr is not None
    NEED_NORMED: tl.constexpr = NEED_ROWS or dweight_ptr is not None
    FIND_MEAN: tl.constexpr = NEED_NORMED and CENTRE and not SAVED_IS_NORMED

    weight = ()
    if NEED_ROWS and weight_ptr is not None:
        weight = load_vector(weight_ptr, tl.arange(0, ROWS) >= 0, cols, N_COLS, PIECES)
    if dx_ptr is not None and THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    dweight = ()
    dbias = ()
    for _ in tl.static_range(PIECES):
        if dweight_ptr is not None:
            dweight += (tl.zeros((ROWS, PIECE), tl.float32),)
        if dbias_ptr is not None:
            dbias += (tl.zeros((ROWS, PIECE), tl.float32),)

    step = tl.num_programs(0)
    if PREFETCH:
        dy, saved, rstd, codes_scale, dstream = _load_inputs(
            dy_ptr,
            saved_ptr,
            rstd_ptr,
            codes_scale_ptr,
            dstream_ptr,
            program,
            n_rows,
            dy_stride,
            saved_stride,
            dstream_stride,
            cols,
            ROWS,
            N_COLS,
            PIECES,
        )
    for tile in range(program, tl.cdiv(n_rows, ROWS), step):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        in_rows = rows < n_rows
        loaded = _load_inputs(
            dy_ptr,
            saved_ptr,
            rstd_ptr,
            codes_scale_ptr,
            dstream_ptr,
            tile + step if PREFETCH else tile,
            n_rows,
            dy_stride,
            saved_stride,
            dstream_stride,
            cols,
            ROWS,
            N_COLS,
            PIECES,
        )
        if not PREFETCH:
            dy, saved, rstd, codes_scale, dstream = loaded
        mean = tl.zeros((ROWS,), tl.float32)
        residual_mean = tl.zeros((ROWS,), tl.float32)
        along_ones = tl.zeros((ROWS,), tl.float32)
        scale = rstd
        if SAVED_IS_NORMED:
            scale = tl.full((ROWS,), 1.0, tl.float32)
        kept = _decoded_tile(saved, codes_scale, PIECES)

        # First do what needs no mean, so that both inputs are requested before anything waits.
        if dbias_ptr is not None:
            new_dbias = ()
            for k in tl.static_range(PIECES):
                new_dbias += (dbias[k] + dy[k].to(tl.float32),)
            dbias = new_dbias
        if NEED_NORMED and CENTRE:
            total = tl.zeros((ROWS, PIECE), tl.float32)
            with_ones = tl.zeros((ROWS, PIECE), tl.float32)
            for k in tl.static_range(PIECES):
                if FIND_MEAN:
                    total += kept[k].to(tl.float32)
                if NEED_ROWS:
                    with_ones += _dnormed(dy, weight, k, OFFSET)
            if FIND_MEAN and NEED_ROWS:
                mean, along_ones = two_means(total, with_ones, N_COLS)
            elif FIND_MEAN:
                mean = tl.sum(total, axis=1) / N_COLS
            elif NEED_ROWS:
                along_ones = tl.sum(with_ones, axis=1) / N_COLS
        if FIND_MEAN or NEED_ROWS:
            left = tl.zeros((ROWS, PIECE), tl.float32)
            with_difference = tl.zeros((ROWS, PIECE), tl.float32)
            for k in tl.static_range(PIECES):
                difference = centred(kept, mean, k, cols, N_COLS)
                if FIND_MEAN:
                    left += difference
                if NEED_ROWS:
                    with_difference += difference * _dnormed(dy, weight, k, OFFSET)
            along_difference = tl.zeros((ROWS,), tl.float32)
            if FIND_MEAN and NEED_ROWS:
                residual_mean, along_difference = two_means(left, with_difference, N_COLS)
            elif FIND_MEAN:
                residual_mean = tl.sum(left, axis=1) / N_COLS
            else:
                along_difference = tl.sum(with_difference, axis=1) / N_COLS
            along_normed = (along_difference - residual_mean * along_ones) * scale

        new_dweight = ()
        dresidual = ()
        dx = ()
        for k in tl.static_range(PIECES):
            if NEED_NORMED:
                normed = (kept[k].to(tl.float32) - mean[:, None] - residual_mean[:, None]) * scale[:, None]
            if NEED_ROWS:
                dnormed = _dnormed(dy, weight, k, OFFSET)
                inner = (dnormed - along_ones[:, None] - normed * along_normed[:, None]) * rstd[:, None]
                if dstream_ptr is not None:
                    inner += dstream[k].to(tl.float32)
                dresidual += (inner,)
                if dx_ptr is not None and THRESHOLD > 0:
                    inner = dropped_out(inner, seed, rows, k * PIECE, THRESHOLD, dtype)
                dx += (inner,)
            if dweight_ptr is not None:
                if ROUND_NORMED:
                    normed = normed.to(dtype).to(tl.float32)
                new_dweight += (dweight[k] + dy[k].to(tl.float32) * normed,)
        if dresidual_ptr is not None:
            store_tile(dresidual_ptr, dresidual, rows, in_rows, cols, N_COLS, PIECES)
        if dx_ptr is not None:
            store_tile(dx_ptr, dx, rows, in_rows, cols, N_COLS, PIECES)
        if values_ptr is not None:
            store_rounded(values_ptr, scale_ptr, factors_ptr, dx, rows, in_rows, cols, N_COLS, PIECES, False, dtype)
        dweight = new_dweight
        if PREFETCH:
            dy, saved, rstd, codes_scale, dstream = loaded

    at = program.to(tl.int64) * N_COLS + cols
    for k in tl.static_range(PIECES):
        in_cols = cols + k * PIECE < N_COLS
        if dweight_ptr is not None:
            tl.store(dweight_ptr + at + k * PIECE, tl.sum(dweight[k], axis=0), mask=in_cols)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + at + k * PIECE, tl.sum(dbias[k], axis=0), mask=in_cols)
