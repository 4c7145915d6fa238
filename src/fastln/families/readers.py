"""Find code outside a norm or layer that reads its parameters, such as `x.to(self.norm.weight.dtype)`.

A trained norm has float32 parameters in a model of lower precision. Such code must still see the model's own dtype. A
linear layer in 8 bits has no weight that such code could use, so it stays exact.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

_OF_INITIALISATION = ("__init__", "_init_weights", "reset_parameters")
_NOT_OF_MODELS = ("torch.", "fastln.standins.", "builtins")  # modules whose code reads no other module's parameters
_TORCH_S_ENCODER = "torch.nn.modules.transformer"  # but this one does: in evaluation it runs as one operator of torch


class _Read(NamedTuple):
    """A place in code that reads `owner.parameter`; `owner` is None if the code does not name the module."""

    owner: str | None
    parameter: str
    code: CodeType


def readers_of(model: nn.Module, name: str, parameters: Collection[str]) -> tuple[type, ...]:
    """Return the classes of modules around a norm or layer whose code reads its parameters.

    Args:
        model: The model.
        name: The module's name in it.
        parameters: The names of the parameters inside the module.
    """
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts)))
    bases = dict.fromkeys(base for module in around for base in type(module).__mro__)
    return tuple(
        base
        for base in bases
        if any(read.parameter in parameters and read.owner in (None, parts[-1]) for read in _reads(base))
    )


@functools.cache
def code_that_reads(classes: tuple[type, ...]) -> frozenset[CodeType]:
    """Return the code objects with which these classes read parameters of other modules."""
    return frozenset(read.code for cls in classes for read in _reads(cls))


@functools.cache
def _reads(cls: Any) -> tuple[_Read, ...]:
    """Return the reads in the code that a class itself defines."""
    is_of_model = cls.__module__ == _TORCH_S_ENCODER or not cls.__module__.startswith(_NOT_OF_MODELS)
    if not is_of_model or cls.__name__ == "PreTrainedModel":
        return ()
    found = []
    for name, value in vars(cls).items():
        function = inspect.unwrap(value.fget if isinstance(value, property) and value.fget else value)
        if isinstance(function, FunctionType) and name not in _OF_INITIALISATION:
            found += [read for code in _nested(function.__code__) for read in _reads_in(code)]
    return tuple(found)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _reads_in(code: CodeType) -> Iterator[_Read]:
    """Yield the reads `x.owner.parameter`, and `variable.parameter.dtype`, where the variable may hold any module."""
    steps = list(dis.get_instructions(code))
    for before, at, after in zip(steps, steps[1:], [*steps[2:], None], strict=False):
        if at.opname != "LOAD_ATTR":
            continue
        if before.opname == "LOAD_ATTR":
            yield _Read(before.argval, at.argval, code)
        elif before.argval != "self" and after is not None and after.argval == "dtype":
            yield _Read(None, at.argval, code)
