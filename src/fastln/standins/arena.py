"""A prepared model's hold on the arena for large CPU tensors."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from fastln.machine import install_arena, release_arena
from fastln_kernels.cpu.library import KernelsUnavailableError

logger = logging.getLogger(__name__)


class Arena:
    """One user's hold on the process's arena (`fastln.machine.install_arena`).

    The hold ends with `remove`, or when Python collects this object together with its model. A copied or unpickled
    object holds nothing.
    """

    def __init__(self) -> None:
        self._release: weakref.finalize[[], Arena] | None = None

    def put(self) -> None:
        """Acquire the arena, unless this object already holds it.

        If torch or the system refuses, this logs a warning and torch's allocator stays.
        """
        if self.holds:
            return
        try:
            install_arena()
        except KernelsUnavailableError as error:
            logger.warning("CPU memory: torch's allocator stays (%s)", error)
            return
        self._release = weakref.finalize(self, release_arena)
        self._release.atexit = False  # at exit other threads may still use the memory, and the system frees it anyway

    def remove(self) -> None:
        """Release the arena, if this object holds it."""
        if self._release is not None:
            self._release()

    @property
    def holds(self) -> bool:
        """Whether this object is one of the arena's users."""
        return self._release is not None and self._release.alive

    def __reduce__(self) -> tuple[Any, ...]:
        return Arena, ()
