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

LIBRARIES = {"attention": "attention", "linear": "frozen linear layers"}
"""The libraries that use these products, and what they compute."""

# The mangled names of the C++ functions in torch's library.
_BRGEMM_BFLOAT16 = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_BRGEMM_FLOAT32 = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"


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
    return None


@functools.cache
def _warn(reason: str) -> None:
    """Warn once per process and reason about what runs without these products."""
    logger.warning(
        "%s run on torch's own code, so steps on CPUs are slower: %s",
        " and ".join(LIBRARIES.values()),
        reason,
    )


@functools.cache
def usable(name: str) -> frozenset[torch.dtype]:
    """Pass torch's products to the library of `name`.cpp, and return the dtypes whose products work on this processor.

    Raises:
        KernelsUnavailableError: As for `function`.
    """
    flags = (c_int64 * len(DTYPES))()
    take = library.function(name, "fastln_take_products", (c_void_p, c_void_p, c_void_p, c_void_p))
    reason = None
    try:
        take(*[_address(symbol) for symbol in (_BRGEMM_BFLOAT16, _BRGEMM_FLOAT32, _RELEASE)], flags)
    except (AttributeError, OSError) as error:
        reason = f"torch {torch.__version__} does not export its block products ({error})"
    dtypes = frozenset(dtype for dtype, number in DTYPES.items() if flags[number])
    if reason is None and torch.float32 not in dtypes:
        reason = "torch's block products do not work on this processor"
    if reason is not None:
        _warn(reason)
        raise KernelsUnavailableError(reason)
    return dtypes


def _address(name: str) -> Any:
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), c_void_p)
