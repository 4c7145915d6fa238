"""Linear layers with a frozen weight, for devices where fastln is faster than torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastln import ops
from fastln.standins.part import StandIn, form
from fastln_kernels.cpu.native_linear import MULTIPLE


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
    not.
    """

    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        """Return what the stock module returns for `input` (batch, channels, *sizes)."""
        n, widths = len(self.kernel_size), self.kernel_size
        counts = [size // width for size, width in zip(input.shape[2:], widths, strict=False)]
        if input.ndim != n + 2 or not all(counts):
            return super().forward(input)
        inside = input
        for dim, (count, width) in enumerate(zip(counts, widths, strict=True), start=2):
            inside = inside.narrow(dim, 0, count * width)  # without the rest, as convolutions leave it out
        split = [size for pair in zip(counts, widths, strict=True) for size in pair]
        places, pixels = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
        patches = inside.reshape(*input.shape[:2], *split).permute(0, *places, 1, *pixels).flatten(n + 1)
        rest = (0, -patches.shape[-1] % MULTIPLE)  # zeros: patches of 14 pixels have 588 columns
        patches, weight = functional.pad(patches, rest), functional.pad(self.weight.flatten(1), rest)
        return ops.linear(patches, weight, self.bias, settings=self._fastln.settings).movedim(-1, 1)
