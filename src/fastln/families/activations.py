"""Recognise activations that fastln supports, by their class."""

from __future__ import annotations

import sys

from torch import nn
from transformers import activations

from fastln.ops import ActivationKind

# FastGELUActivation has ten digits of sqrt(2 / pi), more than float32 can distinguish. It does not matter how a class
# computes its function (in Python or fused), only which function it is.
_KINDS: dict[type[nn.Module], ActivationKind] = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


def activation_kind(module: nn.Module) -> ActivationKind | None:
    """Return which of fastln's activations `module` computes; None for anything else.

    A subclass counts as something else, because it may compute something different.
    """
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _KINDS.get(type(module))


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is an activation from torch or transformers, even one that fastln does not support."""
    return type(module).__module__ in (nn.modules.activation.__name__, activations.__name__) and not any(
        True for _ in module.children()
    )


def is_shared(module: nn.Module, model: nn.Module) -> bool:
    """Whether a Python module holds this object for all models, so that a change in place would affect all of them.

    Args:
        module: The activation.
        model: The model that it is in. The Python modules that define its classes are searched, and their tables.
    """
    names = {type(part).__module__ for part in model.modules()} | {activations.__name__}
    held = (value for name in names if name in sys.modules for value in vars(sys.modules[name]).values())
    return any(module is value or (type(value) is dict and any(module is v for v in value.values())) for value in held)
