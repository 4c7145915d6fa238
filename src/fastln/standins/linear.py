"""Linear layers with a frozen weight, for devices where fastln is faster than torch."""

from __future__ import annotations

import torch
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


@form
class Patches(StandIn):
    """A convolution whose patches do not overlap, with a frozen weight: a linear layer of the patches.

    Where bfloat16 numbers are multiplied in units for float32, `fastln.ops.linear` does so, and torch's convolutions do
    not. In other dtypes the stock code runs.
    """

    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        """Return what the stock module returns for `input` (batch, channels, *sizes)."""
        n = len(self.kernel_size)
        if self._dtype_of(input) != torch.bfloat16 or input.ndim != n + 2:
            return super().forward(input)
        counts = [size // width for size, width in zip(input.shape[2:], self.kernel_size, strict=True)]
        inside = input
        for dim, (count, width) in enumerate(zip(counts, self.kernel_size, strict=True), start=2):
            inside = inside.narrow(dim, 0, count * width)  # without the rest, as convolutions leave it out
        split = [size for pair in zip(counts, self.kernel_size, strict=True) for size in pair]
        places, pixels = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
        patches = inside.reshape(*input.shape[:2], *split).permute(0, *places, 1, *pixels).flatten(n + 1)
        return ops.linear(patches, self.weight.flatten(1), self.bias, settings=self._fastln.settings).movedim(-1, 1)

    def _dtype_of(self, input: Tensor) -> torch.dtype:
        autocasts = torch.is_autocast_enabled(input.device.type)
        return torch.get_autocast_dtype(input.device.type) if autocasts else input.dtype
