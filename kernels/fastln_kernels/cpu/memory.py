"""An arena for large CPU tensors that keeps its pages, and a count of all that torch allocates (`memory.cpp`).

A user of the arena calls `install`, and `release` when done. The first user replaces torch's CPU allocator in the whole
process. The last one puts it back. `start_counting` and `stop_counting` do the same for the count, with the arena or
without it.
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


def start_counting() -> None:
    """Count from now on what torch allocates on the CPU, in the whole process, until `stop_counting`.

    A tensor that exists already does not count. Sizes are rounded up as the arena or the C library does: to 64 bytes,
    and large tensors without the arena to whole pages.

    Raises:
        KernelsUnavailableError: As for `install`.
    """
    if reason := why_not():
        raise KernelsUnavailableError(reason)
    refusal = _library().fastln_start_counting()
    if refusal:
        raise KernelsUnavailableError(refusal.decode())


def stop_counting() -> None:
    """Undo one `start_counting`. What was counted still is when it is freed."""
    _library().fastln_stop_counting()


def live_bytes() -> int:
    """Return how much of what was counted is not freed."""
    n_bytes: int = _library().fastln_live_bytes()
    return n_bytes


def peak_bytes() -> int:
    """Return the most that `live_bytes` was since `reset_peak`, or since counting began."""
    n_bytes: int = _library().fastln_peak_bytes()
    return n_bytes


def reset_peak() -> None:
    """Let the peak be what lives now."""
    _library().fastln_reset_peak()


@functools.cache
def _library() -> ctypes.CDLL:
    found = library.load("memory")
    signatures: dict[str, tuple[list[Any], Any]] = {
        "fastln_arena_obstacle": ([], ctypes.c_char_p),
        "fastln_arena_users": ([], ctypes.c_size_t),
        "fastln_install_arena": ([ctypes.c_size_t, ctypes.c_void_p], ctypes.c_char_p),
        "fastln_release_arena": ([], None),
        "fastln_start_counting": ([], ctypes.c_char_p),
        "fastln_stop_counting": ([], None),
        "fastln_live_bytes": ([], ctypes.c_int64),
        "fastln_peak_bytes": ([], ctypes.c_int64),
        "fastln_reset_peak": ([], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, result
    return found
