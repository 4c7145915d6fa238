"""Products of blocks, for compiled kernels that want them: torch's own.

`at::native::cpublas::brgemm`, which torch exports and its own attention is made of: oneDNN's kernels for blocks in the
cache, made for the processor's matrix or vector units.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from fastln_kernels.cpu import library
from fastln_kernels.cpu.library import DTYPES, KernelsUnavailableError

# The names that the C++ functions have in torch's library.
_BRGEMM_BFLOAT16 = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_BRGEMM_FLOAT32 = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"


def function(name: str, symbol: str, arguments: Sequence[Any]) -> Callable[..., None]:
    """Return a function of the library made of `name`.cpp, which includes `products.h`; see `library.function`.

    Raises:
        KernelsUnavailableError: If there is no library, or torch's products do not work on this processor.
    """
    usable(name)
    found: Callable[..., None] = library.function(name, symbol, arguments)
    return found


@functools.cache
def why_not(name: str) -> str | None:
    """Say why the functions of the library made of `name`.cpp cannot be had; None where they can."""
    try:
        usable(name)
    except KernelsUnavailableError as error:
        return str(error)
    return None


@functools.cache
def usable(name: str) -> frozenset[torch.dtype]:
    """Give the library made of `name`.cpp torch's products, and return the dtypes whose products this processor has.

    Raises:
        KernelsUnavailableError: As `function`.
    """
    flags = (c_int64 * len(DTYPES))()
    take = library.function(name, "fastln_take_products", (c_void_p, c_void_p, c_void_p, c_void_p))
    try:
        addresses = [_address(symbol) for symbol in (_BRGEMM_BFLOAT16, _BRGEMM_FLOAT32, _RELEASE)]
    except (AttributeError, OSError) as error:
        raise KernelsUnavailableError(f"torch {torch.__version__} exports no products of blocks ({error})") from error
    take(*addresses, flags)
    dtypes = frozenset(dtype for dtype, number in DTYPES.items() if flags[number])
    if torch.float32 not in dtypes:
        raise KernelsUnavailableError("torch's products of blocks do not work on this processor")
    return dtypes


def _address(name: str) -> Any:
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), c_void_p)
