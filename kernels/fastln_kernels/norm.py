"""LayerNorm and RMSNorm in Triton, forward and backward; README.md beside this package derives the mathematics.

Four habits hold throughout. Values are cast to float32 before any arithmetic. Row addresses are int64. The number of
rows is a run-time argument that is never specialised on, so that no new length recompiles; the width is a constant.
Sums over rows go through float32 partials, one per program, which one kernel adds up in a fixed order, so that two runs
on one machine give the same bits.

Tensors of rows may have any row stride; columns, weights and biases that are not contiguous are copied first.
"""

# mypy: allow-untyped-defs
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastln_kernels import launch
from fastln_kernels.norm_rows import backward_kernel, forward_kernel
from fastln_kernels.norm_wide import backward_parameters_kernel, backward_row_wide_kernel, forward_wide_kernel
from fastln_kernels.reference import NormGradients, NormKind, NormOutputs, dropout_threshold

TensorT = TypeVar("TensorT", Tensor, Tensor | None)


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
    """Add up the programs' partial sums, in the same order every time, and round to the gradients' dtype."""
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


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: NormKind,
    *,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    want_stream: bool = False,
    want_normed: bool = False,
) -> NormOutputs:
    """Normalise each row of `residual + dropout(x)`, then scale and shift it.

    Takes and returns what `fastln_kernels.reference.norm_forward` does, for float32, bfloat16 and float16; weight and
    bias may be of any of these dtypes.
    """
    n_rows, n_cols = x.shape
    x, residual = _unit_columns(x), _unit_columns(residual)

    def new(wanted: bool) -> Tensor | None:
        return torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device) if wanted else None

    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    stream, normed = new(want_stream), new(want_normed)
    rstd = torch.empty((n_rows,), dtype=torch.float32, device=x.device)
    if n_rows == 0:
        return NormOutputs(y, stream, normed, rstd)
    arguments = (
        *(x, residual, _unit_columns(weight), _unit_columns(bias), seed, y, stream, normed, rstd, n_rows),
        *(_row_stride(x), _row_stride(residual), kind.eps),
    )
    constants = _constants(n_cols, kind, dropout) | {"ROUND_NORMED": kind.round_normed}
    with launch.on_device(x.device):
        tile = launch.row_tile(n_cols, x.element_size(), backward=False)
        if tile:
            forward_kernel[(triton.cdiv(n_rows, tile.rows),)](*arguments, **constants, **_row_options(tile))
        else:
            forward_wide_kernel[(n_rows,)](*arguments, **constants, **_block_options(launch.WIDE_BLOCK))
    return NormOutputs(y, stream, normed, rstd)


