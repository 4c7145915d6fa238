"""The memory of large CPU tensors: kept by the process for the next step while a prepared model is there."""

from __future__ import annotations

from dataclasses import dataclass

from fastln.machine import keep_pages


@dataclass
class Arena:
    """Has torch allocate large CPU tensors in memory that is kept when they are freed."""

    def put(self) -> None:
        """Begin."""
        keep_pages()

    def remove(self) -> None:
        """Nothing is given back yet."""
