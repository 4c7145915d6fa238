"""Linear layers whose weight is frozen, where fastln has the faster way."""

from __future__ import annotations

from torch import Tensor

from fastln import ops
from fastln.standins.part import StandIn, form


@form
class Linear(StandIn):
    """`torch.nn.Linear` whose weight is frozen, computed by `fastln.ops.linear`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return what the stock module does of `input` (..., in_features)."""
        return ops.linear(input, self.weight, self.bias, settings=self._fastln.settings)


@form
class Conv1D(StandIn):
    """GPT-2's linear layer, whose frozen weight is (in_features, out_features), computed by `fastln.ops.linear`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the stock module does of `x` (..., in_features)."""
        return ops.linear(x, self.weight, self.bias, transpose=False, settings=self._fastln.settings)
