"""Activations in Triton, plain and gated, forward and backward. kernels/README.md has the formulas.

Values are cast to float32 before any arithmetic. Addresses are int64. A program processes one block of neighbouring
elements of one row. If all tensors are contiguous, they are treated as one row. Element counts are run-time arguments
on which Triton does not specialise. At compile time only one thing is known about them: whether they are whole 16-byte
vectors. If so, the mask is the same for a whole vector, and accesses stay 16 bytes wide. Each kernel has two versions.

Rows may have any stride (gate and up may be two halves of one tensor). Tensors with non-contiguous columns are copied.

Results that are written in 8 bits too have kernels of their own, which process whole rows (`activation_rows.py`).
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
from collections.abc import Sequence
from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastln_kernels import int8, launch
from fastln_kernels.activation_codes import (
    backward_codes_kernel,
    backward_gated_codes_kernel,
    forward_codes_kernel,
    forward_gated_codes_kernel,
)
from fastln_kernels.activation_rows import backward_rows_kernel, forward_rows_kernel
from fastln_kernels.activation_rows_codes import backward_rows_codes_kernel, forward_rows_codes_kernel
from fastln_kernels.activation_values import times_slope, value
from fastln_kernels.code_values import slope_constants
from fastln_kernels.int8 import Rounding
from fastln_kernels.reference_activation import ActivationKind, GatedGradients
from fastln_kernels.reference_codes import GROUPS, Bits, GatedBits, GatedCodes, code_shape, scale_shape

ROUNDED_BY = int8
"""The module whose `rounding` these functions take."""


@triton.jit
def block_of(n_cols, blocks_a_row, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Return this program's row (int64), columns and mask. `VECTOR` neighbours share one mask value."""
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    start = (tl.program_id(0) % blocks_a_row).to(tl.int64) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    return row, cols, tl.max_constancy(cols < n_cols, VECTOR)


