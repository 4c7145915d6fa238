"""Frozen linear layers in 8 bits for CPU tensors, computed by `int8.cpp`; `fastln_kernels.reference_int8` defines them.

Rows may be float32, bfloat16 or float16. Sums are whole numbers, so results do not depend on the number of threads.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from fastln_kernels.cpu import products
from fastln_kernels.cpu.library import DTYPES
from fastln_kernels.reference_int8 import LARGEST, TURNED, Weight8

_ROWS = 16  # a multiple of so many rows is multiplied; the rows behind the last are never read back
MOST_INNER = 2**16
"""The most inner columns: sums of more could exceed 32 bits."""


class StoredRows(NamedTuple):
    """Rows in 8 bits, as the processor's products take them.

    Attributes:
        values: `(n_rows rounded up, n_cols rounded up to 64)`, uint8: the whole numbers plus 128.
        scale: `(n_rows,)`, float32; NaN for a row that held NaN or Inf.
        n_cols: The number of columns.
    """

    values: Tensor
    scale: Tensor
    n_cols: int


class Rounding(ctypes.Structure):
    """The struct `Rounding` in `int8.h`: where a kernel writes the rows that it makes in 8 bits too."""

    _fields_ = (
        *((name, c_int64) for name in ("n_cols", "n_padded", "turned")),
        *((name, c_void_p) for name in ("factors", "values", "scale")),
    )


class _Quantise(ctypes.Structure):
    """The struct `Quantise` in `int8.cpp`."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "n_threads", "n_rows", "n_cols", "n_padded", "turned", "x_stride")),
        *((name, c_void_p) for name in ("x", "factors", "values", "scale", "rest_values", "rest_scale")),
    )


class _Product(ctypes.Structure):
    """The struct `Product8Arguments` in `int8.cpp`."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "n_threads", "n_rows", "n_padded", "n_weight_rows", "n_weight_cols")),
        *((name, c_int64) for name in ("backward", "turned", "bias_dtype")),
        *((name, c_void_p) for name in ("rows", "row_scale", "weight", "sums", "col_scale", "bias", "addend", "y")),
    )


def quantise(x: Tensor, factors: Tensor | None = None, *, turned: bool = False) -> StoredRows:
    """Compute `reference_int8.quantise`, bit for bit.

    Args:
        x: `(n_rows, n_cols)`, float32, bfloat16 or float16.
        factors: `(n_cols,)`, float32, contiguous, or None.
        turned: Whether to turn the rows; `n_cols` is then a multiple of 64.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    return _quantise(x, factors, turned, None)


def quantise_twice(x: Tensor, factors: Tensor) -> tuple[StoredRows, StoredRows]:
    """Compute `reference_int8.quantise_twice`: rows in 8 bits, and what they leave over in 8 bits more.

    Args:
        x, factors: As for `quantise`.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    rest = _empty(*x.shape)
    return _quantise(x, factors, False, rest), rest


def quantise_into(rounding: Rounding, x: Tensor) -> None:
    """Round rows in a pass of their own, where a kernel that was told to round them did not run.

    Args:
        rounding: From `rounding`.
        x: As for `quantise`, of the shape that `rounding` was made for.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    factors, rows = rounding.tensors
    _quantise(x, factors, bool(rounding.turned), None, rows)


def _quantise(
    x: Tensor, factors: Tensor | None, turned: bool, rest: StoredRows | None, rows: StoredRows | None = None
) -> StoredRows:
    n_rows, n_cols = x.shape
    if x.stride(1) != 1 and n_cols > 1:
        x = x.contiguous()
    rows = _empty(n_rows, n_cols) if rows is None else rows
    values, scale, _ = rows
    if n_rows:
        arguments = _Quantise(
            DTYPES[x.dtype],
            torch.get_num_threads(),
            n_rows,
            n_cols,
            values.shape[1],
            turned,
            x.stride(0),
            x.data_ptr(),
            None if factors is None else factors.data_ptr(),
            values.data_ptr(),
            scale.data_ptr(),
            None if rest is None else rest.values.data_ptr(),
            None if rest is None else rest.scale.data_ptr(),
        )
        _kernel("fastln_quantise", _Quantise)(ctypes.byref(arguments))
    return rows


