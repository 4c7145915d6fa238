"""Activations that store one tensor for backward."""

from __future__ import annotations

from torch import Tensor

from fastln import ops
from fastln.standins.part import StandIn, form


@form
class Activation(StandIn):
    """An activation, computed by `fastln.ops.activation`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation to `input`, of any shape."""
        part = self._fastln
        return ops.activation(input, part.kind, settings=part.settings, reader=part.reader)
