"""Attention modules whose stock code turns queries and keys by fastln's operation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor

from fastln import ops
from fastln.ops import OpSettings
from fastln.ops.rotary import why_not
from fastln.standins.part import StandIn, form


@form
class Rotary(StandIn):
    """An attention module of any stock class that calls a function like transformers' `apply_rotary_pos_emb`.

    The stock code runs unchanged, but its calls of that one function run `fastln.ops.rotary`. `kind` is the name by
    which it calls the function.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stock module returns."""
        part = self._fastln
        return _forward_of(part.stock.forward, part.kind, part.settings)(self, *args, **kwargs)


@functools.cache
def _forward_of(forward: Callable[..., Any], name: str, settings: OpSettings) -> Callable[..., Any]:
    """Return a copy of a class's forward that finds another function under one global name.

    The module that defines the class does not change: other models use it, too.
    """
    assert isinstance(forward, FunctionType)
    names = dict(forward.__globals__)
    names[name] = _turning(names[name], settings)
    del names["__name__"]  # compilers would look names up in the module that has this name
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _turning(stock: Callable[..., Any], settings: OpSettings) -> Callable[..., Any]:
    """Return a function that turns queries and keys as `stock` does, and leaves to it what fastln's does not take."""

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or why_not(q, cos, sin) is not None or why_not(k, cos, sin) is not None:
            return stock(q, k, cos, sin, *args, **kwargs)
        return ops.rotary(q, cos, sin, settings=settings), ops.rotary(k, cos, sin, settings=settings)

    return turn
