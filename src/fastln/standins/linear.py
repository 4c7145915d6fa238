"""Linear layers with a frozen weight, for devices where fastln is faster than torch."""

from __future__ import annotations

from torch import Tensor

from fastln import ops
from fastln.standins.part import StandIn, form


@form
class Linear(StandIn):
    """`torch.nn.Linear` with a frozen weight, computed by `fastln.ops.linear`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return what the stock module returns for `input` (..., in_features)."""
        return ops.linear(input, self.weight, self.bias, settings=self._fastln.settings)


@form
class Conv1D(StandIn):
    """GPT-2's linear layer with a frozen weight (in_features, out_features), computed by `fastln.ops.linear`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the stock module returns for `x` (..., in_features)."""
        return ops.linear(x, self.weight, self.bias, transpose=False, settings=self._fastln.settings)
