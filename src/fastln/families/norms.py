"""Find the norms of a model and which norm each computes, by what they do and not by lists of models."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastln_kernels.reference import NormForward, NormKind, norm_forward

logger = logging.getLogger(__name__)

_EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")  # its names in transformers' classes


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalises over its last dimension and has its own scale or shift vectors.

    `torch.nn.LayerNorm` and its subclasses count if they are affine. Group and batch norms do not count, nor do
    parametrized norms (`torch.nn.utils.parametrize`), whose scale comes from a module inside them. Any other
    module counts if all its parameters are vectors that it owns itself, and if its class name contains "Norm"
    (LlamaRMSNorm, Gemma's, T5LayerNorm, gated ones, ...) or it computes one of the norms that `norm_kind` knows.
    """
    if isinstance(module, nn.LayerNorm):
        return module.elementwise_affine and not parametrize.is_parametrized(module)
    return _owns_vectors_alone(module) and ("Norm" in type(module).__name__ or norm_kind(module) is not None)


_OVER_OTHER_DIMENSIONS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _owns_vectors_alone(module: nn.Module) -> bool:
    if isinstance(module, _OVER_OTHER_DIMENSIONS):
        return False
    own = [*module.parameters(recurse=False)]
    return bool(own) and all(parameter.dim() == 1 for parameter in own) and len(own) == len([*module.parameters()])


def _may_be_fast(module: nn.Module) -> bool:
    """Whether it has a weight, perhaps a bias, no children, and a forward with one argument (no gate)."""
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
        and not parametrize.is_parametrized(module)
        and len(module.normalized_shape) == 1
    )


def find_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for every norm of `model`, in the model's order."""
    for name, module in model.named_modules():
        if is_norm(module):
            yield name, module


def find_other_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for every norm that norm tuning leaves out, in the model's order.

    These are group and batch norms, and norms whose scale comes from layers inside them (adaptive or parametrized
    norms). The latter are modules with parameters and "Norm" in their class name that neither are nor contain a norm
    that `is_norm` recognises.
    """
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters()):
            continue
        if isinstance(module, _OVER_OTHER_DIMENSIONS) or (
            "Norm" in type(module).__name__.replace("NoLayerNorm", "")  # speech encoders' layers without a norm
            and not any(_is_reached(inner) or isinstance(inner, _OVER_OTHER_DIMENSIONS) for inner in module.modules())
        ):
            yield name, module


def _is_reached(module: nn.Module) -> bool:
    return is_norm(module) and next(module.parameters(recurse=False), None) is not None


def norm_eps(module: nn.Module) -> float | None:
    """Return the eps of a norm, by whichever name its class keeps it; None if it has none."""
    return next((value for name in _EPS if isinstance(value := getattr(module, name, None), float)), None)


def norm_kind(module: nn.Module) -> NormKind | None:
    """Return which of fastln's norms `module` computes over its last dimension; None if it computes none of them.

    This runs the module's forward on a few rows and compares the results with each norm's definition. There are rows
    with a mean, rows so small that eps dominates, and bfloat16 rows, which show where the module rounds.
    """
    eps = norm_eps(module)
    if eps is None or not _may_be_fast(module):
        return None
    n_cols = dict(module.named_parameters(recurse=False))["weight"].shape[0]
    generator = torch.Generator("cpu").manual_seed(0)
    probe = _probe(module, generator)
    ordinary = 1 + torch.randn(8, n_cols, generator=generator, device="cpu")  # on the CPU, whatever the default device
    try:
        with torch.no_grad():
            return _matching(probe, eps, [ordinary, ordinary * eps**0.5, ordinary.bfloat16()])
    # A class that looks like a norm may raise anything on such an input. Then it is not a norm.
    except Exception as error:
        logger.debug("%s is not taken for a norm: its forward raised %r", type(module).__name__, error)
        return None


def returned_dtype(module: nn.Module, parameters: torch.dtype, x: torch.dtype) -> torch.dtype | None:
    """Return the dtype that the stock code of a norm returns.

    Args:
        module: The norm, in any dtype, on any device.
        parameters: The dtype that its parameters would have.
        x: The dtype that its input would have.

    Returns:
        None if the norm refuses such an input.
    """
    n_cols = next(module.parameters(recurse=False)).shape[0]
    probe = _probe(module, torch.Generator("cpu").manual_seed(0), parameters)
    try:
        with torch.no_grad():
            y = type(probe).forward(probe, torch.ones(1, 2, n_cols, device="cpu", dtype=x))
    except Exception as error:  # a norm may raise anything
        logger.debug("%s takes no %s input with %s parameters: %r", type(module).__name__, x, parameters, error)
        return None
    return y.dtype if isinstance(y, Tensor) else None


def _probe(module: nn.Module, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of a norm with other parameters, on the CPU, whatever the default device."""
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = {
        name: None
        if parameter is None
        else nn.Parameter((1 + 0.5 * torch.randn(parameter.shape, generator=generator, device="cpu")).to(dtype))
        for name, parameter in module._parameters.items()
    }
    return probe


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
                # A float32 weight promotes the result of some stock code.
                differing = [(y != wanted[2].to(y.dtype)).float().mean().item() for y in found]
                return kinds[differing[1] < differing[0]]
    return None


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).square().mean() / want.double().square().mean()).sqrt().item()
