"""Memory for large CPU tensors, in an arena of their own that keeps its pages (`memory.cpp`)."""

import ctypes
import functools
import sys

from fastln_kernels.cpu import library
from fastln_kernels.cpu.library import KernelsUnavailableError


def keep() -> None:
    """Have torch allocate large CPU tensors, from now on and in the whole process, in memory that is kept when freed.

    Tensors that exist already stay where they are.

    Raises:
        KernelsUnavailableError: If this is not Linux, or as `library.load`, or torch or the system refuses.
    """
    if refusal := _refusal():
        raise KernelsUnavailableError(refusal)


@functools.cache  # tried once, also where it is refused
def _refusal() -> str | None:
    if sys.platform != "linux":
        return f"the arena is written for Linux, and this is {sys.platform}"
    try:
        install = library.load("memory", with_torch=True).fastln_keep_memory
    except KernelsUnavailableError as error:
        return str(error)
    install.argtypes, install.restype = [], ctypes.c_char_p
    refusal = install()
    return refusal.decode() if refusal else None
