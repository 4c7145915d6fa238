"""Check that a plan fits a model, and that what it trains has values."""

from __future__ import annotations

import logging

import torch
from torch import nn

from fastln.decision import Plan
from fastln.errors import FastLNError
from fastln.families.norms import norm_eps
from fastln.ops import NormKind

logger = logging.getLogger(__name__)


def check_fits(plan: Plan, model: nn.Module) -> None:
    """Raise a `FastLNError` if a plan is for another model."""
    modules = dict(model.named_modules())
    parameters = {name for name, _ in model.named_parameters()}
    for change in plan.changes:
        module = modules.get(change.name)
        if module is None or class_name(module) != change.stock:
            held = "no such module" if module is None else f"a {class_name(module)}"
            raise FastLNError(
                f"the plan is for another model: it expects {change.name!r} to be a {change.stock}, but this "
                f"{type(model).__name__} has {held} there"
            )
        for own, dtype in change.dtypes:
            if (held := module.get_parameter(own).dtype) != dtype:
                raise FastLNError(
                    f"the plan is for a model in another dtype: {joined(change.name, own)} is {dtype} in it, and "
                    f"{held} here; plan with a model of this dtype"
                )
        if isinstance(change.detail, NormKind) and norm_eps(module) != change.detail.eps:
            raise FastLNError(
                f"the plan is for another model: the norm {change.name!r} has eps {change.detail.eps} in it, and "
                f"{norm_eps(module)} here"
            )
    here = next((parameter.device for parameter in model.parameters()), torch.device(plan.device))
    if here.type not in ("meta", torch.device(plan.device).type):
        logger.warning(
            "the plan is for device %s, and this model is on %s: move it there before it runs", plan.device, here
        )
    if missing := sorted(plan.trained - parameters):
        raise FastLNError(
            f"the plan is for another model: it trains {missing[0]!r}, but this {type(model).__name__} has no such "
            "parameter"
        )


def check_values(plan: Plan, model: nn.Module) -> None:
    """Raise an error if parameters cannot train. A model that is wholly on meta may get its values later."""
    parameters = dict(model.named_parameters())
    made_in_inference = next((name for name, parameter in parameters.items() if parameter.is_inference()), None)
    if made_in_inference is not None:
        raise FastLNError(
            f"{made_in_inference} was made under torch.inference_mode(), so no gradient can pass it: make or load the "
            "model outside of it"
        )
    unloaded = sorted(name for name in plan.trained if parameters[name].is_meta)
    is_offloaded = any("_hf_hook" in vars(module) for module in model.modules())
    if unloaded and (is_offloaded or not all(parameter.is_meta for parameter in parameters.values())):
        raise FastLNError(
            f"{len(unloaded)} parameters that would train have no values, for example {unloaded[0]}: their modules are "
            "offloaded to the CPU or a disk, or were never loaded; load them onto a device (a device_map without "
            "offload)"
        )


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class, as `Change.stock` has it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def joined(module: str, own: str) -> str:
    """Return the name in the model of something that a module holds; the model itself has an empty name."""
    return f"{module}.{own}" if module else own
