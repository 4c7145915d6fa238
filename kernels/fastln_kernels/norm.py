"""LayerNorm and RMSNorm in Triton, forward and backward; README.md beside this package derives the mathematics.

Four habits hold throughout. Values are cast to float32 before any arithmetic. Row addresses are int64. The number of
rows is a run-time argument that is never specialised on, so that no new length recompiles; the width is a constant.
Sums over rows go through float32 partials, one per program, which one kernel adds up in a fixed order, so that two runs
on one machine give the same bits.

Tensors of rows may have any row stride; columns, weights and biases that are not contiguous are copied first.
"""

# mypy: allow-untyped-defs
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastln_kernels import launch
from fastln_kernels.norm_rows import backward_kernel, forward_kernel
from fastln_kernels.norm_wide import backward_parameters_kernel, backward_wide_kernel, forward_wide_kernel
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
        prologue = residual is not None or dropout > 0
        tile = launch.forward_tile(n_cols, x.element_size(), x.device, prologue=prologue)
        if tile:
            forward_kernel[(triton.cdiv(n_rows, tile.rows),)](*arguments, **constants, **_row_options(tile))
        else:
            n_inputs = 1 + (residual is not None or dropout > 0)
            wide = launch.wide_tile(n_cols, x.element_size(), n_inputs=n_inputs, n_sums=0, prologue=prologue)
            n_programs = min(n_rows, launch.sm_count(x.device))
            forward_wide_kernel[(n_programs,)](*arguments, **constants, **_wide_options(wide))
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
    need_rows, need = need_dx or need_dresidual, (need_dweight, need_dbias)
    new = functools.partial(torch.zeros if n_rows == 0 else torch.empty, device=dy.device)
    dx, dresidual = (new((n_rows, n_cols), dtype=dy.dtype) if wanted else None for wanted in (need_dx, need_dresidual))
    dweight, dbias = (new((n_cols,), dtype=grad_dtype) if wanted else None for wanted in need)
    gradients = NormGradients(dx, dresidual, dweight, dbias)
    if n_rows == 0:
        return gradients

    dy, saved, weight, dstream = (_unit_columns(dy), *(_unit_columns(t) for t in (saved, weight, dstream)))
    where = (n_cols, dy.element_size(), dy.device)
    n_inputs, n_sums = sum(t is not None for t in (dy, saved, dstream)), sum(need)
    prologue = dstream is not None or dropout > 0
    tile = launch.backward_tile(*where, n_inputs=n_inputs, n_sums=n_sums, need_rows=need_rows, prologue=prologue)
    wide = launch.wide_tile(*where[:2], n_inputs=1 + need_rows, n_sums=n_sums, prologue=prologue)
    find_mean = need_dweight and kind.centre and not saved_is_normed
    by_rows = tile is not None or need_rows or find_mean
    # Which sums the programs keep that go through the rows; the others are made apart, from each row's mean.
    n_kept = n_sums if tile else wide.sums if by_rows else 0
    kept = (need_dweight and n_kept > 0, need_dbias and n_kept > need_dweight)
    apart = tuple(wanted and not has for wanted, has in zip(need, kept, strict=True))
    means = new((2, n_rows), dtype=torch.float32) if find_mean and apart[0] else None

    def new_partials(wanted: tuple[bool, ...], n_partials: int) -> list[Tensor | None]:
        return [new((n_partials, n_cols), dtype=torch.float32) if has else None for has in wanted]

    constants = _constants(n_cols, kind, dropout)
    of_saved = {"ROUND_NORMED": kind.round_normed, "SAVED_IS_NORMED": saved_is_normed}
    strides = (_row_stride(dy), _row_stride(saved))
    rows = (dy, saved, weight, rstd, dstream, seed, dx, dresidual)
    with launch.on_device(dy.device):
        if by_rows:
            n_programs = triton.cdiv(n_rows, tile.rows) if tile else min(n_rows, launch.sm_count(dy.device))
            if tile and any(kept):
                n_programs = min(n_programs, launch.summing_programs(dy.device, tile))
            partials = new_partials(kept, n_programs)
            arguments = (n_rows, *strides, _row_stride(dstream))
            if tile:
                options = {"PREFETCH": tile.prefetch, **_row_options(tile)}
                backward_kernel[(n_programs,)](*rows, *partials, *arguments, **constants, **of_saved, **options)
            else:
                options = _wide_options(wide)
                backward_wide_kernel[(n_programs,)](
                    *(*rows, *partials, means, *arguments), **constants, **of_saved, **options
                )
            finish(partials, (dweight, dbias))
        if any(apart):
            n_col_blocks = triton.cdiv(n_cols, launch.COLUMN_TILE.cols)
            n_programs = triton.cdiv(launch.summing_programs(dy.device, launch.COLUMN_TILE), n_col_blocks)
            n_programs = min(triton.cdiv(n_rows, launch.COLUMN_TILE.rows), n_programs)
            partials = new_partials(apart, n_programs)
            backward_parameters_kernel[(n_col_blocks, n_programs)](
                *(dy, saved if apart[0] else None, rstd, means, *partials, n_rows, *strides),
                N_COLS=n_cols,
                ROWS=launch.COLUMN_TILE.rows,
                **of_saved,
                **_block_options(launch.COLUMN_TILE),
            )
            finish(partials, (dweight, dbias))
    return gradients


def finish(partials: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Add up programs' partial sums, `(n_partials, n_cols)` or None, into the gradients of weight and bias."""
    given = [
        (sums, total) if sums is not None else (None, None) for sums, total in zip(partials, gradients, strict=True)
    ]
    shape = next((sums.shape for sums, _ in given if sums is not None), None)
    if shape is None:
        return
    n_partials, n_cols = shape
    finish_kernel[(triton.cdiv(n_cols, launch.FINISH_TILE.cols),)](
        *(*(sums for sums, _ in given), *(total for _, total in given), n_partials),
        N_COLS=n_cols,
        ROWS=launch.FINISH_TILE.rows,
        **_block_options(launch.FINISH_TILE),
    )


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
    cap = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {**sizes, **cap, "num_warps": tile.warps, "enable_fp_fusion": True}


def _block_options(tile: launch.ColumnTile) -> dict[str, Any]:
    return {"COLS": tile.cols, "num_warps": tile.warps, "enable_fp_fusion": True}


def _wide_options(tile: launch.WideTile) -> dict[str, Any]:
    cap = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {"COLS": tile.cols, "GROUP": tile.group, **cap, "num_warps": tile.warps, "enable_fp_fusion": True}


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _unit_columns(x: TensorT) -> TensorT:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
