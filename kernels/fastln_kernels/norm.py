"""LayerNorm and RMSNorm in Triton, forward and backward. kernels/README.md derives the mathematics.

Four rules apply throughout. Values are cast to float32 before any arithmetic. Row addresses are int64. The number of
rows is a run-time argument on which Triton does not specialise, so a new length does not recompile; the width is a
constant. Sums over rows use float32 partial sums, one per program, and one kernel adds them in a fixed order, so two
runs on one machine give the same bits.

Rows may have any stride. Tensors with non-contiguous columns, and such weights and biases, are copied first.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from fastln_kernels import int8, launch
from fastln_kernels.int8 import Rounding
from fastln_kernels.norm_again import again_kernel
from fastln_kernels.norm_rows import backward_kernel, forward_kernel
from fastln_kernels.norm_sums import backward_parameters_kernel, finish_kernel
from fastln_kernels.norm_wide import backward_wide_kernel, forward_wide_kernel
from fastln_kernels.reference import (
    NormAgain,
    NormBackward,
    NormForward,
    NormGradients,
    NormKind,
    NormOutputs,
    dropout_threshold,
)
from fastln_kernels.reference_codes import scale_shape

TensorT = TypeVar("TensorT", Tensor, Tensor | None)

ROUNDED_BY = int8
"""The module whose `rounding` these functions take."""


def norm_forward(request: NormForward, rounding: Rounding | None = None) -> NormOutputs:
    """Normalise each row of `residual + dropout(x)`, then scale and shift it.

    Arguments and results are those of `fastln_kernels.reference.norm_forward`, for float32, bfloat16 and float16.
    Weight and bias may have any of these dtypes. `rounding` says where the result is written in 8 bits too, if
    anywhere.
    """
    kind, seed = request.kind, request.seed
    x, residual = _unit_columns(request.x), _unit_columns(request.residual)
    weight, bias = _unit_columns(request.weight), _unit_columns(request.bias)
    n_rows, n_cols = x.shape
    y, stream, normed, codes = (
        torch.empty((n_rows, n_cols), dtype=dtype, device=x.device) if wanted else None
        for wanted, dtype in (
            (True, x.dtype),
            (request.want_stream, x.dtype),
            (request.want_normed, x.dtype),
            (request.want_codes, torch.int8),
        )
    )
    assert y is not None
    assert normed is None or codes is None
    rstd = torch.empty((n_rows,), dtype=torch.float32, device=x.device)
    scale = None
    if request.want_codes:
        scale = torch.empty(scale_shape(x.shape, 8), dtype=torch.float32, device=x.device)
    normed = normed if codes is None else codes
    outputs = NormOutputs(y, stream, normed, rstd, scale)
    if n_rows == 0:
        return outputs
    tensors = (x, residual, weight, bias, seed, y, stream, normed, rstd, scale)
    numbers = (n_rows, _row_stride(x), _row_stride(residual), kind.eps)
    constants = _constants(n_cols, kind, request.dropout) | {"ROUND_NORMED": kind.round_normed}
    with launch.on_device(x.device):
        prologue = residual is not None or request.dropout > 0
        where = (n_cols, x.element_size(), x.device)
        tile = launch.forward_tile(*where, prologue=prologue, rounds=rounding is not None or request.want_codes)
        if tile:
            grid = (triton.cdiv(n_rows, tile.rows),)
            in_8_bits = rounding.rows if rounding else (None, None)
            options = launch.row_options(tile) | {"TURN": rounding is not None and rounding.turned}
            forward_kernel[grid](*tensors, *in_8_bits, *numbers, **constants, **options)
        else:
            wide = launch.wide_tile(
                *(n_cols, x.element_size()),
                n_inputs=1 + prologue,
                n_sums=0,
                prologue=prologue,
                codes=request.want_codes,
            )
            grid = (min(n_rows, launch.sm_count(x.device)),)
            forward_wide_kernel[grid](*tensors, *numbers, **constants, **_wide_options(wide))
            if rounding:
                rounding.after(y)
    return outputs


def norm_backward(request: NormBackward, rounding: Rounding | None = None) -> NormGradients:
    """Compute only the requested gradients. The kernels load and store nothing for the others.

    Arguments and results are those of `fastln_kernels.reference.norm_backward`. `rounding` says where dx is written in
    8 bits too, if anywhere.
    """
    kind, rstd = request.kind, request.rstd
    dy, saved = _unit_columns(request.dy), _unit_columns(request.saved)
    dstream, weight = _unit_columns(request.dstream), _unit_columns(request.weight)
    scale = _contiguous(request.scale)
    n_rows, n_cols = dy.shape
    need_rows, need = request.need_dx or request.need_dresidual, (request.need_dweight, request.need_dbias)
    new = functools.partial(torch.zeros if n_rows == 0 else torch.empty, device=dy.device)
    dx, dresidual = (
        new((n_rows, n_cols), dtype=dy.dtype) if wanted else None
        for wanted in (request.need_dx, request.need_dresidual)
    )
    dweight, dbias = (new((n_cols,), dtype=request.grad_dtype) if wanted else None for wanted in need)
    gradients = NormGradients(dx, dresidual, dweight, dbias)
    if n_rows == 0:
        return gradients

    where = (n_cols, dy.element_size(), dy.device)
    n_inputs, n_sums = sum(t is not None for t in (dy, saved, dstream)), sum(need)
    prologue = dstream is not None or request.dropout > 0
    tile = launch.backward_tile(
        *where,
        n_inputs=n_inputs,
        n_sums=n_sums,
        need_rows=need_rows,
        prologue=prologue,
        rounds=rounding is not None,
    )
    wide = launch.wide_tile(*where[:2], n_inputs=1 + need_rows, n_sums=n_sums, prologue=prologue)
    find_mean = request.need_dweight and kind.centre and not request.saved_is_normed
    by_rows = tile is not None or need_rows or find_mean
    # Which sums the row programs keep. A separate kernel computes the others from each row's mean.
    n_kept = n_sums if tile else wide.sums if by_rows else 0
    kept = (request.need_dweight and n_kept > 0, request.need_dbias and n_kept > request.need_dweight)
    apart = tuple(wanted and not has for wanted, has in zip(need, kept, strict=True))
    means = new((2, n_rows), dtype=torch.float32) if find_mean and apart[0] else None

    constants = _constants(n_cols, kind, request.dropout)
    of_saved = {"ROUND_NORMED": kind.round_normed, "SAVED_IS_NORMED": request.saved_is_normed}
    strides = (_row_stride(dy), _row_stride(saved))
    rows = (dy, saved, weight, rstd, scale, dstream, request.seed, dx, dresidual)
    numbers = (n_rows, *strides, _row_stride(dstream))
    with launch.on_device(dy.device):
        if by_rows:
            n_programs = triton.cdiv(n_rows, tile.rows) if tile else min(n_rows, launch.sm_count(dy.device))
            if tile and any(kept):
                n_programs = min(n_programs, launch.summing_programs(dy.device, tile))
            partials = _partials(kept, n_programs, n_cols, dy.device)
            if tile:
                options = {"PREFETCH": tile.prefetch, **launch.row_options(tile)}
                in_8_bits = (rounding.factors, *rounding.rows) if rounding else (None, None, None)
                tensors = (*rows, *partials, *in_8_bits)
                backward_kernel[(n_programs,)](*tensors, *numbers, **constants, **of_saved, **options)
            else:
                results = (*partials, means)
                options = _wide_options(wide)
                backward_wide_kernel[(n_programs,)](*rows, *results, *numbers, **constants, **of_saved, **options)
                if rounding and dx is not None:
                    rounding.after(dx)
            finish(partials, (dweight, dbias))
        if any(apart):
            n_col_blocks = triton.cdiv(n_cols, launch.COLUMN_TILE.cols)
            n_programs = triton.cdiv(launch.summing_programs(dy.device, launch.COLUMN_TILE), n_col_blocks)
            n_programs = min(triton.cdiv(n_rows, launch.COLUMN_TILE.rows), n_programs)
            partials = _partials(apart, n_programs, n_cols, dy.device)
            tensors = (dy, saved if apart[0] else None, rstd, scale, means, *partials)
            sizes = {"N_COLS": n_cols, "ROWS": launch.COLUMN_TILE.rows, **_block_options(launch.COLUMN_TILE)}
            grid = (n_col_blocks, n_programs)
            backward_parameters_kernel[grid](*tensors, n_rows, *strides, **of_saved, **sizes)
            finish(partials, (dweight, dbias))
    return gradients


def norm_again(request: NormAgain) -> Tensor:
    """Return the forward's y again, from what it kept.

    Arguments and result are those of `fastln_kernels.reference.norm_again`. From the norm's input it is the forward's
    y bit for bit, since the same kernel makes it.
    """
    kind = request.kind
    if not request.saved_is_normed:
        assert request.dtype == request.saved.dtype
        return norm_forward(NormForward(request.saved, request.weight, request.bias, kind)).y
    saved, weight, bias = (_unit_columns(t) for t in (request.saved, request.weight, request.bias))
    assert saved is not None
    n_rows, n_cols = saved.shape
    y = torch.empty((n_rows, n_cols), dtype=request.dtype, device=saved.device)
    if y.numel() == 0:
        return y
    tile = launch.again_tile(n_cols, y.element_size())
    sizes = {"N_COLS": n_cols, "ROWS": tile.rows, "REPEATS": launch.AGAIN_REPEATS, **_block_options(tile)}
    n_programs = triton.cdiv(n_rows, launch.AGAIN_REPEATS * tile.rows) * triton.cdiv(n_cols, tile.cols)
    tensors = (saved, _contiguous(request.scale), weight, bias, y, n_rows, _row_stride(saved))
    with launch.on_device(saved.device):
        again_kernel[(n_programs,)](*tensors, **sizes, OFFSET=kind.offset, ROUND_NORMED=kind.round_normed)
    return y


def _partials(wanted: tuple[bool, ...], n_partials: int, n_cols: int, device: torch.device) -> list[Tensor | None]:
    """Allocate the programs' partial sums; None for those that are not requested."""
    return [torch.empty((n_partials, n_cols), dtype=torch.float32, device=device) if has else None for has in wanted]


