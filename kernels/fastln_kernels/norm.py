"""LayerNorm in Triton, forward and backward; README.md beside this package derives the mathematics.

Four habits hold throughout. Values are cast to float32 as soon as they are loaded. Row addresses are int64. The number
of rows is a run-time argument that is never specialised on, so that no new length recompiles; the width is a constant.
Sums over rows go through float32 partials, one per program, which one kernel adds up in a fixed order, so that two runs
on one machine give the same bits.

`x` and `dy` may have any row stride; columns, weights and biases that are not contiguous are copied first.
"""

# mypy: allow-untyped-defs
import contextlib
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastln_kernels import launch
from fastln_kernels.reference import N_STATS

TensorT = TypeVar("TensorT", Tensor, Tensor | None)


@triton.jit
def _load_stats(stats_ptr, rows, n_rows, mask):
    mean = tl.load(stats_ptr + rows, mask=mask, other=0.0)
    residual = tl.load(stats_ptr + rows + n_rows, mask=mask, other=0.0)
    rstd = tl.load(stats_ptr + rows + n_rows + n_rows, mask=mask, other=0.0)
    return mean, residual, rstd


@triton.jit
def _store_stats(stats_ptr, rows, n_rows, mask, mean, residual, rstd):
    tl.store(stats_ptr + rows, mean, mask=mask)
    tl.store(stats_ptr + rows + n_rows, residual, mask=mask)
    tl.store(stats_ptr + rows + n_rows + n_rows, rstd, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stats_ptr,
    n_rows,
    x_stride,
    eps,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One tile of whole rows: read once, normalised in registers, written once."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    in_rows = rows < n_rows
    in_cols = cols < N_COLS
    inside = in_rows[:, None] & in_cols[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / N_COLS
    centred = tl.where(in_cols[None, :], x - mean[:, None], 0.0)
    residual = tl.sum(centred, axis=1) / N_COLS
    # Rounding may take a constant row's variance just below zero.
    variance = tl.maximum(tl.sum(centred * centred, axis=1) / N_COLS - residual * residual, 0.0)
    rstd = tl.rsqrt(variance + eps)
    _store_stats(stats_ptr, rows, n_rows, in_rows, mean, residual, rstd)

    y = (centred - residual[:, None]) * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N_COLS + cols[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def forward_wide_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stats_ptr,
    n_rows,
    x_stride,
    eps,
    N_COLS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One row, in blocks of columns: once for the statistics, once more (from the cache) for the result.

    The statistics are taken about the mean of the first block. Should that lie far from the row's mean, the row's
    variance is large for the same reason: what cancels is at most a factor N_COLS / COLS of the last bit.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    x_row = x_ptr + row * x_stride

    mean = tl.sum(tl.load(x_row + cols).to(tl.float32), axis=0) / COLS
    first = tl.zeros((COLS,), tl.float32)
    second = tl.zeros((COLS,), tl.float32)
    for start in range(0, N_COLS, COLS):
        in_cols = start + cols < N_COLS
        x = tl.load(x_row + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        centred = tl.where(in_cols, x - mean, 0.0)
        first += centred
        second += centred * centred
    residual = tl.sum(first, axis=0) / N_COLS
    variance = tl.maximum(tl.sum(second, axis=0) / N_COLS - residual * residual, 0.0)
    rstd = tl.rsqrt(variance + eps)
    _store_stats(stats_ptr, row, n_rows, row < n_rows, mean, residual, rstd)

    for start in range(0, N_COLS, COLS):
        in_cols = start + cols < N_COLS
        x = tl.load(x_row + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        y = (x - mean - residual) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N_COLS + start + cols, y, mask=in_cols)


@triton.jit(do_not_specialize=["n_rows"])
def backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    n_rows,
    dy_stride,
    x_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
):
    """dx of tiles of whole rows and, from the same loads, this program's partial sums of dweight and dbias."""
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)
    in_cols = cols < N_COLS
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    if NEED_DWEIGHT:
        dweight = tl.zeros((COLS,), tl.float32)
    if NEED_DBIAS:
        dbias = tl.zeros((COLS,), tl.float32)

    for tile in range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        in_rows = rows < n_rows
        inside = in_rows[:, None] & in_cols[None, :]
        # Zeros in dy beyond the width keep those columns out of every sum.
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        mean, residual, rstd = _load_stats(stats_ptr, rows, n_rows, in_rows)
        normed = (x - mean[:, None] - residual[:, None]) * rstd[:, None]
        dnormed = dy
        if HAS_WEIGHT:
            dnormed = dy * weight[None, :]
        along_normed = tl.sum(dnormed * normed, axis=1) / N_COLS
        along_ones = tl.sum(dnormed, axis=1) / N_COLS
        dx = (dnormed - along_ones[:, None] - normed * along_normed[:, None]) * rstd[:, None]
        tl.store(dx_ptr + rows[:, None] * N_COLS + cols[None, :], dx, mask=inside)
        if NEED_DWEIGHT:
            dweight += tl.sum(dy * normed, axis=0)
        if NEED_DBIAS:
            dbias += tl.sum(dy, axis=0)

    if NEED_DWEIGHT:
        tl.store(dweight_ptr + program.to(tl.int64) * N_COLS + cols, dweight, mask=in_cols)
    if NEED_DBIAS:
        tl.store(dbias_ptr + program.to(tl.int64) * N_COLS + cols, dbias, mask=in_cols)


@triton.jit(do_not_specialize=["n_rows"])
def backward_dx_wide_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,
    dx_ptr,
    n_rows,
    dy_stride,
    x_stride,
    N_COLS: tl.constexpr,
    COLS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """dx of one row, in blocks of columns: once for the two means, once more (from the cache) for the result."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    dy_row = dy_ptr + row * dy_stride
    x_row = x_ptr + row * x_stride
    mean, residual, rstd = _load_stats(stats_ptr, row, n_rows, row < n_rows)

    with_normed = tl.zeros((COLS,), tl.float32)
    with_ones = tl.zeros((COLS,), tl.float32)
    for start in range(0, N_COLS, COLS):
        in_cols = start + cols < N_COLS
        dnormed = tl.load(dy_row + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            dnormed *= tl.load(weight_ptr + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        x = tl.load(x_row + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        normed = (x - mean - residual) * rstd
        with_normed += dnormed * normed
        with_ones += dnormed
    along_normed = tl.sum(with_normed, axis=0) / N_COLS
    along_ones = tl.sum(with_ones, axis=0) / N_COLS

    for start in range(0, N_COLS, COLS):
        in_cols = start + cols < N_COLS
        dnormed = tl.load(dy_row + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            dnormed *= tl.load(weight_ptr + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        x = tl.load(x_row + start + cols, mask=in_cols, other=0.0).to(tl.float32)
        normed = (x - mean - residual) * rstd
        dx = (dnormed - along_ones - normed * along_normed) * rstd
        tl.store(dx_ptr + row * N_COLS + start + cols, dx, mask=in_cols)


@triton.jit(do_not_specialize=["n_rows"])
def backward_parameters_kernel(
    dy_ptr,
    x_ptr,
    stats_ptr,
    dweight_ptr,
    dbias_ptr,
    n_rows,
    dy_stride,
    x_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
):
    """Partial sums of dweight and dbias over some rows of some columns, where no dx is wanted or rows are wide.

    With the statistics saved no sum along a row is left to do, so the columns split freely over programs.
    """
    program = tl.program_id(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_cols = cols < N_COLS
    if NEED_DWEIGHT:
        dweight = tl.zeros((ROWS, COLS), tl.float32)
    if NEED_DBIAS:
        dbias = tl.zeros((ROWS, COLS), tl.float32)

    for tile in range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(1)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        in_rows = rows < n_rows
        inside = in_rows[:, None] & in_cols[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if NEED_DWEIGHT:
            x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            mean, residual, rstd = _load_stats(stats_ptr, rows, n_rows, in_rows)
            dweight += dy * ((x - mean[:, None] - residual[:, None]) * rstd[:, None])
        if NEED_DBIAS:
            dbias += dy

    if NEED_DWEIGHT:
        tl.store(dweight_ptr + program.to(tl.int64) * N_COLS + cols, tl.sum(dweight, axis=0), mask=in_cols)
    if NEED_DBIAS:
        tl.store(dbias_ptr + program.to(tl.int64) * N_COLS + cols, tl.sum(dbias, axis=0), mask=in_cols)


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
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
):
    """Add up the programs' partial sums, in the same order every time, and round to the gradients' dtype."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_cols = cols < N_COLS
    if NEED_DWEIGHT:
        dweight = tl.zeros((ROWS, COLS), tl.float32)
    if NEED_DBIAS:
        dbias = tl.zeros((ROWS, COLS), tl.float32)

    for start in range(0, n_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < n_partials)[:, None] & in_cols[None, :]
        at = rows.to(tl.int64)[:, None] * N_COLS + cols[None, :]
        if NEED_DWEIGHT:
            dweight += tl.load(dweight_partial_ptr + at, mask=inside, other=0.0)
        if NEED_DBIAS:
            dbias += tl.load(dbias_partial_ptr + at, mask=inside, other=0.0)

    if NEED_DWEIGHT:
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0), mask=in_cols)
    if NEED_DBIAS:
        tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0), mask=in_cols)


def layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise each row, then scale and shift it.

    Args:
        x: `(n_rows, n_cols)`, float32, bfloat16 or float16; any number of rows, none included.
        weight: `(n_cols,)`, of any of these dtypes, or None for ones.
        bias: `(n_cols,)`, likewise, or None for zeros.
        eps: Added to the variance.

    Returns:
        `y`, contiguous, shaped and typed like `x`; and `stats`, float32 `(3, n_rows, 1)`: the rounded mean, its
        residual, and `1 / sqrt(variance + eps)`.
    """
    n_rows, n_cols = x.shape
    x, weight, bias = _unit_columns(x), _unit_columns(weight), _unit_columns(bias)
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    stats = torch.empty((N_STATS, n_rows, 1), dtype=torch.float32, device=x.device)
    if n_rows == 0:
        return y, stats
    tile = launch.row_tile(n_cols, x.element_size(), backward=False)
    constants = {
        "N_COLS": n_cols,
        "COLS": tile.cols,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        **_options(tile),
    }
    arguments = (x, weight, bias, y, stats, n_rows, x.stride(0), eps)
    with _current(x.device):
        if n_cols <= launch.MAX_ROW_TILE:
            forward_kernel[(triton.cdiv(n_rows, tile.rows),)](*arguments, ROWS=tile.rows, **constants)
        else:
            forward_wide_kernel[(n_rows,)](*arguments, **constants)
    return y, stats


def layer_norm_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    *,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    grad_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the wanted ones of the three gradients; nothing is loaded or stored for the others.

    Args:
        dy: `(n_rows, n_cols)`, the gradient of `y`.
        x: As in the forward; None will do where only `dbias` is wanted.
        weight: As in the forward; read for `dx` only.
        stats: From the forward; None will do where `x` may be None.
        need_dx: Whether the gradient of `x` is wanted.
        need_dweight: Whether the gradient of the weight is wanted.
        need_dbias: Whether the gradient of the bias is wanted.
        grad_dtype: The dtype of the parameters' gradients; they are summed in float32.

    Returns:
        `dx` `(n_rows, n_cols)` in the dtype of `dy`, `dweight` and `dbias` `(n_cols,)`; None for what is not wanted.
    """
    n_rows, n_cols = dy.shape
    need_parameters = need_dweight or need_dbias
    parameters = {"NEED_DWEIGHT": need_dweight, "NEED_DBIAS": need_dbias}
    dx = torch.empty((n_rows, n_cols), dtype=dy.dtype, device=dy.device) if need_dx else None
    new_vector = torch.zeros if n_rows == 0 else torch.empty
    dweight, dbias = (
        new_vector(n_cols, dtype=grad_dtype, device=dy.device) if need else None for need in parameters.values()
    )
    if n_rows == 0:
        return dx, dweight, dbias

    dy, x, weight = _unit_columns(dy), _unit_columns(x), _unit_columns(weight)
    strides = (dy.stride(0), 0 if x is None else x.stride(0))
    narrow = n_cols <= launch.MAX_ROW_TILE
    row_tile = launch.row_tile(n_cols, dy.element_size(), backward=True)
    tile = row_tile if need_dx and narrow else launch.COLUMN_TILE
    n_tiles = triton.cdiv(n_rows, tile.rows)
    n_col_blocks = 1 if tile is row_tile else triton.cdiv(n_cols, tile.cols)
    n_partials = min(n_tiles, triton.cdiv(launch.summing_programs(dy.device, tile), n_col_blocks))
    dweight_partial, dbias_partial = (
        torch.empty((n_partials, n_cols), dtype=torch.float32, device=dy.device) if need else None
        for need in parameters.values()
    )
    with _current(dy.device):
        if need_dx and narrow:
            backward_kernel[(n_partials if need_parameters else n_tiles,)](
                *(dy, x, weight, stats, dx, dweight_partial, dbias_partial, n_rows, *strides),
                N_COLS=n_cols,
                ROWS=tile.rows,
                COLS=tile.cols,
                HAS_WEIGHT=weight is not None,
                **parameters,
                **_options(tile),
            )
        elif need_dx:
            backward_dx_wide_kernel[(n_rows,)](
                *(dy, x, weight, stats, dx, n_rows, *strides),
                N_COLS=n_cols,
                COLS=row_tile.cols,
                HAS_WEIGHT=weight is not None,
                **_options(row_tile),
            )
        if need_parameters and not (need_dx and narrow):
            backward_parameters_kernel[(n_col_blocks, n_partials)](
                *(dy, x, stats, dweight_partial, dbias_partial, n_rows, *strides),
                N_COLS=n_cols,
                ROWS=tile.rows,
                COLS=tile.cols,
                **parameters,
                **_options(tile),
            )
        if need_parameters:
            finish = launch.FINISH_TILE
            finish_kernel[(triton.cdiv(n_cols, finish.cols),)](
                *(dweight_partial, dbias_partial, dweight, dbias, n_partials),
                N_COLS=n_cols,
                ROWS=finish.rows,
                COLS=finish.cols,
                **parameters,
                **_options(finish),
            )
    return dx, dweight, dbias


def _options(tile: launch.Tile) -> dict[str, int | bool]:
    # Contraction of a * b + c is set because its default is about to change in Triton, and results with it.
    return {"num_warps": tile.warps, "enable_fp_fusion": True}


def _unit_columns(x: TensorT) -> TensorT:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    # Triton launches on the current GPU, which need not be the tensors'.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
