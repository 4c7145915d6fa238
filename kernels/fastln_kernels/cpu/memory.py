"""Memory for large CPU tensors, in an arena of their own that keeps its pages (`memory.cpp`)."""

import ctypes
import functools
import sys

from fastln_kernels.cpu import library
from fastln_kernels.cpu.library import KernelsUnavailableError


@functools.cache
def keep() -> None:
    """Have torch allocate large CPU tensors, from now on and in the whole process, in memory that is kept when freed.

    Tensors that exist already stay where they are.

    Raises:
        KernelsUnavailableError: If this is not Linux, or as `library.load`, or torch or the system refuses.
    """
    if sys.platform != "linux":
        raise KernelsUnavailableError(f"the arena is written for Linux, and this is {sys.platform}")
    install = library.load("memory", with_torch=True).fastln_keep_memory
    install.argtypes, install.restype = [], ctypes.c_char_p
    if refusal := install():
        raise KernelsUnavailableError(refusal.decode())
