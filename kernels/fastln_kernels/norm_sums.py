"""Sums over rows for the gradients of weight and bias, of which a program needs no whole row: any takes any columns.

Partial sums of rows come from the kernels of whole rows where their registers can hold them, else from the kernel here.
A last kernel adds the partial sums.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import triton
import triton.language as tl

from fastln_kernels.norm_codes import decoded, load_scales


@triton.jit(do_not_specialize=["n_rows"])
def backward_parameters_kernel(
    dy_ptr,
    saved_ptr,
    rstd_ptr,
    codes_scale_ptr,
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
    """Compute partial sums of dweight and dbias over some rows of some columns.

    The rows' means are already known, so no sum along a row is left, and any program can take any columns.
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
            if codes_scale_ptr is not None:
                scales = load_scales(codes_scale_ptr, rows, in_rows, tl.program_id(0) * COLS, N_COLS, COLS)
                normed = decoded(normed, scales)
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


@triton.jit(do_not_specialize=["n_partials"])
def finish_kernel(
    dweight_partial_ptr,
    dbias_partial_ptr,
    dweight_ptr,
    dbias_ptr,
    n_partials,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add the programs' partial sums, always in the same order, and round to the gradients' dtype."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_cols = cols < N_COLS
    dweight = tl.zeros((ROWS, COLS), tl.float32)
    dbias = tl.zeros((ROWS, COLS), tl.float32)

    for start in range(0, n_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < n_partials)[:, None] & in_cols[None, :]
        at = rows.to(tl.int64)[:, None] * N_COLS + cols[None, :]
        if dweight_ptr is not None:
            dweight += tl.load(dweight_partial_ptr + at, mask=inside, other=0.0)
        if dbias_ptr is not None:
            dbias += tl.load(dbias_partial_ptr + at, mask=inside, other=0.0)

    if dweight_ptr is not None:
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0), mask=in_cols)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0), mask=in_cols)
