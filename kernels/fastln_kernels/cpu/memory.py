"""An arena for large CPU tensors that keeps its pages (`memory.cpp`).

A user of the arena calls `install`, and `release` when done. The first user replaces torch's CPU allocator in the whole
process. The last one puts it back.
"""

import ctypes
import functools
import sys
from typing import Any

from fastln_kernels.cpu import library
from fastln_kernels.cpu.library import KernelsUnavailableError

MIN_BYTES = 64 << 20
"""The smallest useful arena: one growth step."""


def why_not() -> str | None:
    """Say why `install` would fail; None if it would not. This changes nothing, but it may compile the library."""
    if sys.platform != "linux":
        return f"the arena works only on Linux, and this is {sys.platform}"
    if reason := library.why_not("memory"):
        return reason
    obstacle = _library().fastln_arena_obstacle()
    return obstacle.decode() if obstacle else None


def install(n_bytes: int) -> int:
    """Add a user. From the first user on, torch allocates large CPU tensors in the arena, in the whole process.

    Existing tensors stay where they are.

    Args:
        n_bytes: Maximum size of the arena. Further users share the first user's arena.

    Returns:
        The maximum size of the arena in bytes, or 0 if it already had a user.

    Raises:
        KernelsUnavailableError: If this is not Linux, the library is not available, or torch or the system refuses.
    """
    if reason := why_not():
        raise KernelsUnavailableError(reason)
    reserved = ctypes.c_size_t()
    refusal = _library().fastln_install_arena(n_bytes, ctypes.byref(reserved))
    if refusal:
        raise KernelsUnavailableError(refusal.decode())
    return reserved.value


def release() -> None:
    """Remove a user. After the last one, torch's own allocator is back.

    Free pages then go back to the system immediately. Tensors in the arena stay valid. Each returns its pages when it
    is freed, and the last one also returns the arena's address range.

    Raises:
        RuntimeError: If there is no user.
    """
    if users() == 0:
        raise RuntimeError("memory.release() without memory.install()")
    _library().fastln_release_arena()


def users() -> int:
    """Return how many users the arena has. While there are none, torch uses its own allocator."""
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