def norm_backward(
    dy: Tensor,
    saved: Tensor | None,
    weight: Tensor | None,
    rstd: Tensor | None,
    kind: NormKind,
    *,
    saved_is_normed: bool = False,
    dstream: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool = False,
    need_dresidual: bool = False,
    need_dweight: bool = False,
    need_dbias: bool = False,
    grad_dtype: torch.dtype = torch.float32,
) -> NormGradients:
    """Compute the wanted ones of the gradients; nothing is loaded or stored for the others.

    Takes and returns what `fastln_kernels.reference.norm_backward` does.
    """
    n_rows, n_cols = dy.shape
    # Without dropout the two are one.
    one_of_two = need_dx and need_dresidual and not dropout
    need_rows, need_sums = need_dx or need_dresidual, need_dweight or need_dbias

    def rows(wanted: bool) -> Tensor | None:
        return torch.empty((n_rows, n_cols), dtype=dy.dtype, device=dy.device) if wanted else None

    def vector(wanted: bool) -> Tensor | None:
        new = torch.zeros if n_rows == 0 else torch.empty
        return new((n_cols,), dtype=grad_dtype, device=dy.device) if wanted else None

    dx, dresidual = rows(need_dx and not one_of_two), rows(need_dresidual)
    dweight, dbias = vector(need_dweight), vector(need_dbias)
    gradients = NormGradients(dresidual if one_of_two else dx, dresidual, dweight, dbias)
    if n_rows == 0:
        return gradients

    dy, saved, weight, dstream = (_unit_columns(dy), *(_unit_columns(t) for t in (saved, weight, dstream)))
    constants = _constants(n_cols, kind, dropout) | {"SAVED_IS_NORMED": saved_is_normed}
    shared = {"N_COLS": n_cols, "ROUND_NORMED": kind.round_normed, "SAVED_IS_NORMED": saved_is_normed}
    strides = (_row_stride(dy), _row_stride(saved))
    tile = launch.row_tile(n_cols, dy.element_size(), backward=True, sums=need_sums)
    sums_apart = need_sums and tile is None
    need_means = sums_apart and need_dweight and kind.centre and not saved_is_normed
    if sums_apart and need_rows:
        tile = launch.row_tile(n_cols, dy.element_size(), backward=True)

    n_partials, n_col_blocks = 0, triton.cdiv(n_cols, launch.COLUMN_TILE.cols)
    if tile and need_sums and not sums_apart:
        n_partials = min(triton.cdiv(n_rows, tile.rows), launch.summing_programs(dy.device, tile))
    elif need_sums:
        n_programs = triton.cdiv(launch.summing_programs(dy.device, launch.COLUMN_TILE), n_col_blocks)
        n_partials = min(triton.cdiv(n_rows, launch.COLUMN_TILE.rows), n_programs)
    dweight_partial, dbias_partial = (
        torch.empty((n_partials, n_cols), dtype=torch.float32, device=dy.device) if need else None
        for need in (need_dweight, need_dbias)
    )
    means = torch.empty((2, n_rows), dtype=torch.float32, device=dy.device) if need_means else None
    rows_in_out = (dy, saved, weight, rstd, dstream, seed, dx, dresidual)
    with launch.on_device(dy.device):
        if tile and (need_rows or not sums_apart):
            sums = (None, None) if sums_apart else (dweight_partial, dbias_partial)
            n_programs = n_partials if need_sums and not sums_apart else triton.cdiv(n_rows, tile.rows)
            backward_kernel[(n_programs,)](
                *(*rows_in_out, *sums, means, n_rows, *strides, _row_stride(dstream)),
                ROUND_NORMED=kind.round_normed,
                **constants,
                **_row_options(tile),
            )
        elif need_rows or need_means:
            backward_row_wide_kernel[(n_rows,)](
                *(*rows_in_out, means, n_rows, *strides, _row_stride(dstream)),
                **constants,
                **_block_options(launch.WIDE_BLOCK),
            )
        if sums_apart:
            backward_parameters_kernel[(n_col_blocks, n_partials)](
                *(dy, saved, rstd, means, dweight_partial, dbias_partial, n_rows, *strides),
                ROWS=launch.COLUMN_TILE.rows,
                **shared,
                **_block_options(launch.COLUMN_TILE),
            )
        if need_sums:
            finish_kernel[(triton.cdiv(n_cols, launch.FINISH_TILE.cols),)](
                *(dweight_partial, dbias_partial, dweight, dbias, n_partials),
                N_COLS=n_cols,
                ROWS=launch.FINISH_TILE.rows,
                **_block_options(launch.FINISH_TILE),
            )
    return gradients


def _constants(n_cols: int, kind: NormKind, dropout: float) -> dict[str, Any]:
    return {
        "N_COLS": n_cols,
        "CENTRE": kind.centre,
        "OFFSET": kind.offset,
        "THRESHOLD": dropout_threshold(dropout),
    }


# Contraction of a * b + c is set because its default is about to change in Triton, and results with it.
def _row_options(tile: launch.RowTile) -> dict[str, Any]:
    sizes = {"ROWS": tile.rows, "PIECE": tile.piece, "PIECES": tile.pieces}
    return {**sizes, "num_warps": tile.warps, "enable_fp_fusion": True}


def _block_options(tile: launch.ColumnTile) -> dict[str, Any]:
    return {"COLS": tile.cols, "num_warps": tile.warps, "enable_fp_fusion": True}


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _unit_columns(x: TensorT) -> TensorT:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
