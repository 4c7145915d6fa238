"""Activations for CPU tensors, computed by the compiled kernels of `activation.cpp`.

`fastln_kernels.reference_activation` defines them. They take float32, bfloat16 and float16 and compute in float32. If
all tensors are contiguous, they are treated as one row. Otherwise rows may have any stride (gate and up may be two
halves of one tensor), and tensors with non-contiguous columns are copied. Codes come from `native_codes`.
"""

import ctypes
import functools
from ctypes import c_int64, c_void_p
from typing import Any, overload

import torch
from torch import Tensor

from fastln_kernels.cpu import native_codes, native_int8
from fastln_kernels.cpu.library import DTYPES, function
from fastln_kernels.cpu.native_int8 import Rounding
from fastln_kernels.reference_activation import ACTIVATION_KINDS, ActivationKind, GatedGradients
from fastln_kernels.reference_codes import Bits, GatedBits, GatedCodes

_KINDS = {kind: number for number, kind in enumerate(ACTIVATION_KINDS)}
_SIZES = (c_int64, c_int64, c_int64, c_int64, c_int64)  # dtype, threads, rows, columns, kind
_ROWS = (c_void_p, c_int64)  # a tensor of rows and its stride
_ROUNDING = ctypes.POINTER(Rounding)

ROUNDED_BY = native_int8
"""The module whose `rounding` these functions take."""


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

    Raises:
        KernelsUnavailableError: If there are no compiled kernels. The other three functions raise it too.
    """
    if bits is not None:
        return native_codes.activation_forward(x, kind, bits, rounding)
    y = x.new_empty(x.shape)
    _call(_forward(), kind, (x, None), (y,), (rounding,))
    return y


def activation_backward(
    dy: Tensor, saved: Tensor, kind: ActivationKind, rounding: Rounding | None = None, *, bits: Bits | None = None
) -> Tensor:
    """Compute dx."""
    if bits is not None:
        return native_codes.activation_backward(dy, saved, kind, bits, rounding)
    dx = dy.new_empty(dy.shape)
    _call(_backward(), kind, (dy, saved, None), (dx, None), (rounding, None))
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
    gate: Tensor, up: Tensor, kind: ActivationKind, rounding: Rounding | None = None, *, bits: GatedBits | None = None
) -> Tensor | tuple[Tensor, GatedCodes]:
    """Compute `activation(gate) * up`."""
    if bits is not None:
        return native_codes.gated_forward(gate, up, kind, bits, rounding)
    y = gate.new_empty(gate.shape)
    _call(_forward(), kind, (gate, up), (y,), (rounding,))
    return y


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
    if out is None:
        out = GatedGradients(
            dy.new_empty(dy.shape) if need_dgate else None, dy.new_empty(dy.shape) if need_dup else None
        )
    results = (out.dgate if need_dgate else None, out.dup if need_dup else None)
    if isinstance(gate, GatedCodes):
        native_codes.gated_backward(dy, gate, results, (round_dgate, round_dup))
    else:
        _call(_backward(), kind, (dy, gate, up if need_dgate else None), results, (round_dgate, round_dup))
    return out


@functools.cache
def _forward() -> Any:
    return function("activation", "fastln_activation_forward", (*_SIZES, *_ROWS * 3, _ROUNDING))


@functools.cache
def _backward() -> Any:
    return function("activation", "fastln_activation_backward", (*_SIZES, *_ROWS * 5, _ROUNDING, _ROUNDING))


def _call(
    kernel: Any,
    kind: ActivationKind,
    inputs: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    roundings: tuple[Rounding | None, ...],
) -> None:
    """Call a kernel. All tensors have the same shape, and the results have contiguous columns."""
    first = inputs[0]
    assert first is not None
    if not any(roundings) and all(t is None or t.is_contiguous() for t in (*inputs, *results)):
        n_rows, n_cols = 1, first.numel()
        rows = [None if t is None else t.data_ptr() for t in (*inputs, *results)]
        strides = [0] * len(rows)
    else:
        n_rows, n_cols = first.numel() // max(first.shape[-1], 1), first.shape[-1]
        # Copies must live until the kernel has run.
        flat = [t if t is None else _unit_columns(t.reshape(n_rows, n_cols)) for t in inputs]
        flat += [t if t is None else t.view(n_rows, n_cols) for t in results]
        rows = [None if t is None else t.data_ptr() for t in flat]
        strides = [0 if t is None else t.stride(0) for t in flat]
    interleaved = [argument for pair in zip(rows, strides, strict=True) for argument in pair]
    kernel(DTYPES[first.dtype], torch.get_num_threads(), n_rows, n_cols, _KINDS[kind], *interleaved, *roundings)


def _unit_columns(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
