"""How a module takes on another class while a model is prepared, and gets its own back.

A stock module becomes a stand-in by a change of its class alone, and so stays the object that it was: its parameters,
hooks and attributes live on, whoever holds it. The new class is always a subclass of the stock class, of the same name,
made when it is first needed: `isinstance`, `repr` and the helper methods stay, and `super().forward` is the stock code.

Where a stand-in computes in one what several of its children do, and one of those has hooks, the stock code runs: the
hooks want to be called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastln.ops import OpSettings
from fastln.ops.settings import DEFAULT

ATTRIBUTE = "_fastln"


class Undo(Protocol):
    """What takes a change back. It can be called for a change that was begun and not finished, and twice."""

    def remove(self) -> None:
        """Take the change back."""


@dataclass(frozen=True)
class Part:
    """What a stand-in knows beyond the stock module.

    Attributes:
        stock: The class that it had.
        settings: How its operations run.
        kind: Which norm or activation it computes; None where that needs no saying.
        dtype: Of a trained norm, what its parameters had before; None where they train in that.
    """

    stock: type[nn.Module]
    settings: OpSettings = DEFAULT
    kind: Any = None
    dtype: torch.dtype | None = None


class StandIn(nn.Module):
    """What all stand-ins have in common: each form below gives a `forward` to subclasses of stock classes."""

    _fastln: Part

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by what the class is made of: no module holds it by its name."""
        form = next(base for base in type(self).__mro__ if base.__dict__.get("_is_form"))
        return _new_like, (form, self._fastln.stock), self.__dict__


FormT = TypeVar("FormT", bound=StandIn)
_CLASSES: dict[tuple[type[StandIn], type[nn.Module]], type[StandIn]] = {}


def form(cls: type[FormT]) -> type[FormT]:
    """Mark a class as a form: one that stock classes are given in front of themselves."""
    cls._is_form = True  # type: ignore[attr-defined]
    return cls


def class_of(form: type[FormT], stock: type[nn.Module]) -> type[FormT]:
    """Return the subclass of `stock`, of the same name, whose forward is that of `form`; always the same one."""
    if (form, stock) not in _CLASSES:
        names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
        _CLASSES[form, stock] = type(stock.__name__, (form, stock), names)
    return _CLASSES[form, stock]  # type: ignore[return-value]


def stand_in(
    module: nn.Module,
    form: type[FormT],
    settings: OpSettings = DEFAULT,
    kind: Any = None,
    dtype: torch.dtype | None = None,
) -> FormT:
    """Make `module` a stand-in of this form, in place, and return it."""
    setattr(module, ATTRIBUTE, Part(type(module), settings, kind, dtype))
    module.__class__ = class_of(form, type(module))
    assert isinstance(module, form)
    return module


def is_stand_in(module: nn.Module) -> bool:
    """Whether `module` is a stand-in now."""
    return isinstance(module.__dict__.get(ATTRIBUTE), Part)


def stand_back(model: nn.Module) -> None:
    """Give every stand-in of `model` its own class back, in place."""
    for module in model.modules():
        ClassChange(module).remove()


@dataclass
class ClassChange:
    """Takes back that a module became a stand-in."""

    module: nn.Module

    def remove(self) -> None:
        """Give the module its own class back, where it is a stand-in."""
        if is_stand_in(self.module):
            self.module.__class__ = self.module.__dict__[ATTRIBUTE].stock
            delattr(self.module, ATTRIBUTE)


def unwatched(*modules: nn.Module) -> bool:
    """Whether no module has hooks of its own."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


def _new_like(form: type[StandIn], stock: type[nn.Module]) -> nn.Module:
    cls = class_of(form, stock)
    return cls.__new__(cls)
