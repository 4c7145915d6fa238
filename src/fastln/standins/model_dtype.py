"""A model's `dtype` where its first float is a trained norm's, which is float32 now.

The norm comes first, or only layers that are in 8 bits come before it.
"""

from __future__ import annotations

import torch

from fastln.standins.part import StandIn, form


@form
class OwnDtype(StandIn):
    """A transformers model. Its `dtype` is that of its first float, and stays what it was before `prepare`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model had before `prepare`, unless it was cast since."""
        first: torch.dtype = super().dtype  # type: ignore[misc]
        return self._fastln.dtype or first if first == torch.float32 else first