@triton.jit(do_not_specialize=["n_cols", "blocks_a_row"])
def forward_kernel(
    x_ptr,
    up_ptr,
    y_ptr,
    n_cols,
    blocks_a_row,
    x_stride,
    up_stride,
    y_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute `y = activation(x)`, or `activation(x) * up` if there is an `up`."""
    row, cols, mask = block_of(n_cols, blocks_a_row, BLOCK, VECTOR)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0)
    y = value(x.to(tl.float32), KIND)
    if up_ptr is not None:
        y *= up.to(tl.float32)
    tl.store(y_ptr + row * y_stride + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_cols", "blocks_a_row"])
def backward_kernel(
    dy_ptr,
    x_ptr,
    up_ptr,
    dx_ptr,
    dup_ptr,
    n_cols,
    blocks_a_row,
    dy_stride,
    x_stride,
    up_stride,
    dx_stride,
    dup_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute the requested gradients of `x` and `up`. A plain activation has no `up` and no `dup`."""
    row, cols, mask = block_of(n_cols, blocks_a_row, BLOCK, VECTOR)
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    x = x.to(tl.float32)
    if dx_ptr is not None:
        dvalue = dy
        if up_ptr is not None:
            dvalue *= up.to(tl.float32)
        tl.store(dx_ptr + row * dx_stride + cols, times_slope(dvalue, x, KIND), mask=mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + row * dup_stride + cols, dy * value(x, KIND), mask=mask)


@overload
def activation_forward(
    x: Tensor, kind: ActivationKind, rounding: Rounding | None = None, *, bits: None = None
) -> Tensor: ...
@overload
def activation_forward(
    x: Tensor, kind: ActivationKind, rounding: Rounding | None = None, *, bits: Bits
) -> tuple[Tensor, Tensor]: ...
def activation_forward(
    x: Tensor, kind: ActivationKind, rounding: Rounding | None = None, *, bits: Bits | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply an activation.

    This and the other three functions have the arguments and results of those in
    `fastln_kernels.reference_activation`, for float32, bfloat16 and float16. `rounding` says where the result is also
    written in 8 bits, if anywhere.
    """
    if bits is None:
        return _forward(x, None, kind, rounding)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes = torch.empty(code_shape(x.shape, bits), dtype=torch.uint8, device=x.device)
    bounds = slope_constants(kind, bits)["BOUNDS"]
    if tile := _codes_tile((x,), (y,), (rounding,)):
        assert rounding is not None
        results = (y, *rounding.rows, codes, None, None, None)
        constants = {"KIND": kind, "BITS": bits, "BOUNDS": bounds, "GROUP": 1, "TURN": rounding.turned}
        _launch_rows(forward_rows_codes_kernel, tile, (x, None), results, **constants)
    else:
        _launch_codes(forward_codes_kernel, (x,), (y,), (codes,), (), bits, KIND=kind, BOUNDS=bounds)
        _round_after((y,), (rounding,))
    return y, codes


def activation_backward(
    dy: Tensor, saved: Tensor, kind: ActivationKind, rounding: Rounding | None = None, *, bits: Bits | None = None
) -> Tensor:
    """Compute dx."""
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    if bits is None:
        _backward((dy, saved, None), (dx, None), kind, (rounding, None))
    else:
        levels = slope_constants(kind, bits)["LEVELS"]
        if tile := _codes_tile((dy,), (dx,), (rounding,)):
            results = (dx, None, *_in_8_bits((rounding, None)), None, saved.contiguous(), None, None)
            constants = {"KIND": kind, "BITS": bits, "LEVELS": levels, "GROUP": 1}
            _launch_rows(backward_rows_codes_kernel, tile, (dy,), results, **constants)
        else:
            _launch_codes(backward_codes_kernel, (dy,), (dx,), (saved,), (), bits, KIND=kind, LEVELS=levels)
            _round_after((dx,), (rounding,))
    return dx


@overload
def gated_forward(
    gate: Tensor, up: Tensor, kind: ActivationKind, rounding: Rounding | None = None, *, bits: None = None
) -> Tensor: ...
@overload
def gated_forward(
    gate: Tensor, up: Tensor, kind: ActivationKind, rounding: Rounding | None = None, *, bits: GatedBits
) -> tuple[Tensor, GatedCodes]: ...
def gated_forward(
    gate: Tensor,
    up: Tensor,
    kind: ActivationKind,
    rounding: Rounding | None = None,
    *,
    bits: GatedBits | None = None,
) -> Tensor | tuple[Tensor, GatedCodes]:
    """Compute `activation(gate) * up`."""
    if bits is None:
        return _forward(gate, up, kind, rounding)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dtype, shape = torch.int8 if bits == 8 else torch.uint8, code_shape(gate.shape, bits)
    value, slope = (torch.empty(shape, dtype=dtype, device=gate.device) for _ in range(2))
    scales = tuple(
        torch.empty(scale_shape(gate.shape, bits), dtype=torch.float32, device=gate.device) for _ in range(2)
    )
    if tile := _codes_tile((gate, up), (y,), (rounding,)):
        assert rounding is not None
        results = (y, *rounding.rows, value, slope, *scales)
        constants = {"BITS": bits, "BOUNDS": (), "GROUP": min(GROUPS[bits], tile.piece), "TURN": rounding.turned}
        _launch_rows(forward_rows_codes_kernel, tile, (gate, up), results, KIND=kind, **constants)
    else:
        _launch_codes(forward_gated_codes_kernel, (gate, up), (y,), (value, slope), scales, bits, KIND=kind)
        _round_after((y,), (rounding,))
    return y, GatedCodes(value, slope, *scales)


def gated_backward(
    dy: Tensor,
    gate: Tensor | GatedCodes,
    up: Tensor | None,
    kind: ActivationKind,
    *,
    need_dgate: bool = False,
    need_dup: bool = False,
    out: GatedGradients | None = None,
    round_dgate: Rounding | None = None,
    round_dup: Rounding | None = None,
) -> GatedGradients:
    """Compute only the requested gradients. The kernel loads and stores nothing for the others.

    `round_dgate` and `round_dup` say where these are also written in 8 bits, if anywhere.
    """
    wanted = (need_dgate, need_dup)
    if out is None:
        out = GatedGradients(
            *(torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if need else None for need in wanted)
        )
    if any(wanted):
        dgate, dup = (t if need else None for t, need in zip(out, wanted, strict=True))
        if isinstance(gate, GatedCodes):
            value, slope = gate.value if need_dup else None, gate.slope if need_dgate else None
            scales = (gate.value_scale if need_dup else None, gate.slope_scale if need_dgate else None)
            bits: Bits = 8 if gate.bits == 8 else 4
            if tile := _codes_tile((dy,), (dgate, dup), (round_dgate, round_dup)):
                codes = [None if t is None else t.contiguous() for t in (value, slope, *scales)]
                results = (dgate, dup, *_in_8_bits((round_dgate, round_dup)), *codes)
                constants = {"KIND": kind, "BITS": bits, "LEVELS": (), "GROUP": min(GROUPS[bits], tile.piece)}
                _launch_rows(backward_rows_codes_kernel, tile, (dy,), results, **constants)
            else:
                _launch_codes(backward_gated_codes_kernel, (dy,), (dgate, dup), (value, slope), scales, bits)
                _round_after((dgate, dup), (round_dgate, round_dup))
        else:
            _backward((dy, gate, up if need_dgate else None), (dgate, dup), kind, (round_dgate, round_dup))
    return out


def _forward(x: Tensor, up: Tensor | None, kind: ActivationKind, rounding: Rounding | None) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inputs = (x, up)
    tile = _row_tile(inputs, (rounding,))
    if tile is None or rounding is None:
        _launch(forward_kernel, inputs, (y,), kind)
        _round_after((y,), (rounding,))
    else:
        _launch_rows(forward_rows_kernel, tile, inputs, (y, *rounding.rows), KIND=kind, TURN=rounding.turned)
    return y


def _backward(
    inputs: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    kind: ActivationKind,
    roundings: tuple[Rounding | None, ...],
) -> None:
    tile = _row_tile(inputs, roundings)
    if tile is None:
        _launch(backward_kernel, inputs, results, kind)
        _round_after(results, roundings)
    else:
        _launch_rows(backward_rows_kernel, tile, inputs, (*results, *_in_8_bits(roundings)), KIND=kind)


def _in_8_bits(roundings: tuple[Rounding | None, ...]) -> list[Tensor | None]:
    """Return the factors and the places of results that are written in 8 bits too, three for each."""
    return [t for by in roundings for t in ((by.factors, *by.rows) if by else (None,) * 3)]


def _codes_tile(
    inputs: tuple[Tensor, ...], results: tuple[Tensor | None, ...], roundings: tuple[Rounding | None, ...]
) -> launch.RowTile | None:
    """Return the tile of whole rows if anything is rounded to 8 bits beside codes, and the registers hold such rows."""
    if not all(t is None or t.is_contiguous() for t in results):
        return None
    return _row_tile(inputs, roundings, codes=True)


def _row_tile(
    inputs: tuple[Tensor | None, ...], roundings: tuple[Rounding | None, ...], *, codes: bool = False
) -> launch.RowTile | None:
    """Return the tile of whole rows if anything is rounded to 8 bits and the registers can hold such rows."""
    first = inputs[0]
    if first is None or not any(roundings) or first.numel() == 0:
        return None
    n_inputs = sum(t is not None for t in inputs)
    where = (first.shape[-1], first.element_size(), first.device)
    return launch.activation_tile(*where, n_inputs=n_inputs, codes=codes)


def _round_after(results: tuple[Tensor | None, ...], roundings: tuple[Rounding | None, ...]) -> None:
    for result, rounding in zip(results, roundings, strict=True):
        if result is not None and rounding is not None:
            rounding.after(result.view(rounding.rows.values.shape))


def _launch_rows(
    kernel: Any,
    tile: launch.RowTile,
    inputs: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    **constants: Any,
) -> None:
    """Launch a kernel of whole rows. The results that are not in 8 bits are contiguous."""
    rows = [None if t is None else _unit_columns(t.reshape(-1, t.shape[-1])) for t in inputs]
    first = rows[0]
    assert first is not None
    (n_rows, n_cols), strides = first.shape, (0 if t is None else t.stride(0) for t in rows)
    constants |= {"N_COLS": n_cols, **launch.row_options(tile)}
    with launch.on_device(first.device):
        kernel[(triton.cdiv(n_rows, tile.rows),)](*rows, *results, n_rows, *strides, **constants)


def _launch(
    kernel: Any, inputs: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...], kind: ActivationKind
) -> None:
    """Launch a kernel. All tensors have the same shape, and the results have contiguous columns."""
    given = [t for t in (*inputs, *results) if t is not None]
    if given[0].numel() == 0:
        return
    flat = all(t.is_contiguous() for t in given)
    shape = (1, -1) if flat else (-1, given[0].shape[-1])
    rows = [t if t is None else t.view(shape) if flat else _unit_columns(t.reshape(shape)) for t in inputs]
    rows += [t if t is None else t.view(shape) for t in results]
    n_rows, n_cols = next(t.shape for t in rows if t is not None)
    block = launch.elementwise_block(given[0].element_size())
    blocks_a_row = triton.cdiv(n_cols, block.cols)
    vector = 16 // given[0].element_size()
    # A single row needs no stride. Triton treats 0 as a multiple of 16, so pass 0.
    strides = (0 if t is None or flat else t.stride(0) for t in rows)
    options = {
        "KIND": kind,
        "BLOCK": block.cols,
        "VECTOR": 1 if n_cols % vector else vector,
        "num_warps": block.warps,
        "enable_fp_fusion": True,
    }
    with launch.on_device(given[0].device):
        kernel[(n_rows * blocks_a_row,)](*rows, n_cols, blocks_a_row, *strides, **options)


def _launch_codes(
    kernel: Any,
    inputs: Sequence[Tensor],
    results: Sequence[Tensor | None],
    codes: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    bits: Bits,
    **constants: Any,
) -> None:
    """Launch a kernel that writes or reads codes, of groups that share a scale if there are scales."""
    first = inputs[0]
    if first.numel() == 0:
        return
    group, n_cols = GROUPS[bits] if scales else GROUPS[8], (first.shape or (1,))[-1]
    given = [t for t in (*inputs, *results, *codes, *scales) if t is not None]
    # One row, if no group or byte crosses the end of a row.
    whole_rows = n_cols % (group if scales else 8 // bits) == 0
    flat = all(t.is_contiguous() for t in given) and (whole_rows or first.numel() == n_cols)
    n_cols = first.numel() if flat else n_cols
    rows: list[Tensor | None] = [_unit_columns(t.reshape(-1, n_cols)) for t in inputs]
    rows += [None if t is None else t.view(-1, n_cols) for t in results]
    kept = [None if t is None else t.contiguous() for t in (*codes, *scales)]
    block = launch.elementwise_block(first.element_size())
    vector, codes_a_row = 16 // first.element_size(), triton.cdiv(n_cols * bits, 8)
    sizes = [n_cols, triton.cdiv(n_cols, block.cols), codes_a_row, *([triton.cdiv(n_cols, group)] if scales else [])]
    # A single row needs no stride. Triton treats 0 as a multiple of 16, so pass 0.
    strides = [0 if t is None or flat else t.stride(0) for t in rows] + [0 if flat else codes_a_row]
    pieces = 2
    options = {
        "BITS": bits,
        "GROUPS": block.cols // pieces // group,
        "GROUP": group,
        "PIECES": pieces,
        "VECTOR": 1 if n_cols % vector else vector,
        "num_warps": block.warps,
        "enable_fp_fusion": True,
    }
    n_rows = first.numel() // n_cols
    with launch.on_device(first.device):
        kernel[(n_rows * sizes[1],)](*rows, *kept, *sizes, *strides, **constants, **options)


def _unit_columns(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
