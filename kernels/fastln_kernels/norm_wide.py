"""LayerNorm and RMSNorm of rows too wide for the registers: loops over blocks of columns.

A program processes one row after another and reads each row twice: first for its sums, then for the results. One
program runs per SM, so that the current rows stay in the L2 cache between the two passes. A block is
`(LANES, VECTOR)`: each lane loads VECTOR elements at once and sums them by itself.

Each lane sums differences from its own pivot, the mean of its first load. The row's mean follows when all lanes have
finished. If a lane's pivot is far from the mean of its elements, their variance is large for the same reason. So
cancellation costs at most a factor N_COLS / COLS of the last bit.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import triton
import triton.language as tl

from fastln_kernels.dropout import dropped_out
from fastln_kernels.norm_codes import decoded, load_scales, store_codes
from fastln_kernels.tiles import about_the_mean


@triton.jit
def _load(ptr, row, stride, start, cols, N_COLS: tl.constexpr, FULL: tl.constexpr):
    """Load the block of a row at `start`, in its own dtype. It is 0 beyond the last column; `FULL` needs no mask."""
    at = ptr + (row * stride + start) + cols
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=start + cols < N_COLS, other=0.0)


@triton.jit
def _load_group(
    ptr, row, stride, start, cols, GROUP: tl.constexpr, COLS: tl.constexpr, N_COLS: tl.constexpr, FULL: tl.constexpr
):
    """Load `GROUP` neighbouring blocks of a row. The first begins at `start`."""
    blocks = ()
    for k in tl.static_range(GROUP):
        blocks += (_load(ptr, row, stride, start + k * COLS, cols, N_COLS, FULL),)
    return blocks


@triton.jit
def _store(ptr, row, start, cols, block, N_COLS: tl.constexpr, FULL: tl.constexpr):
    at = ptr + (row * N_COLS + start) + cols
    if FULL:
        tl.store(at, block)
    else:
        tl.store(at, block, mask=start + cols < N_COLS)


@triton.jit
def _store_codes(codes_ptr, scale_ptr, row, start, cols, x_hat, N_COLS: tl.constexpr, FULL: tl.constexpr):
    """Store the codes of the block of x_hat at `start`, and their scales."""
    flat: tl.constexpr = [1, x_hat.numel]
    rows = tl.full((1,), 0, tl.int64) + row
    in_rows = rows >= 0
    mask = in_rows[:, None] if FULL else tl.reshape(start + cols < N_COLS, flat)
    store_codes(codes_ptr, scale_ptr, tl.reshape(x_hat, flat), rows, in_rows, start, mask, N_COLS)


@triton.jit
def _load_saved(
    ptr,
    scale_ptr,
    row,
    stride,
    start,
    cols,
    GROUP: tl.constexpr,
    COLS: tl.constexpr,
    N_COLS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Load `GROUP` neighbouring blocks of what is saved of a row. The first begins at `start`; codes are decoded."""
    blocks = _load_group(ptr, row, stride, start, cols, GROUP, COLS, N_COLS, FULL)
    if scale_ptr is None:
        return blocks
    else:
        rows = tl.full((1,), 0, tl.int64) + row
        scales = ()
        for k in tl.static_range(GROUP):
            scales += (load_scales(scale_ptr, rows, rows >= 0, start + k * COLS, N_COLS, COLS),)
        x_hat = ()
        for k in tl.static_range(GROUP):
            x_hat += (decoded(blocks[k], scales[k]),)
        return x_hat


@triton.jit
def _difference(block, pivot, cols, N_COLS: tl.constexpr, FULL: tl.constexpr):
    """Return the differences between a block and its lanes' pivots; 0 beyond the last column."""
    difference = block.to(tl.float32) - pivot[:, None]
    return difference if FULL else tl.where(cols < N_COLS, difference, 0.0)


@triton.jit
def _pivot(block, cols, N_COLS: tl.constexpr, FULL: tl.constexpr):
    """Return the lanes' means of the first block."""
    count = block.shape[1]
    if not FULL:
        count = tl.maximum(tl.sum((cols < N_COLS).to(tl.float32), axis=1), 1.0)
    return tl.sum(block.to(tl.float32), axis=1) / count


