"""How a module changes its class while a model is prepared, and gets its own class back.

fastln turns a stock module into a stand-in by changing only its class. So it stays the same object, with the same
parameters, hooks and attributes, for everyone who holds it. The new class is a subclass of the stock class with the
same name, made at first use. So `isinstance`, `repr` and helper methods still work, and `super().forward` is the stock
code.

Some stand-ins compute the work of several children in one operation. If one of those children has hooks, the stock code
runs instead, so that the hooks are called.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fastln.ops import OpSettings
from fastln.ops.settings import DEFAULT

ATTRIBUTE = "_fastln"


class Undo(Protocol):
    """An object that undoes a change. `remove` also works twice, and for a change that was not finished."""

    def remove(self) -> None:
        """Undo the change."""


@dataclass(frozen=True)
class Part:
    """Extra data of a stand-in.

    Attributes:
        stock: The module's stock class.
        settings: How its operations run.
        kind: Which norm or activation it computes; None if the class already says so.
        dtype: For a trained norm, the 16-bit dtype that its parameters had before `prepare`; otherwise None.
    """

    stock: type[nn.Module]
    settings: OpSettings = DEFAULT
    kind: Any = None
    dtype: torch.dtype | None = None


class StandIn(nn.Module):
    """Base class of all forms. A form provides the `forward` for subclasses of stock classes."""

    _fastln: Part

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # `model.float()` and its like cast what a trained norm's parameters would be without `prepare`, too.
        module = super()._apply(fn, recurse)
        if self._fastln.dtype is not None:
            cast = fn(torch.empty(0, dtype=self._fastln.dtype)).dtype
            self._fastln = dataclasses.replace(self._fastln, dtype=cast if cast.itemsize == 2 else None)
        return module

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by form and stock class, because the combined class has no importable name."""
        form = next(base for base in type(self).__mro__ if base.__dict__.get("_is_form"))
        return _new_like, (form, self._fastln.stock), self.__dict__


FormT = TypeVar("FormT", bound=StandIn)
_CLASSES: dict[tuple[type[StandIn], type[nn.Module]], type[StandIn]] = {}


def form(cls: type[FormT]) -> type[FormT]:
    """Mark a class as a form: the first base of a stand-in's class, in front of the stock class."""
    cls._is_form = True  # type: ignore[attr-defined]
    return cls


def class_of(form: type[FormT], stock: type[nn.Module]) -> type[FormT]:
    """Return the subclass of `stock` with the same name and the forward of `form`. It is cached."""
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
    """Whether `module` is currently a stand-in."""
    return isinstance(module.__dict__.get(ATTRIBUTE), Part)


def code_of(module: nn.Module) -> tuple[object, ...]:
    """Return what decides which code computes `module`: two modules with the same weights may round differently by it.

    That is its class, the form of a stand-in (its class has the stock name) with its settings, and what attention is
    called in its configuration.
    """
    cls = type(module)
    form = next((base.__qualname__ for base in cls.__mro__ if base.__dict__.get("_is_form")), None)
    settings = module.__dict__[ATTRIBUTE].settings if is_stand_in(module) else None
    attention = getattr(module.__dict__.get("config"), "_attn_implementation", None)
    return cls.__module__, cls.__qualname__, form, settings, attention


def stand_back(model: nn.Module) -> None:
    """Give every stand-in of `model` its own class back, in place."""
    for module in model.modules():
        ClassChange(module).remove()


@dataclass
class ClassChange:
    """Undoes the change of a module into a stand-in."""

    module: nn.Module

    def remove(self) -> None:
        """Give the module its own class back, if it is a stand-in."""
        if is_stand_in(self.module):
            self.module.__class__ = self.module.__dict__[ATTRIBUTE].stock
            delattr(self.module, ATTRIBUTE)


def unwatched(*modules: nn.Module) -> bool:
    """Whether none of the modules has hooks."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


def _new_like(form: type[StandIn], stock: type[nn.Module]) -> nn.Module:
    cls = class_of(form, stock)
    return cls.__new__(cls)