def rounding(like: Tensor, factors: Tensor | None = None, *, turned: bool = False) -> tuple[StoredRows, Rounding]:
    """Return memory for rows in 8 bits, and what tells a kernel that makes the rows to write them there.

    Args:
        like: A tensor shaped like the rows, `(..., n_cols)`.
        factors, turned: As for `quantise`, whose result the kernel writes bit for bit.
    """
    n_cols = like.shape[-1]
    rows = _empty(like.numel() // max(n_cols, 1), n_cols)
    pointers = (None if factors is None else factors.data_ptr(), rows.values.data_ptr(), rows.scale.data_ptr())
    made = Rounding(n_cols, rows.values.shape[1], turned, *pointers)
    made.tensors = (factors, rows)  # they live as long as the pointers
    return rows, made


def _empty(n_rows: int, n_cols: int) -> StoredRows:
    n_padded = max(-(-n_cols // TURNED), 1) * TURNED
    values = torch.empty(-(-n_rows // _ROWS) * _ROWS, n_padded, dtype=torch.uint8, device="cpu")
    return StoredRows(values, torch.empty(n_rows, dtype=torch.float32, device="cpu"), n_cols)


def quantise_weight(weight: Tensor, *, turned: bool = False) -> Weight8:
    """Compute `reference_int8.quantise_weight`, bit for bit.

    Args:
        weight: `(n_cols, n_inner)`, float32, bfloat16 or float16.
        turned: As for `quantise`.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    rows = quantise(weight, turned=turned)
    # 128 less, which flips the top bit.
    values = rows.values.bitwise_xor_(LARGEST + 1).view(torch.int8)[: len(weight), : rows.n_cols].contiguous()
    return Weight8.of(values, rows.scale, turned)


def linear(
    rows: StoredRows, weight: Weight8, bias: Tensor | None, dtype: torch.dtype, rest: Weight8 | None = None
) -> Tensor:
    """Compute `reference_int8.linear`.

    Args:
        rows: What `quantise` returned for rows `(n_rows, n_inner)`.
        weight: `(n_cols, n_inner)`, contiguous, of at most `MOST_INNER` inner columns.
        bias: `(n_cols,)`, float32, bfloat16 or float16, contiguous, or None.
        dtype: float32, bfloat16 or float16.
        rest: The weight's second term, like `weight`, or None.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    addend = None if rest is None else _product(rows, rest, torch.float32)
    return _product(rows, weight, dtype, bias=bias, addend=addend)


def linear_backward(rows: StoredRows, weight: Weight8, dtype: torch.dtype) -> Tensor:
    """Compute `reference_int8.linear_backward`.

    Args:
        rows: What `quantise` returned for `dy` `(n_rows, n_cols)` with `weight.scale` as factors.
        weight: As for `linear`, of at most `MOST_INNER` columns.
        dtype: As for `linear`.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    return _product(rows, weight, dtype, backward=True)


def _product(
    rows: StoredRows,
    weight: Weight8,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    backward: bool = False,
) -> Tensor:
    values, scale, turned, row_sums, col_sums = weight
    stored, row_scale, _ = rows
    n_rows, (n_weight_rows, n_weight_cols) = row_scale.shape[0], values.shape
    y = torch.empty(n_rows, n_weight_cols if backward else n_weight_rows, dtype=dtype, device="cpu")
    if not y.numel():
        return y
    arguments = _Product(  # in the order of the fields; keywords cost as much time again
        DTYPES[dtype],
        torch.get_num_threads(),
        n_rows,
        stored.shape[1],
        n_weight_rows,
        n_weight_cols,
        backward,
        backward and turned,
        0 if bias is None else DTYPES[bias.dtype],
        stored.data_ptr(),
        row_scale.data_ptr(),
        values.data_ptr(),
        (col_sums if backward else row_sums).data_ptr(),
        None if backward else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if addend is None else addend.data_ptr(),
        y.data_ptr(),
    )
    _kernel("fastln_int8_product", _Product)(ctypes.byref(arguments))
    return y


@functools.cache
def _kernel(symbol: str, arguments: type[ctypes.Structure]) -> Callable[..., None]:
    return products.function("int8", symbol, (ctypes.POINTER(arguments),))