def finish(partials: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    """Add the programs' partial sums, `(n_partials, n_cols)` or None, and write the gradients of weight and bias."""
    shape = next((sums.shape for sums in partials if sums is not None), None)
    if shape is None:
        return
    n_partials, n_cols = shape
    totals = [None if sums is None else total for sums, total in zip(partials, gradients, strict=True)]
    sizes = {"N_COLS": n_cols, "ROWS": launch.FINISH_TILE.rows, **_block_options(launch.FINISH_TILE)}
    finish_kernel[(triton.cdiv(n_cols, launch.FINISH_TILE.cols),)](*partials, *totals, n_partials, **sizes)


def _constants(n_cols: int, kind: NormKind, dropout: float) -> dict[str, Any]:
    return {
        "N_COLS": n_cols,
        "CENTRE": kind.centre,
        "OFFSET": kind.offset,
        "THRESHOLD": dropout_threshold(dropout),
    }


# `launch.row_options` says why `enable_fp_fusion` is set.
def _block_options(tile: launch.ColumnTile) -> dict[str, Any]:
    return {"COLS": tile.cols, "num_warps": tile.warps, "enable_fp_fusion": True}


def _wide_options(tile: launch.WideTile) -> dict[str, Any]:
    cap = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {"COLS": tile.cols, "GROUP": tile.group, **cap, "num_warps": tile.warps, "enable_fp_fusion": True}


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _unit_columns(x: TensorT) -> TensorT:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
