"""Dropout for CPU tensors, computed by the kernel of `dropout.cpp`; `fastln_kernels.reference.dropout` defines it."""

import ctypes
import functools
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from fastln_kernels.cpu import native_int8
from fastln_kernels.cpu.library import DTYPES, function
from fastln_kernels.cpu.native_int8 import Rounding
from fastln_kernels.reference import dropout_threshold

ROUNDED_BY = native_int8
"""The module whose `rounding` this function takes."""


def dropout(x: Tensor, dropout: float, seed: Tensor, rounding: Rounding | None = None) -> Tensor:
    """Return `x` with dropout applied, as `fastln_kernels.reference.dropout` does, for all dtypes but float64.

    `rounding` says where the result is written in 8 bits too, if anywhere.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    n_rows, n_cols = x.shape
    x = x if x.stride(1) == 1 or n_cols == 1 else x.contiguous()
    y = x.new_empty((n_rows, n_cols))
    _kernel()(
        DTYPES[x.dtype],
        torch.get_num_threads(),
        n_rows,
        n_cols,
        x.data_ptr(),
        x.stride(0),
        dropout_threshold(dropout),
        seed.data_ptr(),
        y.data_ptr(),
        rounding,
    )
    return y


@functools.cache
def _kernel() -> Any:
    rows, rounding = (c_void_p, c_int64), ctypes.POINTER(Rounding)
    return function("dropout", "fastln_dropout", (*(c_int64,) * 4, *rows, c_int64, c_void_p, c_void_p, rounding))
