"""Which modules of a model are norms: found by what they are, not by a list of model names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

from torch import nn


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalises over its last dimension and owns an affine vector or two.

    LayerNorm and its subclasses are; so is any module whose class name ends in "Norm" (LlamaRMSNorm, Gemma's,
    T5LayerNorm, ...) and that owns a one-dimensional `weight`, has no running statistics and no children.
    """
    if isinstance(module, nn.LayerNorm):
        return module.elementwise_affine
    if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase):
        return False
    parameters = dict(module.named_parameters(recurse=False))
    return (
        type(module).__name__.endswith("Norm")
        and next(module.children(), None) is None
        and "weight" in parameters
        and set(parameters) <= {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in parameters.values())
    )


def is_stock_layer_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether `module` computes exactly what `torch.nn.LayerNorm` does over one dimension, so it can be swapped."""
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).forward is nn.LayerNorm.forward
        and len(module.normalized_shape) == 1
    )


def find_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of every norm of `model`, in the model's order."""
    for name, module in model.named_modules():
        if is_norm(module):
            yield name, module
