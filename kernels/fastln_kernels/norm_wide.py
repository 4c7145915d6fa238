"""LayerNorm and RMSNorm of rows too wide for the registers: loops over blocks of columns.

A row is read twice, the second time mostly from the cache. Its mean is taken about the mean of its first block. Should
that lie far from the row's mean, the row's variance is large for the same reason: what cancels is at most a factor
N_COLS / COLS of the last bit.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from fastln_kernels.dropout import dropped_out
from fastln_kernels.tiles import about_the_mean


@triton.jit
def _load_block(ptr, row, stride, cols, in_cols):
    return tl.load(ptr + row * stride + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _stream_block(
    x_ptr, residual_ptr, seed, row, x_stride, residual_stride, start, offsets, in_cols, THRESHOLD, dtype: tl.constexpr
):
    """Return a block of the row `residual + dropout(x)`, rounded to `dtype` and back to float32."""
    block = _load_block(x_ptr, row, x_stride, start + offsets, in_cols)
    if THRESHOLD > 0:
        rows = tl.full((1,), 0, tl.int64) + row
        block = dropped_out(block, seed, rows, start, THRESHOLD, x_ptr.dtype.element_ty)
    if residual_ptr is not None:
        block += _load_block(residual_ptr, row, residual_stride, start + offsets, in_cols)
    return block.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows"])
def forward_wide_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    stream_ptr,
    normed_ptr,
    rstd_ptr,
    n_rows,
    x_stride,
    residual_stride,
    eps,
    N_COLS: tl.constexpr,
    COLS: tl.constexpr,
    CENTRE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """One row: once through its blocks for the statistics, once more for the results."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, COLS)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    stream_dtype: tl.constexpr = dtype if stream_ptr is not None else tl.float32
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)

    mean = 0.0
    if CENTRE:
        block = _stream_block(
            *(x_ptr, residual_ptr, seed, row, x_stride, residual_stride, 0, offsets, offsets < N_COLS),
            THRESHOLD,
            stream_dtype,
        )
        mean = tl.sum(block) / min(COLS, N_COLS)
    first = tl.zeros((1, COLS), tl.float32)
    second = tl.zeros((1, COLS), tl.float32)
    for start in range(0, N_COLS, COLS):
        in_cols = start + offsets < N_COLS
        block = _stream_block(
            *(x_ptr, residual_ptr, seed, row, x_stride, residual_stride, start, offsets, in_cols),
            THRESHOLD,
            stream_dtype,
        )
        if stream_ptr is not None:
            tl.store(stream_ptr + row * N_COLS + (start + offsets)[None, :], block, mask=in_cols[None, :])
        difference = tl.where(in_cols[None, :], block - mean, 0.0)
        first += difference
        second += difference * difference
    residual_mean = 0.0
    variance = tl.sum(second) / N_COLS
    if CENTRE:
        residual_mean = tl.sum(first) / N_COLS
        variance = about_the_mean(variance, residual_mean)
    rstd = tl.rsqrt(variance + eps)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, N_COLS, COLS):
        in_cols = start + offsets < N_COLS
        block = _stream_block(
            *(x_ptr, residual_ptr, seed, row, x_stride, residual_stride, start, offsets, in_cols),
            THRESHOLD,
            stream_dtype,
        )
        at = row * N_COLS + (start + offsets)[None, :]
        y = (block - mean - residual_mean) * rstd
        if normed_ptr is not None:
            tl.store(normed_ptr + at, y, mask=in_cols[None, :])
        if ROUND_NORMED:
            y = y.to(dtype).to(tl.float32)
        if weight_ptr is not None:
            y *= _load_block(weight_ptr, row, 0, start + offsets, in_cols) + OFFSET
        if bias_ptr is not None:
            y += _load_block(bias_ptr, row, 0, start + offsets, in_cols)
        tl.store(y_ptr + at, y, mask=in_cols[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def backward_row_wide_kernel(
    dy_ptr,
    saved_ptr,
    weight_ptr,
    rstd_ptr,
    dstream_ptr,
    seed_ptr,
    dx_ptr,
    dresidual_ptr,
    means_ptr,
    n_rows,
    dy_stride,
    saved_stride,
    dstream_stride,
    N_COLS: tl.constexpr,
    COLS: tl.constexpr,
    CENTRE: tl.constexpr,
    OFFSET: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SAVED_IS_NORMED: tl.constexpr,
):
    """One row: its sums; then dx and dresidual; and its mean, `(2, n_rows)`, for the sums over rows."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, COLS)
    NEED_ROWS: tl.constexpr = dx_ptr is not None or dresidual_ptr is not None
    FIND_MEAN: tl.constexpr = CENTRE and not SAVED_IS_NORMED
    dtype: tl.constexpr = dy_ptr.dtype.element_ty

    rstd = tl.load(rstd_ptr + row)
    scale = rstd
    if SAVED_IS_NORMED:
        scale = 1.0
    mean = 0.0
    if FIND_MEAN:
        mean = tl.sum(_load_block(saved_ptr, row, saved_stride, offsets, offsets < N_COLS)) / min(COLS, N_COLS)
    differences = tl.zeros((1, COLS), tl.float32)
    with_differences = tl.zeros((1, COLS), tl.float32)
    with_ones = tl.zeros((1, COLS), tl.float32)
    for start in range(0, N_COLS, COLS):
        in_cols = start + offsets < N_COLS
        difference = _load_block(saved_ptr, row, saved_stride, start + offsets, in_cols)
        difference = tl.where(in_cols[None, :], difference - mean, 0.0)
        differences += difference
        if NEED_ROWS:
            dnormed = _load_block(dy_ptr, row, dy_stride, start + offsets, in_cols)
            if weight_ptr is not None:
                dnormed *= _load_block(weight_ptr, row, 0, start + offsets, in_cols) + OFFSET
            with_differences += dnormed * difference
            with_ones += dnormed
    residual_mean = 0.0
    if FIND_MEAN:
        residual_mean = tl.sum(differences) / N_COLS
        if means_ptr is not None:
            tl.store(means_ptr + row, mean)
            tl.store(means_ptr + n_rows + row, residual_mean)
    if NEED_ROWS:
        along_ones = tl.sum(with_ones) / N_COLS
        along_normed = (tl.sum(with_differences) / N_COLS - residual_mean * along_ones) * scale
        if not CENTRE:
            along_ones = 0.0
        if dx_ptr is not None and THRESHOLD > 0:
            rows = tl.full((1,), 0, tl.int64) + row
            seed = tl.load(seed_ptr)
        for start in range(0, N_COLS, COLS):
            in_cols = start + offsets < N_COLS
            at = row * N_COLS + (start + offsets)[None, :]
            dnormed = _load_block(dy_ptr, row, dy_stride, start + offsets, in_cols)
            if weight_ptr is not None:
                dnormed *= _load_block(weight_ptr, row, 0, start + offsets, in_cols) + OFFSET
            saved = _load_block(saved_ptr, row, saved_stride, start + offsets, in_cols)
            normed = (saved - mean - residual_mean) * scale
            inner = (dnormed - along_ones - normed * along_normed) * rstd
            if dstream_ptr is not None:
                inner += _load_block(dstream_ptr, row, dstream_stride, start + offsets, in_cols)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + at, inner, mask=in_cols[None, :])
            if dx_ptr is not None:
                if THRESHOLD > 0:
                    inner = dropped_out(inner, seed, rows, start, THRESHOLD, dtype)
                tl.store(dx_ptr + at, inner, mask=in_cols[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def backward_parameters_kernel(
    dy_ptr,
    saved_ptr,
    rstd_ptr,
    means_ptr,
    dweight_ptr,
    dbias_ptr,
    n_rows,
    dy_stride,
    saved_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    SAVED_IS_NORMED: tl.constexpr,
):
    """Partial sums of dweight and dbias over some rows of some columns.

    With each row's mean at hand no sum along a row is left to do, so the columns split freely over programs.
    """
    program = tl.program_id(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_cols = cols < N_COLS
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)

    for tile in range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(1)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        in_rows = rows < n_rows
        inside = in_rows[:, None] & in_cols[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            at = rows[:, None] * saved_stride + cols[None, :]
            normed = tl.load(saved_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if not SAVED_IS_NORMED:
                if means_ptr is not None:
                    mean = tl.load(means_ptr + rows, mask=in_rows, other=0.0)
                    residual_mean = tl.load(means_ptr + n_rows + rows, mask=in_rows, other=0.0)
                    normed = normed - mean[:, None] - residual_mean[:, None]
                normed *= tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]
            if ROUND_NORMED:
                normed = normed.to(dtype).to(tl.float32)
            dweight += dy * normed
        if dbias_ptr is not None:
            dbias += dy

    at = program.to(tl.int64) * N_COLS + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=in_cols)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=in_cols)
