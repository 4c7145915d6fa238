"""Rotary positions for CPU tensors, computed by the kernel of `rotary.cpp`; `reference_rotary` defines them."""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from fastln_kernels.cpu import native_int8
from fastln_kernels.cpu.heads import Rows
from fastln_kernels.cpu.library import DTYPES, function
from fastln_kernels.cpu.native_int8 import Rounding

ROUNDED_BY = native_int8
"""The module whose `rounding` this function takes."""


class _Arguments(ctypes.Structure):
    """The struct `RotaryArguments` in `rotary.cpp`."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "n_threads", "batches", "heads", "tokens", "dim")),
        *((name, c_int64) for name in ("backward", "cos_batch")),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, Rows) for name in ("x", "y")),
        ("rounding", ctypes.POINTER(Rounding)),
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor, rounding: Rounding | None = None, *, backward: bool = False) -> Tensor:
    """Turn heads by their positions, as `fastln_kernels.reference_rotary.rotary` does, for all dtypes but float64.

    `rounding` says where the result is written in 8 bits too, if anywhere: as rows `(B S, H D)`.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    n_batches, n_heads, n_tokens, dim = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = cos.to(x.dtype).contiguous(), sin.to(x.dtype).contiguous()
    y = x.new_empty(n_batches, n_tokens, n_heads, dim).transpose(1, 2)
    if not y.numel():
        return y
    arguments = _Arguments(
        DTYPES[x.dtype],
        torch.get_num_threads(),
        n_batches,
        n_heads,
        n_tokens,
        dim,
        backward,
        cos.stride(0) if len(cos) > 1 else 0,
        cos.data_ptr(),
        sin.data_ptr(),
        Rows.of(x),
        Rows.of(y),
        None if rounding is None else ctypes.pointer(rounding),
    )
    _kernel()(ctypes.byref(arguments))
    return y


@functools.cache
def _kernel() -> Callable[..., None]:
    return function("rotary", "fastln_rotary", (ctypes.POINTER(_Arguments),))
