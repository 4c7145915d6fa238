"""Attention modules whose stock code turns queries and keys by fastln's operation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastln import ops
from fastln.ops import OpSettings
from fastln.ops.rotary import why_not
from fastln.standins.part import StandIn, form

logger = logging.getLogger(__name__)

_BY_DEFAULT = {"unsqueeze_dim": 1}
"""What some models (ModernBERT) pass though it is the default of all these functions: heads come before tokens."""


@form
class Rotary(StandIn):
    """An attention module of any stock class that calls a function like transformers' `apply_rotary_pos_emb`.

    The stock code runs unchanged, but its calls of that one function run `fastln.ops.rotary`. `kind` is the `Turning`
    that holds this code.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stock module returns."""
        return self._fastln.kind.forward(self, *args, **kwargs)


@dataclass(frozen=True)
class Turning:
    """The forward of a class as a copy that finds another function under one global name.

    The module that defines the class does not change: other models use it, too. The copy has its other global names as
    they were when it was made.

    Attributes:
        stock: The class.
        name: The name by which its forward calls the function.
        settings: How the operation runs.
        forward: The copy.
    """

    stock: type[nn.Module]
    name: str
    settings: OpSettings
    forward: Callable[..., Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        forward = self.stock.forward
        assert isinstance(forward, FunctionType)
        versions = tuple(map(id, forward.__globals__.values()))
        object.__setattr__(self, "forward", _copied(forward, self.name, self.settings, versions))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the code."""
        return Turning, (self.stock, self.name, self.settings)


@functools.cache
def _copied(forward: FunctionType, name: str, settings: OpSettings, versions: tuple[int, ...]) -> Callable[..., Any]:
    """Return the copy: one for all layers, so that compilers meet one, but another after somebody patched a name.

    Args:
        forward: What is copied.
        name: The global name under which the copy finds fastln's function.
        settings: How that runs.
        versions: The ids of its globals. The copy keeps them alive, so that none is used again.
    """
    names = dict(forward.__globals__)
    names[name] = _turning(names[name], forward.__qualname__, settings)
    del names["__name__"]  # compilers would look names up in the module that has this name
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _turning(stock: Callable[..., Any], owner: str, settings: OpSettings) -> Callable[..., Any]:
    """Return a function that turns queries and keys as `stock` does, and leaves to it what fastln's does not take."""

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = not args and kwargs in ({}, _BY_DEFAULT)
        reason = why_not(q, cos, sin) or why_not(k, cos, sin) if known else "it passes other arguments, too"
        if reason is not None:
            if not torch.compiler.is_compiling():
                _tell(owner, reason)
            return stock(q, k, cos, sin, *args, **kwargs)
        return ops.rotary(q, cos, sin, settings=settings), ops.rotary(k, cos, sin, settings=settings)

    return turn


_told: set[str] = set()


def _tell(owner: str, reason: str) -> None:
    """Say so once for a class's code, not for every shape."""
    if owner not in _told:
        _told.add(owner)
        logger.info("%s: rotary positions run stock code: %s", owner, reason)
