"""The arena of large CPU tensors, as something that a prepared model holds and gives back."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from fastln.machine import install_arena, release_arena
from fastln_kernels.cpu.library import KernelsUnavailableError

logger = logging.getLogger(__name__)


class Arena:
    """One user's hold on the process's arena (`fastln.machine.install_arena`).

    It ends with `remove`, or when this object is collected together with the model that it belongs to. A copy, or what
    comes out of a pickle, holds nothing.
    """

    def __init__(self) -> None:
        self._release: weakref.finalize[[], Arena] | None = None

    def put(self) -> None:
        """Take hold of the arena, unless this object holds it already.

        Where torch or the system refuses, a warning says so, and torch's allocator stays.
        """
        if self.holds:
            return
        try:
            install_arena()
        except KernelsUnavailableError as error:
            logger.warning("CPU memory: torch's allocator stays (%s)", error)
            return
        self._release = weakref.finalize(self, release_arena)
        self._release.atexit = False  # the process ends with its memory; other threads may still use it

    def remove(self) -> None:
        """Let go of the arena, if this object holds it."""
        if self._release is not None:
            self._release()

    @property
    def holds(self) -> bool:
        """Whether this object is one of the arena's users."""
        return self._release is not None and self._release.alive

    def __reduce__(self) -> tuple[Any, ...]:
        return Arena, ()
