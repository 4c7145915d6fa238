"""Find the attention modules whose code turns queries and keys by rotary positions, through a function that fastln has.

transformers' families each have their own `apply_rotary_pos_emb`, a function of the module that defines the class. Some
turn halves of a head, others neighbouring columns. So a function is recognised by what it returns for a small example.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn

from fastln_kernels.reference_rotary import rotary

_PARAMETERS = ["q", "k", "cos", "sin"]


def rotary_function(module: nn.Module) -> str | None:
    """Return the global name by which the forward of a module calls such a function; None if it calls none.

    Args:
        module: The module. What other modules inside it call does not count.
    """
    return _function_in(type(module).forward)


@functools.cache
def _function_in(forward: Callable[..., object]) -> str | None:
    if not isinstance(forward, FunctionType):
        return None
    for name in forward.__code__.co_names:
        if "rotary" in name and _turns_halves(forward.__globals__.get(name)):
            return name
    return None


@functools.cache
def _turns_halves(function: object) -> bool:
    """Whether a function of (q, k, cos, sin) returns both as `reference_rotary.rotary` turns them."""
    if not isinstance(function, FunctionType):
        return False
    parameters = list(inspect.signature(function).parameters)
    if parameters[: len(_PARAMETERS)] != _PARAMETERS:
        return False
    # The halves of cos and sin differ in models' own tables for no family; here they do, which tells layouts apart.
    q, k, cos, sin = (_example(*shape) for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    try:
        with torch.inference_mode(False), torch.no_grad():
            found = function(q, k, cos, sin)
    except Exception:  # any code may stand behind the name
        return False
    wanted = rotary(q, cos, sin), rotary(k, cos, sin)
    return (
        isinstance(found, tuple)
        and len(found) == len(wanted)
        and all(isinstance(x, Tensor) and x.shape == y.shape for x, y in zip(found, wanted, strict=True))
        and all(torch.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in zip(found, wanted, strict=True))
    )


def _example(*shape: int) -> Tensor:
    """Return numbers of which no two are alike, without drawing from anyone's generator, on the CPU."""
    n = torch.Size(shape).numel()
    return torch.arange(1.0, n + 1, device="cpu", dtype=torch.float32).mul(shape[0] + shape[1]).sin().reshape(shape)
