"""torch's matrix products of blocks, for the compiled kernels.

They are `at::native::cpublas::brgemm`, which torch exports and uses for its own attention. Behind it are oneDNN's
kernels for blocks in the cache, which use the processor's matrix or vector units. The names are not part of torch's
public API, so a torch version may lack them. Then one warning says what runs slower.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from fastln_kernels.cpu import library
from fastln_kernels.cpu.library import DTYPES, KernelsUnavailableError

logger = logging.getLogger("fastln")

LIBRARIES = {"attention": "attention", "linear": "frozen linear layers", "int8": "frozen linear layers in 8 bits"}
"""The libraries that use these products, and what they compute."""

NO_INT8 = "this processor has no 8-bit products with 32-bit sums (AVX-512 VNNI or AMX)"
"""Why the kernels of layers in 8 bits are not available where they compile, and torch has its products."""

# The mangled names of the C++ functions in torch's library.
_BRGEMM_BFLOAT16 = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_BRGEMM_FLOAT32 = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
_BRGEMM_INT8 = "_ZN2at6native7cpublas6brgemmEllllllbPKhPKaPib"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
_NUMBERS = DTYPES | {torch.int8: len(DTYPES)}  # as in dispatch.h


def function(name: str, symbol: str, arguments: Sequence[Any]) -> Callable[..., None]:
    """Return a function from the library of `name`.cpp, which includes `products.h`. See `library.function`.

    Raises:
        KernelsUnavailableError: If the library is not available, or torch's products do not work on this processor.
    """
    usable(name)
    found: Callable[..., None] = library.function(name, symbol, arguments)
    return found


@functools.cache
def why_not(name: str) -> str | None:
    """Say why the functions in the library of `name`.cpp are not available; None if they are."""
    try:
        usable(name)
    except KernelsUnavailableError as error:
        return str(error)
    if name == "int8" and not in_8_bits(name):
        return NO_INT8
    return None


@functools.cache
def _warn(reason: str) -> None:
    """Warn once per process and reason about what runs without these products."""
    logger.warning(
        "%s run on torch's own code, so steps on CPUs are slower: %s",
        " and ".join(LIBRARIES.values()),
        reason,
    )


def usable(name: str) -> frozenset[torch.dtype]:
    """Pass torch's products to the library of `name`.cpp, and return the dtypes whose products work on this processor.

    Raises:
        KernelsUnavailableError: As for `function`.
    """
    return _taken(name) - {torch.int8}


def in_8_bits(name: str) -> bool:
    """Whether products in 8 bits work on this processor, for the library of `name`.cpp.

    They need units that add the products of four numbers in 32 bits: AMX, or AVX-512's VNNI. torch's
    products do not use AVX-VNNI, which laptops without AVX-512 have.

    Raises:
        KernelsUnavailableError: As for `function`.
    """
    return torch.int8 in _taken(name)


@functools.cache
def _taken(name: str) -> frozenset[torch.dtype]:
    flags = (c_int64 * len(_NUMBERS))()
    take = library.function(name, "fastln_take_products", (c_void_p,) * 5)
    reason = None
    try:
        needed = [_address(symbol) for symbol in (_BRGEMM_BFLOAT16, _BRGEMM_FLOAT32, _RELEASE)]
        take(*needed[:2], _address(_BRGEMM_INT8, optional=True), needed[2], flags)
    except (AttributeError, OSError) as error:
        reason = f"torch {torch.__version__} does not export its block products ({error})"
    dtypes = frozenset(dtype for dtype, number in _NUMBERS.items() if flags[number])
    if reason is None and torch.float32 not in dtypes:
        reason = "torch's block products do not work on this processor"
    if reason is not None:
        _warn(reason)
        raise KernelsUnavailableError(reason)
    return dtypes


def _address(name: str, *, optional: bool = False) -> Any:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if optional and not hasattr(library, name):
        return None
    return ctypes.cast(getattr(library, name), c_void_p)
