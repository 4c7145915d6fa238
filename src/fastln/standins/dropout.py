"""Dropout that stores no mask: torch's module, and modules that call dropout as a function."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastln import ops
from fastln.ops import OpSettings
from fastln.ops.rounded import Reader
from fastln.standins.part import StandIn, form


@form
class Dropout(StandIn):
    """`torch.nn.Dropout` that stores no mask."""

    p: float
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout to `input`, of any shape, in training."""
        part = self._fastln
        return _dropout(input, self.p, self.training, self.inplace, settings=part.settings, reader=part.reader)


@form
class CallsDropout(StandIn):
    """A module of any stock class that calls `torch.nn.functional.dropout`.

    The stock code runs unchanged, but its calls to dropout run `fastln.ops.dropout`, which stores no mask. Under
    `torch.compile` everything stays in one graph.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stock module returns."""
        with _WithoutMasks(self._fastln.settings, self._fastln.reader):
            return super().forward(*args, **kwargs)


class _WithoutMasks(TorchFunctionMode):
    """A mode that replaces `torch.nn.functional.dropout` by `fastln.ops.dropout`.

    All calls share a reader. Most are summed with the residual; what a linear layer reads is often of another width,
    and only calls of the width that the reader knows are rounded.
    """

    def __init__(self, settings: OpSettings, reader: Reader):
        super().__init__()
        self.settings, self.reader = settings, reader

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            return _dropout(*args, **(kwargs or {}), settings=self.settings, reader=self.reader)
        return func(*args, **(kwargs or {}))


def _dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    settings: OpSettings,
    reader: Reader | None = None,
) -> Tensor:
    """Apply dropout as `torch.nn.functional.dropout` does, but store no mask if it drops some elements and not all."""
    if not training or p in (0, 1) or inplace or not input.ndim:
        return F.dropout(input, p, training, inplace)
    return ops.dropout(input, p, settings=settings, reader=reader)
