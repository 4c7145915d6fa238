"""Which modules of a model are norms, and which norm each computes: found by what they do, not by lists of models."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fastln_kernels.reference import NormForward, NormKind, norm_forward

logger = logging.getLogger(__name__)

_EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")  # what transformers' classes call it


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalises over its last dimension and owns an affine vector or two.

    LayerNorm and its subclasses are. So is any module whose parameters are all vectors of its own, no group norm and
    without running statistics, whose class name has "Norm" in it (LlamaRMSNorm, Gemma's, T5LayerNorm, gated ones, ...)
    or which, whatever its name, computes one of the norms that `norm_kind` knows.
    """
    if isinstance(module, nn.LayerNorm):
        return module.elementwise_affine
    return _owns_vectors_alone(module) and ("Norm" in type(module).__name__ or norm_kind(module) is not None)


_OVER_OTHER_DIMENSIONS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _owns_vectors_alone(module: nn.Module) -> bool:
    if isinstance(module, _OVER_OTHER_DIMENSIONS):
        return False
    own = [*module.parameters(recurse=False)]
    return bool(own) and all(parameter.dim() == 1 for parameter in own) and len(own) == len([*module.parameters()])


def _may_be_fast(module: nn.Module) -> bool:
    """Whether it has the parameters that fastln's norms have, no children, and a forward of one argument (no gate)."""
    parameters = dict(module.named_parameters(recurse=False))
    return (
        _owns_vectors_alone(module)
        and next(module.children(), None) is None
        and "weight" in parameters
        and set(parameters) <= {"weight", "bias"}
        and len(inspect.signature(module.forward).parameters) == 1
    )


def is_stock_layer_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether `module` computes exactly what `torch.nn.LayerNorm` does over one dimension."""
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


def find_other_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of what norm tuning does not reach, in the model's order.

    That is group and batch norms, and norms whose scale comes from layers inside (adaptive ones, parametrized ones):
    modules with "Norm" in their class name and parameters, none of them a norm's that `is_norm` knows.
    """
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters()):
            continue
        if isinstance(module, _OVER_OTHER_DIMENSIONS) or (
            "Norm" in type(module).__name__
            and not any(_is_reached(inner) or isinstance(inner, _OVER_OTHER_DIMENSIONS) for inner in module.modules())
        ):
            yield name, module


def _is_reached(module: nn.Module) -> bool:
    return is_norm(module) and next(module.parameters(recurse=False), None) is not None


def norm_kind(module: nn.Module) -> NormKind | None:
    """Return which norm `module` computes over its last dimension, or None where it is none of those that fastln has.

    The module's forward runs on a few rows and is compared with each norm's definition: rows with a mean, rows so small
    that eps decides, and bfloat16 rows, in which it shows where the rounding stands.
    """
    eps = next((value for name in _EPS if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None or not _may_be_fast(module):
        return None
    probe = copy.copy(module)
    n_cols = dict(module.named_parameters(recurse=False))["weight"].shape[0]
    generator = torch.Generator("cpu").manual_seed(0)
    probe.__dict__["_parameters"] = {
        name: None
        if parameter is None
        else nn.Parameter(1 + 0.5 * torch.randn(n_cols, generator=generator, device="cpu"))
        for name, parameter in module._parameters.items()
    }
    ordinary = 1 + torch.randn(8, n_cols, generator=generator, device="cpu")  # whatever the default is
    try:
        with torch.no_grad():
            return _matching(probe, eps, [ordinary, ordinary * eps**0.5, ordinary.bfloat16()])
    # A class that happens to have a norm's shape may raise anything; it is no norm that fastln knows then.
    except Exception as error:
        logger.debug("%s is taken for no norm: its forward raised %r", type(module).__name__, error)
        return None


def _matching(probe: nn.Module, eps: float, inputs: list[Tensor]) -> NormKind | None:
    forward = type(probe).forward
    weight, bias = (probe._parameters.get(name) for name in ("weight", "bias"))
    wanted = [forward(probe, x) for x in inputs]
    if any(not isinstance(y, Tensor) or y.shape != x.shape for y, x in zip(wanted, inputs, strict=True)):
        return None
    for centre in (False, True):
        for offset in (0.0, 1.0):
            kinds = [NormKind(eps, centre, offset, round_normed) for round_normed in (False, True)]
            if all(
                _error(norm_forward(NormForward(x, weight, bias, kinds[0])).y, y) < 1e-5
                for x, y in zip(inputs[:2], wanted, strict=False)
            ):
                found = [norm_forward(NormForward(inputs[2], weight, bias, kind)).y for kind in kinds]
                # A float32 weight promotes what some stock code returns.
                differing = [(y != wanted[2].to(y.dtype)).float().mean().item() for y in found]
                return kinds[differing[1] < differing[0]]
    return None


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).square().mean() / want.double().square().mean()).sqrt().item()
