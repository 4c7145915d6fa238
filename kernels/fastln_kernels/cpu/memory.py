"""Memory for large CPU tensors, in an arena of their own that keeps its pages (`memory.cpp`).

Whoever wants the arena calls `install`, and `release` when done. The first user replaces torch's CPU allocator for the
whole process, the last one puts it back.
"""

import ctypes
import functools
import sys
from typing import Any

from fastln_kernels.cpu import library
from fastln_kernels.cpu.library import KernelsUnavailableError

MIN_BYTES = 64 << 20
"""The smallest arena that is worth it: what it grows by."""


def why_not() -> str | None:
    """Say why `install` would fail; None where it would not. This replaces nothing, but may compile."""
    if sys.platform != "linux":
        return f"the arena works on Linux, and this is {sys.platform}"
    if reason := library.why_not("memory"):
        return reason
    obstacle = _library().fastln_arena_obstacle()
    return obstacle.decode() if obstacle else None


def install(n_bytes: int) -> int:
    """Have torch allocate large CPU tensors in the arena from now on, in the whole process; count one user more.

    Tensors that exist already stay where they are.

    Args:
        n_bytes: How much the arena may hold. Further users share the first one's arena.

    Returns:
        How many bytes the arena may hold, or 0 if it had a user already.

    Raises:
        KernelsUnavailableError: If this is not Linux, there is no compiled code, or torch or the system refuses.
    """
    if reason := why_not():
        raise KernelsUnavailableError(reason)
    reserved = ctypes.c_size_t()
    refusal = _library().fastln_install_arena(n_bytes, ctypes.byref(reserved))
    if refusal:
        raise KernelsUnavailableError(refusal.decode())
    return reserved.value


def release() -> None:
    """Count one user less; after the last one torch's own allocator is back.

    Free pages go back to the system at once. Tensors in the arena live on; each gives its pages back when it is freed,
    and the last one the arena's addresses.

    Raises:
        RuntimeError: If there is no user.
    """
    if users() == 0:
        raise RuntimeError("memory.release() without memory.install()")
    _library().fastln_release_arena()


def users() -> int:
    """How many users the arena has; torch's allocator is its own while there are none."""
    if sys.platform != "linux" or library.why_not("memory"):
        return 0
    count: int = _library().fastln_arena_users()
    return count


@functools.cache
def _library() -> ctypes.CDLL:
    found = library.load("memory")
    signatures: dict[str, tuple[list[Any], Any]] = {
        "fastln_arena_obstacle": ([], ctypes.c_char_p),
        "fastln_arena_users": ([], ctypes.c_size_t),
        "fastln_install_arena": ([ctypes.c_size_t, ctypes.c_void_p], ctypes.c_char_p),
        "fastln_release_arena": ([], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found
