"""Linear layers for CPU tensors, computed by the compiled kernel of `linear.cpp`, which keeps no copy of a weight."""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from fastln_kernels.cpu import products, units
from fastln_kernels.cpu.library import DTYPES

MULTIPLE = 16
"""The kernel takes weights whose rows are a multiple of this long."""

_ROW_DTYPES = (torch.float32, torch.bfloat16)
_ROWS = 32  # with fewer rows, packing the weight does not pay


class _Arguments(ctypes.Structure):
    """The struct `Arguments` in `linear.cpp`."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "parameter_dtype", "compute_dtype", "n_threads")),
        *((name, c_int64) for name in ("n_rows", "n_inner", "n_cols", "transpose")),
        *((name, c_void_p) for name in ("x", "weight", "bias", "y")),
        *((name, c_int64) for name in ("x_stride", "weight_stride")),
    )


def has_own(x: Tensor, weight: Tensor, bias: Tensor | None, *, transpose: bool = True) -> bool:
    """Whether the kernel supports these tensors and is faster than torch.

    Args:
        x: The rows, (..., n_inner).
        weight: As for `linear`.
        bias: As for `linear`.
        transpose: As for `linear`.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    if not x.ndim or weight.ndim != 2:
        return False
    n_cols, n_inner = weight.shape if transpose else reversed(weight.shape)
    return (
        x.shape[-1] == n_inner
        and min(n_inner, n_cols) >= MULTIPLE
        and weight.shape[1] % MULTIPLE == 0
        and (weight.shape[0] % MULTIPLE == 0 or units.compute_dtype(x.dtype) != x.dtype)  # else torch is as fast
        and x.numel() >= _ROWS * n_inner
        and weight.dtype in (x.dtype, torch.float32)
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == weight.dtype and bias.shape == (n_cols,) and bias.is_contiguous()))
        and x.dtype in _ROW_DTYPES
        and bool(torch.backends.mkldnn.enabled)  # otherwise torch refuses the products
        and units.compute_dtype(x.dtype) in products.usable("linear")
        and (x.dtype != torch.float32 or units.float32_pays(linear))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transpose: bool = True) -> Tensor:
    """Compute `fastln_kernels.reference.linear`, summed in float32 and rounded once.

    bfloat16 is multiplied in the units that are faster on this machine (`units.compute_dtype`).

    Args:
        x: `(n_rows, n_inner)`, float32 or bfloat16.
        weight: `(n_cols, n_inner)`, or `(n_inner, n_cols)` if `transpose` is False; contiguous, its rows a multiple of
            16 long. Its dtype is that of `x`, or float32, which is then rounded to the dtype of `x`.
        bias: `(n_cols,)`, contiguous, in the dtype of `weight`, or None.
        transpose: Whether the rows of `weight` belong to the columns of the result.

    Returns:
        `(n_rows, n_cols)`, contiguous.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    (n_rows, n_inner), n_cols = x.shape, weight.shape[0 if transpose else 1]
    y = x.new_empty(n_rows, n_cols)
    if not n_rows:
        return y
    if x.stride(1) != 1 or x.stride(0) < n_inner:
        x = x.contiguous()
    arguments = _Arguments(
        dtype=DTYPES[x.dtype],
        parameter_dtype=DTYPES[weight.dtype],
        compute_dtype=DTYPES[units.compute_dtype(x.dtype)],
        n_threads=torch.get_num_threads(),
        n_rows=n_rows,
        n_inner=n_inner,
        n_cols=n_cols,
        transpose=transpose,
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        x_stride=x.stride(0),
        weight_stride=weight.stride(0),
    )
    _kernel()(ctypes.byref(arguments))
    return y


@functools.cache
def _kernel() -> Callable[..., None]:
    return products.function("linear", "fastln_linear", (ctypes.POINTER(_Arguments),))