@triton.jit
def _counts(cols, COLS: tl.constexpr, N_COLS: tl.constexpr, FULL: tl.constexpr):
    """Return how many columns each lane has."""
    if FULL:
        count = tl.full((cols.shape[0],), N_COLS // cols.shape[0], tl.float32)
    else:
        count = tl.zeros((cols.shape[0],), tl.float32)
        for start in tl.static_range(0, N_COLS, COLS):
            count += tl.sum((start + cols < N_COLS).to(tl.float32), axis=1)
    return count


@triton.jit
def _stream_group(
    x_ptr,
    residual_ptr,
    seed,
    row,
    x_stride,
    residual_stride,
    start,
    cols,
    GROUP: tl.constexpr,
    COLS: tl.constexpr,
    N_COLS: tl.constexpr,
    FULL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return `GROUP` blocks of the row `residual + dropout(x)`, starting at `start` and rounded to `dtype`."""
    x = _load_group(x_ptr, row, x_stride, start, cols, GROUP, COLS, N_COLS, FULL)
    if residual_ptr is not None:
        residual = _load_group(residual_ptr, row, residual_stride, start, cols, GROUP, COLS, N_COLS, FULL)
    if THRESHOLD > 0:
        # No load moves across a barrier, so the rows are requested before the generator starts.
        tl.debug_barrier()
    blocks = ()
    for k in tl.static_range(GROUP):
        block = x[k].to(tl.float32)
        if THRESHOLD > 0:
            block = _dropped_out(block, seed, row, start + k * COLS, THRESHOLD, x_ptr.dtype.element_ty)
        if residual_ptr is not None:
            block += residual[k].to(tl.float32)
        blocks += (block.to(dtype),)
    return blocks


@triton.jit
def _dropped_out(block, seed, row, start, THRESHOLD: tl.constexpr, dtype: tl.constexpr):
    rows = tl.full((1,), 0, tl.int64) + row
    flat = tl.reshape(block, (1, block.numel))
    return tl.reshape(dropped_out(flat, seed, rows, start, THRESHOLD, dtype), block.shape)


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
    codes_scale_ptr,
    n_rows,
    x_stride,
    residual_stride,
    eps,
    N_COLS: tl.constexpr,
    COLS: tl.constexpr,
    GROUP: tl.constexpr,
    CENTRE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """Normalise rows: one pass over a row's blocks for its statistics, a second pass for the results.

    x_hat is written as codes of 8 bits if there is room for their scales.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    # Normalise the rounded sum, because that is what the next layers see.
    stream_dtype: tl.constexpr = tl.float32 if stream_ptr is None else dtype
    FULL: tl.constexpr = N_COLS % (GROUP * COLS) == 0
    VECTOR: tl.constexpr = 128 // dtype.primitive_bitwidth
    LANES: tl.constexpr = COLS // VECTOR
    cols = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    count = _counts(cols, COLS, N_COLS, FULL)
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)

    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        pivot = tl.zeros((LANES,), tl.float32)
        differences = tl.zeros((LANES,), tl.float32)
        squares = tl.zeros((LANES,), tl.float32)
        for start in range(0, N_COLS, GROUP * COLS):
            blocks = _stream_group(
                x_ptr,
                residual_ptr,
                seed,
                row,
                x_stride,
                residual_stride,
                start,
                cols,
                GROUP,
                COLS,
                N_COLS,
                FULL,
                THRESHOLD,
                stream_dtype,
            )
            if CENTRE:
                pivot = tl.where(start == 0, _pivot(blocks[0], cols, N_COLS, FULL), pivot)
            for k in tl.static_range(GROUP):
                if stream_ptr is not None:
                    _store(stream_ptr, row, start + k * COLS, cols, blocks[k], N_COLS, FULL)
                difference = _difference(blocks[k], pivot, start + k * COLS + cols, N_COLS, FULL)
                differences += tl.sum(difference, axis=1)
                squares += tl.sum(difference * difference, axis=1)
        mean = 0.0
        residual_mean = 0.0
        if CENTRE:
            mean = tl.sum(count * pivot + differences) / N_COLS
            shift = pivot - mean
            squares += shift * (2 * differences + count * shift)
            residual_mean = tl.sum(differences + count * shift) / N_COLS
        variance = tl.sum(squares) / N_COLS
        if CENTRE:
            variance = about_the_mean(variance, residual_mean)
        rstd = tl.rsqrt(variance + eps)
        tl.store(rstd_ptr + row, rstd)

        for start in range(0, N_COLS, GROUP * COLS):
            if stream_ptr is not None:
                blocks = _load_group(stream_ptr, row, N_COLS, start, cols, GROUP, COLS, N_COLS, FULL)
            else:
                blocks = _stream_group(
                    x_ptr,
                    residual_ptr,
                    seed,
                    row,
                    x_stride,
                    residual_stride,
                    start,
                    cols,
                    GROUP,
                    COLS,
                    N_COLS,
                    FULL,
                    THRESHOLD,
                    stream_dtype,
                )
            for k in tl.static_range(GROUP):
                here = start + k * COLS
                y = (blocks[k].to(tl.float32) - mean - residual_mean) * rstd
                if codes_scale_ptr is not None:
                    _store_codes(normed_ptr, codes_scale_ptr, row, here, cols, y, N_COLS, FULL)
                elif normed_ptr is not None:
                    _store(normed_ptr, row, here, cols, y, N_COLS, FULL)
                if ROUND_NORMED:
                    y = y.to(dtype).to(tl.float32)
                if weight_ptr is not None:
                    y *= _load(weight_ptr, row, 0, here, cols, N_COLS, FULL).to(tl.float32) + OFFSET
                if bias_ptr is not None:
                    y += _load(bias_ptr, row, 0, here, cols, N_COLS, FULL).to(tl.float32)
                _store(y_ptr, row, here, cols, y, N_COLS, FULL)


@triton.jit
def _dnormed(dy, weight_ptr, row, start, cols, N_COLS: tl.constexpr, FULL: tl.constexpr, OFFSET: tl.constexpr):
    """Return a block of the gradient of x_hat, in float32."""
    dnormed = dy.to(tl.float32)
    if weight_ptr is None and dy.dtype == tl.float32:
        # Without this addition Triton 3.7 fails to compile a loop that sums loaded values directly.
        dnormed += 0.0
    if weight_ptr is not None:
        dnormed *= _load(weight_ptr, row, 0, start, cols, N_COLS, FULL).to(tl.float32) + OFFSET
    return dnormed


@triton.jit
def _store_rows(
    inner,
    dstream_ptr,
    dx_ptr,
    dresidual_ptr,
    seed,
    row,
    dstream_stride,
    start,
    cols,
    N_COLS: tl.constexpr,
    FULL: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """Store the blocks of dx and dresidual at `start`, given the gradient of the norm's input."""
    if dstream_ptr is not None:
        inner += _load(dstream_ptr, row, dstream_stride, start, cols, N_COLS, FULL).to(tl.float32)
    if dresidual_ptr is not None:
        _store(dresidual_ptr, row, start, cols, inner, N_COLS, FULL)
    if dx_ptr is not None:
        if THRESHOLD > 0:
            inner = _dropped_out(inner, seed, row, start, THRESHOLD, dx_ptr.dtype.element_ty)
        _store(dx_ptr, row, start, cols, inner, N_COLS, FULL)


@triton.jit(do_not_specialize=["n_rows"])
def backward_wide_kernel(
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
    means_ptr,
    n_rows,
    dy_stride,
    saved_stride,
    dstream_stride,
    N_COLS: tl.constexpr,
    COLS: tl.constexpr,
    GROUP: tl.constexpr,
    CENTRE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SAVED_IS_NORMED: tl.constexpr,
):
    """Compute each row's sums, then dx, dresidual and, from the same loads, partial sums of dweight and dbias.

    If the registers cannot hold the sums of dweight, the rows' means `(2, n_rows)` are stored for the kernel that
    computes dweight.
    """
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    FULL: tl.constexpr = N_COLS % (GROUP * COLS) == 0
    NEED_ROWS: tl.constexpr = dx_ptr is not None or dresidual_ptr is not None
    NEED_SUMS: tl.constexpr = dweight_ptr is not None or dbias_ptr is not None
    FIND_MEAN: tl.constexpr = CENTRE and not SAVED_IS_NORMED
    VECTOR: tl.constexpr = 128 // dtype.primitive_bitwidth
    LANES: tl.constexpr = COLS // VECTOR
    cols = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    count = _counts(cols, COLS, N_COLS, FULL)
    seed = 0
    if dx_ptr is not None and THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    dweight = ()
    dbias = ()
    for _ in tl.static_range(0, N_COLS, COLS):
        if dweight_ptr is not None:
            dweight += (tl.zeros((LANES, VECTOR), tl.float32),)
        if dbias_ptr is not None:
            dbias += (tl.zeros((LANES, VECTOR), tl.float32),)

    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        pivot = tl.zeros((LANES,), tl.float32)
        differences = tl.zeros((LANES,), tl.float32)
        with_differences = tl.zeros((LANES,), tl.float32)
        with_ones = tl.zeros((LANES,), tl.float32)
        for start in range(0, N_COLS, GROUP * COLS):
            # No load moves across the barrier. Otherwise the compiler would load more than fits into the registers
            # in addition to the sums.
            tl.debug_barrier()
            saved = _load_saved(saved_ptr, codes_scale_ptr, row, saved_stride, start, cols, GROUP, COLS, N_COLS, FULL)
            if NEED_ROWS:
                dy = _load_group(dy_ptr, row, dy_stride, start, cols, GROUP, COLS, N_COLS, FULL)
            if FIND_MEAN:
                pivot = tl.where(start == 0, _pivot(saved[0], cols, N_COLS, FULL), pivot)
            for k in tl.static_range(GROUP):
                here = start + k * COLS
                difference = _difference(saved[k], pivot, here + cols, N_COLS, FULL)
                if FIND_MEAN:
                    differences += tl.sum(difference, axis=1)
                if NEED_ROWS:
                    dnormed = _dnormed(dy[k], weight_ptr, row, here, cols, N_COLS, FULL, OFFSET)
                    with_differences += tl.sum(dnormed * difference, axis=1)
                    if CENTRE:
                        with_ones += tl.sum(dnormed, axis=1)
        rstd = tl.load(rstd_ptr + row)
        scale = 1.0 if SAVED_IS_NORMED else rstd
        mean = 0.0
        residual_mean = 0.0
        if FIND_MEAN:
            mean = tl.sum(count * pivot + differences) / N_COLS
            shift = pivot - mean
            with_differences += shift * with_ones
            residual_mean = tl.sum(differences + count * shift) / N_COLS
            if means_ptr is not None:
                tl.store(means_ptr + row, mean)
                tl.store(means_ptr + n_rows + row, residual_mean)
        along_ones = 0.0
        along_normed = 0.0
        if NEED_ROWS:
            if CENTRE:
                along_ones = tl.sum(with_ones) / N_COLS
            along_normed = (tl.sum(with_differences) / N_COLS - residual_mean * along_ones) * scale

        if NEED_SUMS:
            new_dweight = ()
            new_dbias = ()
            for start in tl.static_range(0, N_COLS, COLS):
                tl.debug_barrier()
                block_dweight = dweight[start // COLS] if dweight_ptr is not None else 0.0
                block_dbias = dbias[start // COLS] if dbias_ptr is not None else 0.0
                # Always true. The branch forces the compiler to compute the sums here. Without it, the compiler delays
                # the sums to the end of the row, holds dy and x_hat of every block until then, and spills.
                if dy_stride >= 0:
                    dy = _load(dy_ptr, row, dy_stride, start, cols, N_COLS, FULL)
                    saved = _load_saved(
                        saved_ptr, codes_scale_ptr, row, saved_stride, start, cols, 1, COLS, N_COLS, FULL
                    )[0]
                    normed = (saved.to(tl.float32) - mean - residual_mean) * scale
                    if NEED_ROWS:
                        dnormed = _dnormed(dy, weight_ptr, row, start, cols, N_COLS, FULL, OFFSET)
                        inner = (dnormed - along_ones - normed * along_normed) * rstd
                        _store_rows(
                            inner,
                            dstream_ptr,
                            dx_ptr,
                            dresidual_ptr,
                            seed,
                            row,
                            dstream_stride,
                            start,
                            cols,
                            N_COLS,
                            FULL,
                            THRESHOLD,
                        )
                    if dweight_ptr is not None:
                        if ROUND_NORMED:
                            normed = normed.to(dtype).to(tl.float32)
                        # dy is 0 beyond the last column.
                        block_dweight += dy.to(tl.float32) * normed
                    if dbias_ptr is not None:
                        block_dbias += dy.to(tl.float32)
                if dweight_ptr is not None:
                    new_dweight += (block_dweight,)
                if dbias_ptr is not None:
                    new_dbias += (block_dbias,)
            dweight = new_dweight
            dbias = new_dbias
        elif NEED_ROWS:
            for start in range(0, N_COLS, GROUP * COLS):
                dy = _load_group(dy_ptr, row, dy_stride, start, cols, GROUP, COLS, N_COLS, FULL)
                saved = _load_saved(
                    saved_ptr, codes_scale_ptr, row, saved_stride, start, cols, GROUP, COLS, N_COLS, FULL
                )
                for k in tl.static_range(GROUP):
                    here = start + k * COLS
                    normed = (saved[k].to(tl.float32) - mean - residual_mean) * scale
                    dnormed = _dnormed(dy[k], weight_ptr, row, here, cols, N_COLS, FULL, OFFSET)
                    inner = (dnormed - along_ones - normed * along_normed) * rstd
                    _store_rows(
                        inner,
                        dstream_ptr,
                        dx_ptr,
                        dresidual_ptr,
                        seed,
                        row,
                        dstream_stride,
                        start + k * COLS,
                        cols,
                        N_COLS,
                        FULL,
                        THRESHOLD,
                    )

    program = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, N_COLS, COLS):
        if dweight_ptr is not None:
            _store(dweight_ptr, program, start, cols, dweight[start // COLS], N_COLS, FULL)
        if dbias_ptr is not None:
            _store(dbias_ptr, program, start, cols, dbias[start // COLS], N_COLS, FULL)
