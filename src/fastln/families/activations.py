"""Which modules are activations that fastln has: recognised by their class, which says what they compute."""

from __future__ import annotations

from torch import nn
from transformers import activations

from fastln.ops import ActivationKind

# FastGELUActivation's constant has ten digits of sqrt(2 / pi), which is all that float32 can tell apart. How a class
# computes its function (in Python or fused) makes no difference to what the function is.
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

    A subclass is something else: what it changes is unknown.
    """
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _KINDS.get(type(module))


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is an activation of torch's or transformers', known to fastln or not."""
    return type(module).__module__ in (nn.modules.activation.__name__, activations.__name__) and not any(
        True for _ in module.children()
    )


def is_shared(module: nn.Module) -> bool:
    """Whether transformers holds this very object for every model: changed in place, it would change in all of them."""
    return any(module is value for value in vars(activations).values())
