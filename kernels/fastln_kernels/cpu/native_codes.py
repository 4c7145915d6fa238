"""Codes of activations for CPU tensors, written and read by the compiled kernels of `activation_codes.cpp`.

`fastln_kernels.reference_activation` and `reference_codes` define them. What `native_activation` says about dtypes and
strides holds here, too. Codes are contiguous.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastln_kernels.cpu.library import DTYPES, function
from fastln_kernels.cpu.native_int8 import Rounding
from fastln_kernels.reference_activation import ACTIVATION_KINDS, ActivationKind
from fastln_kernels.reference_codes import (
    LEVELS,
    SLOPE_STEPS,
    Bits,
    GatedBits,
    GatedCodes,
    code_shape,
    scale_shape,
    thresholds,
)

TensorT = TypeVar("TensorT", Tensor, Tensor | None)

_KINDS = {kind: number for number, kind in enumerate(ACTIVATION_KINDS)}
_SIZES = (c_int64, c_int64, c_int64, c_int64)  # dtype, threads, rows, columns
_ROWS = (c_void_p, c_int64)  # a tensor of rows and its stride
_ROUNDING = ctypes.POINTER(Rounding)


class Groups(ctypes.Structure):
    """The codes of one factor and their scales, as `Groups` in `activation_codes.cpp`: addresses and strides."""

    _fields_ = (("codes", c_void_p), ("stride", c_int64), ("scale", c_void_p), ("scale_stride", c_int64))


_GROUPS = (ctypes.POINTER(Groups),) * 2


def activation_forward(
    x: Tensor, kind: ActivationKind, bits: Bits, rounding: Rounding | None = None
) -> tuple[Tensor, Tensor]:
    """Apply an activation and return the codes of its derivative, too.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels. The other three functions raise it too.
    """
    y = x.new_empty(x.shape)
    codes = x.new_empty(code_shape(x.shape, bits), dtype=torch.uint8)
    _derivatives("fastln_activation_encode", x, y, codes, kind, bits, rounding)
    return y, codes


def activation_backward(
    dy: Tensor, codes: Tensor, kind: ActivationKind, bits: Bits, rounding: Rounding | None = None
) -> Tensor:
    """Compute dx from the codes of the derivative."""
    dx = dy.new_empty(dy.shape)
    _derivatives("fastln_activation_decode", dy, dx, codes.contiguous(), kind, bits, rounding)
    return dx


def _derivatives(
    symbol: str, x: Tensor, y: Tensor, codes: Tensor, kind: ActivationKind, bits: Bits, rounding: Rounding | None
) -> None:
    given, result = _rows(x), _rows(y)
    kernel = _function(symbol, (*_SIZES, c_int64, c_int64, c_void_p, *_ROWS * 3, _ROUNDING))
    levels = _levels(kind, bits)
    sizes, bytes_a_row = _sizes(given), code_shape(given.shape, bits)[-1]
    places = (*_place(given), *_place(result), codes.data_ptr(), bytes_a_row)
    kernel(*sizes, _KINDS[kind], bits, levels.data_ptr(), *places, rounding)


def gated_forward(
    gate: Tensor, up: Tensor, kind: ActivationKind, bits: GatedBits, rounding: Rounding | None = None
) -> tuple[Tensor, GatedCodes]:
    """Compute `activation(gate) * up` and return the codes of the factors of its gradients, too."""
    y = gate.new_empty(gate.shape)
    codes, scales = code_shape(gate.shape, bits), scale_shape(gate.shape, bits)
    dtype = torch.int8 if bits == 8 else torch.uint8
    made = GatedCodes(
        gate.new_empty(codes, dtype=dtype),
        gate.new_empty(codes, dtype=dtype),
        gate.new_empty(scales, dtype=torch.float32),
        gate.new_empty(scales, dtype=torch.float32),
    )
    gates, ups = _rows(gate), _rows(up)
    kernel = _function("fastln_gated_encode", (*_SIZES, c_int64, c_int64, *_ROWS * 3, *_GROUPS, _ROUNDING))
    places = (*_place(gates), *_place(ups), *_place(_rows(y)))
    kernel(*_sizes(gates), _KINDS[kind], bits, *places, *_groups(made), rounding)
    return y, made


def gated_backward(
    dy: Tensor,
    codes: GatedCodes,
    results: tuple[Tensor | None, Tensor | None],
    roundings: tuple[Rounding | None, Rounding | None],
) -> None:
    """Write dgate and dup into `results`, whose columns are contiguous, where they are not None."""
    rows = _rows(dy)
    dgate, dup = (None if t is None else t.view(rows.shape) for t in results)
    codes = GatedCodes(*(part.contiguous() for part in codes))
    kernel = _function("fastln_gated_decode", (*_SIZES, c_int64, *_ROWS, *_GROUPS, *_ROWS * 2, _ROUNDING, _ROUNDING))
    kernel(*_sizes(rows), codes.bits, *_place(rows), *_groups(codes), *_place(dgate), *_place(dup), *roundings)


@functools.cache
def _function(symbol: str, arguments: tuple[Any, ...]) -> Any:
    return function("activation_codes", symbol, arguments)


@functools.cache
def _levels(kind: ActivationKind, bits: Bits) -> Tensor:
    """The numbers of the class `Slopes` in `codes.h`, float32."""
    if bits == 8:
        numbers: tuple[float, ...] = SLOPE_STEPS[kind]
    else:
        numbers = (*LEVELS[kind, bits], *thresholds(kind, bits))
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _groups(codes: GatedCodes) -> tuple[Groups, Groups]:
    value, slope, value_scale, slope_scale = (_place(_rows(part)) for part in codes)
    return Groups(*value, *value_scale), Groups(*slope, *slope_scale)


def _rows(x: TensorT) -> TensorT:
    """A tensor as rows `(n_rows, n_cols)` with contiguous columns: the tensor's own memory if it has such."""
    if x is None:
        return x
    n_cols = x.shape[-1] if x.ndim else 1
    rows = x.reshape(x.numel() // max(n_cols, 1), n_cols)
    return rows if rows.stride(1) == 1 or n_cols == 1 else rows.contiguous()


def _sizes(rows: Tensor) -> tuple[int, int, int, int]:
    return DTYPES[rows.dtype], torch.get_num_threads(), rows.shape[0], rows.shape[1]


def _place(rows: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if rows is None else (rows.data_ptr(), rows.stride(0))
