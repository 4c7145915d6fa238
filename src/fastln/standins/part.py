"""How a module changes its class while a model is prepared, and gets its own class back.

fastln turns a stock module into a stand-in by changing only its class. So it stays the same object, with the same
parameters, hooks and attributes, for everyone who holds it. The new class is a subclass of the stock class with the
same name, made at first use. So `isinstance`, `repr` and helper methods still work, and `super().forward` is the stock
code.

Some stand-ins compute the work of several children in one operation. If one of those children has hooks, or someone has
replaced it or its forward, the stock code runs instead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastln.ops import OpSettings
from fastln.ops.rounded import Reader
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
        children: For a stand-in that computes the work of its children, the stock class of each child, by name.
        dtype: For a trained norm, the 16-bit dtype that its parameters had before `prepare`; otherwise None.
        readers: For such a norm, the classes around it whose code reads its parameters.
        of_float32: For a norm in 16 bits, trained or not, the dtype that stock code returns for a float32 input.
        widens: For a norm, whether stock code with float32 parameters returns float32 for a 16-bit input, as many
            classes do under autocast.
        reader: What its calls have shown about who reads its result.
    """

    stock: type[nn.Module]
    settings: OpSettings = DEFAULT
    kind: Any = None
    children: tuple[tuple[str, type[nn.Module]], ...] = ()
    dtype: torch.dtype | None = None
    readers: tuple[type, ...] = ()
    of_float32: torch.dtype | None = None
    widens: bool = False
    reader: Reader = field(default_factory=Reader, compare=False, repr=False)


class StandIn(nn.Module):
    """Base class of all forms. A form provides the `forward` for subclasses of stock classes.

    Attributes:
        COMPUTES: The children whose work the form computes itself, if they are as they were when the model was
            prepared.
    """

    COMPUTES: ClassVar[tuple[str, ...]] = ()
    _fastln: Part

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # `model.float()` and its like also change the dtypes that a norm would have without `prepare`.
        module = super()._apply(fn, recurse)
        part = self._fastln
        if part.dtype is not None or part.of_float32 is not None:
            dtype, of_float32 = (_in_16_bits(dtype, fn) for dtype in (part.dtype, part.of_float32))
            self._fastln = dataclasses.replace(part, dtype=dtype, of_float32=of_float32)
        return module

    def tensors_beside(self) -> list[Tensor]:
        """Return the tensors that a form holds and that are neither parameters nor buffers.

        Those that it makes in its first call are on meta until then: they only say how large they will be.
        """
        return []

    def _has_stock_children(self) -> bool:
        """Whether the children that the form computes are the same kinds as before, with no hooks on them."""
        children = [(self.get_submodule(name), stock) for name, stock in self._fastln.children]
        return all(
            stock_class(child) is stock and "forward" not in vars(child) and unwatched(child)
            for child, stock in children
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by form and stock class, because the combined class has no importable name."""
        form = next(base for base in type(self).__mro__ if base.__dict__.get("_is_form"))
        return _new_like, (form, self._fastln.stock), self.__dict__


def _in_16_bits(dtype: torch.dtype | None, fn: Any) -> torch.dtype | None:
    """Return what a cast makes of a 16-bit dtype; None if that is wider."""
    cast = None if dtype is None else fn(torch.empty(0, dtype=dtype)).dtype
    return cast if cast is not None and cast.itemsize == 2 else None


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
    module: nn.Module, form: type[FormT], settings: OpSettings = DEFAULT, kind: Any = None, **more: Any
) -> FormT:
    """Make `module` a stand-in of this form, in place, and return it. `more` goes to its `Part`."""
    children = tuple((name, stock_class(module.get_submodule(name))) for name in form.COMPUTES)
    setattr(module, ATTRIBUTE, Part(type(module), settings, kind, children, **more))
    module.__class__ = class_of(form, type(module))
    assert isinstance(module, form)
    return module


def is_stand_in(module: nn.Module) -> bool:
    """Whether `module` is currently a stand-in."""
    return isinstance(module.__dict__.get(ATTRIBUTE), Part)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """Return the stock class of a module, be it a stand-in or not."""
    return module.__dict__[ATTRIBUTE].stock if is_stand_in(module) else type(module)


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


def own_parameter(module: nn.Module, name: str) -> Any:
    """Return a module's own parameter, or what a parametrization puts in its place; None if it has none."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name, None)


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
