"""What operations on a CPU allocate and free inside themselves, where that counts beside their results.

`fastln.peak` sees results, not this. The rules come from comparisons of its peaks with what `AllocatorPeak` measures:
`tests/test_peak_accuracy.py` holds them.

- torch's products of 16-bit matrices may sum in a float32 copy of the result, if the processor has no units for that
  dtype. That is tried out once, on small matrices.
- Layers in 8 bits round rows, a byte a number. Rows of a layer's input stay until other rows follow or the input is
  freed; rows of a gradient until the layer has used them. If one of fastln's kernels made the input or the gradient, it
  made these rows with it (`fastln.ops.rounded`).
- The second term of a weight in 8 bits gives a float32 result of its own.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastln_kernels.cpu import memory as allocator
from fastln_kernels.cpu.library import KernelsUnavailableError

_PRODUCTS = ("aten::mm", "aten::addmm")
_DTYPES_IN_16_BITS = (torch.bfloat16, torch.float16)
_REST = 6  # the place of a second term among the arguments of an 8-bit layer


def try_out() -> None:
    """Find out what needs a trial. Call it where no dispatch mode is active."""
    for dtype in _DTYPES_IN_16_BITS:
        _sums_apart(dtype)


@functools.cache
def _sums_apart(dtype: torch.dtype) -> bool:
    """Whether torch's product of matrices of a dtype sums in a float32 copy; False if allocations cannot be counted."""
    try:
        allocator.start_counting()
    except KernelsUnavailableError:
        return False
    try:
        x = torch.ones(64, 64, dtype=dtype, device="cpu")
        torch.mm(x, x)  # whatever is made once
        allocator.reset_peak()
        before = allocator.live_bytes()
        y = torch.mm(x, x)
        return allocator.peak_bytes() - before >= y.nbytes + 4 * y.numel()
    finally:
        allocator.stop_counting()


def inside(name: str, args: tuple[Any, ...], results: Any) -> int:
    """Return the bytes that an operation has for itself while its result exists.

    Args:
        name: Its name, such as "aten::mm".
        args: Its arguments.
        results: What it returned.
    """
    if name in _PRODUCTS and results.dtype in _DTYPES_IN_16_BITS and _sums_apart(results.dtype):
        return 4 * results.numel()
    if name == "fastln::int8_linear" and isinstance(args[_REST], Tensor):
        return 4 * results.numel()
    return 0


def rows_in_8_bits(x: Tensor) -> int:
    """Return the bytes of rows `(..., n_cols)` in 8 bits, with their scales."""
    n_rows, n_cols = math.prod(x.shape[:-1]), x.shape[-1]
    return math.ceil(n_rows / 16) * 16 * math.ceil(n_cols / 64) * 64 + 4 * n_rows
