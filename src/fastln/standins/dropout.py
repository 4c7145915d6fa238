"""Dropout that stores no mask: torch's module, and modules whose code calls it as a function."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastln import ops
from fastln.ops import OpSettings
from fastln.standins.part import StandIn, form


@form
class Dropout(StandIn):
    """`torch.nn.Dropout` that stores no mask."""

    p: float
    inplace: bool

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input`, of any shape, in training."""
        return _dropout(input, self.p, self.training, self.inplace, settings=self._fastln.settings)


@form
class CallsDropout(StandIn):
    """A module of any stock class whose code calls `torch.nn.functional.dropout`, which stores no mask then.

    The stock code runs as it is, and under `torch.compile` in the same graph; what it calls `dropout` is fastln's.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stock module does."""
        with _WithoutMasks(self._fastln.settings):
            return super().forward(*args, **kwargs)


class _WithoutMasks(TorchFunctionMode):
    """Inside it `torch.nn.functional.dropout` is `fastln.ops.dropout`."""

    def __init__(self, settings: OpSettings):
        super().__init__()
        self.settings = settings

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            return _dropout(*args, **(kwargs or {}), settings=self.settings)
        return func(*args, **(kwargs or {}))


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, settings: OpSettings
) -> Tensor:
    """`torch.nn.functional.dropout`, with its defaults, without a mask where it drops some elements but not all."""
    if not training or p in (0, 1) or inplace or not input.ndim:
        return F.dropout(input, p, training, inplace)
    return ops.dropout(input, p, settings=settings)
