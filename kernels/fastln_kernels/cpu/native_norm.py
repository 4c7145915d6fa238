"""LayerNorm and RMSNorm for CPU tensors, computed by the compiled kernels of `norm.cpp`.

`fastln_kernels.reference` defines them. Rows may be float32, bfloat16 or float16, with any stride. Arithmetic and
statistics are float32. Rows with non-contiguous columns, and non-contiguous weights and biases, are copied first.
Results do not depend on the number of threads.
"""

import ctypes
import functools
from ctypes import c_bool, c_double, c_int64, c_void_p
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastln_kernels.cpu import native_int8
from fastln_kernels.cpu.library import DTYPES, function
from fastln_kernels.cpu.native_int8 import Rounding
from fastln_kernels.reference import (
    NormAgain,
    NormBackward,
    NormForward,
    NormGradients,
    NormOutputs,
    dropout_threshold,
)
from fastln_kernels.reference_codes import scale_shape

TensorT = TypeVar("TensorT", Tensor, Tensor | None)

_ROWS = (c_void_p, c_int64)  # a tensor of rows and its stride
_PARAMETER = (c_void_p, c_int64)  # a vector and its dtype
_SIZES = (c_int64, c_int64, c_int64, c_int64)  # dtype, threads, rows, columns
_DROPOUT = (c_int64, c_void_p)  # threshold, seed
_ROUNDING = ctypes.POINTER(Rounding)

ROUNDED_BY = native_int8
"""The module whose `rounding` these functions take."""


def norm_forward(request: NormForward, rounding: Rounding | None = None) -> NormOutputs:
    """Normalise each row of `residual + dropout(x)`, then scale and shift it.

    Arguments and results are those of `fastln_kernels.reference.norm_forward`, for float32, bfloat16 and float16.
    Weight and bias may have any dtype. `rounding` says where the result is written in 8 bits too, if anywhere.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    kind = request.kind
    x, residual = _unit_columns(request.x), _unit_columns(request.residual)
    weight, bias = _parameter(request.weight), _parameter(request.bias)
    n_rows, n_cols = x.shape
    y = _rows_like(x)
    stream = _rows_like(x) if request.want_stream else None
    normed = _rows_like(x) if request.want_normed else None
    codes = scale = None
    if request.want_codes:
        assert normed is None
        codes = torch.empty(n_rows, n_cols, dtype=torch.int8, device="cpu")
        scale = torch.empty(scale_shape(x.shape, 8), dtype=torch.float32, device="cpu")
    rstd = torch.empty(n_rows, dtype=torch.float32, device="cpu")
    _forward()(
        DTYPES[x.dtype],
        torch.get_num_threads(),
        n_rows,
        n_cols,
        *_rows(x),
        *_rows(residual),
        *_vector(weight),
        *_vector(bias),
        kind.eps,
        kind.centre,
        kind.offset,
        kind.round_normed,
        dropout_threshold(request.dropout),
        _pointer(request.seed),
        y.data_ptr(),
        _pointer(stream),
        _pointer(normed),
        _pointer(codes),
        rstd.data_ptr(),
        _pointer(scale),
        rounding,
    )
    return NormOutputs(y, stream, normed if codes is None else codes, rstd, scale)


def norm_again(request: NormAgain, rounding: Rounding | None = None) -> Tensor:
    """Return the forward's y from what was kept of it.

    Arguments and results are those of `fastln_kernels.reference.norm_again`. From the input, y has the forward's bits.
    `rounding` says where it is written in 8 bits too, if anywhere.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    saved, kind = request.saved, request.kind
    if not request.saved_is_normed:
        assert request.dtype == saved.dtype
        return norm_forward(NormForward(saved, request.weight, request.bias, kind), rounding).y
    assert saved.dtype == (request.dtype if request.scale is None else torch.int8)
    saved, weight, bias = _unit_columns(saved), _parameter(request.weight), _parameter(request.bias)
    scale = _contiguous(request.scale)
    y = torch.empty(saved.shape, dtype=request.dtype, device="cpu")
    _again()(
        DTYPES[request.dtype],
        torch.get_num_threads(),
        *saved.shape,
        *_rows(saved),
        _pointer(scale),
        *_vector(weight),
        *_vector(bias),
        kind.offset,
        kind.round_normed,
        y.data_ptr(),
        rounding,
    )
    return y


def norm_backward(request: NormBackward, rounding: Rounding | None = None) -> NormGradients:
    """Compute only the requested gradients. The kernel loads and stores nothing for the others.

    Arguments and results are those of `fastln_kernels.reference.norm_backward`. `rounding` says where dx is written in
    8 bits too, if anywhere.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    kind, grad_dtype = request.kind, request.grad_dtype
    dy, saved, dstream = _unit_columns(request.dy), _unit_columns(request.saved), _unit_columns(request.dstream)
    weight, scale = _parameter(request.weight), _contiguous(request.scale if saved is not None else None)
    assert scale is None or request.saved_is_normed
    n_rows, n_cols = dy.shape
    dx = _rows_like(dy) if request.need_dx else None
    dresidual = _rows_like(dy) if request.need_dresidual else None
    sums_dtype = grad_dtype if grad_dtype in DTYPES else torch.float32
    dweight = torch.empty(n_cols, dtype=sums_dtype, device="cpu") if request.need_dweight else None
    dbias = torch.empty(n_cols, dtype=sums_dtype, device="cpu") if request.need_dbias else None
    _backward()(
        DTYPES[dy.dtype],
        torch.get_num_threads(),
        n_rows,
        n_cols,
        *_rows(dy),
        *_rows(saved),
        *_rows(dstream),
        *_vector(weight),
        _pointer(request.rstd),
        _pointer(scale),
        kind.centre,
        kind.offset,
        kind.round_normed,
        request.saved_is_normed,
        dropout_threshold(request.dropout) if request.need_dx else 0,
        _pointer(request.seed),
        _pointer(dx),
        _pointer(dresidual),
        _pointer(dweight),
        _pointer(dbias),
        DTYPES[sums_dtype],
        rounding,
    )
    if sums_dtype != grad_dtype:
        dweight, dbias = (None if sums is None else sums.to(grad_dtype) for sums in (dweight, dbias))
    return NormGradients(dx, dresidual, dweight, dbias)


@functools.cache
def _forward() -> Any:
    kind = (c_double, c_bool, c_double, c_bool)
    arguments = (*_SIZES, *_ROWS, *_ROWS, *_PARAMETER, *_PARAMETER, *kind, *_DROPOUT, *(c_void_p,) * 6, _ROUNDING)
    return function("norm", "fastln_norm_forward", arguments)


@functools.cache
def _backward() -> Any:
    kind = (c_bool, c_double, c_bool, c_bool)
    rows = _ROWS * 3
    arguments = (
        *_SIZES,
        *rows,
        *_PARAMETER,
        c_void_p,
        c_void_p,
        *kind,
        *_DROPOUT,
        *(c_void_p,) * 4,
        c_int64,
        _ROUNDING,
    )
    return function("norm", "fastln_norm_backward", arguments)


@functools.cache
def _again() -> Any:
    arguments = (*_SIZES, *_ROWS, c_void_p, *_PARAMETER, *_PARAMETER, c_double, c_bool, c_void_p, _ROUNDING)
    return function("norm", "fastln_norm_again", arguments)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _vector(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def _rows_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _unit_columns(x: TensorT) -> TensorT:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _parameter(parameter: Tensor | None) -> Tensor | None:
    if parameter is None:
        return None
    if parameter.dtype not in DTYPES:
        parameter = parameter.to(torch.float32)
    return parameter.contiguous()
