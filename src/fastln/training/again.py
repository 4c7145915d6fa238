"""Put a method on a model that may have one already, as from a notebook's cell that ran twice."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fastln.engines import PROMPT_METHODS, SETTINGS, WRAPPER, can_restore, put, to_stock
from fastln.errors import FastLNError
from fastln.ops import OpSettings
from fastln.plan import apply
from fastln.prepare import restore
from fastln.rounding import warn_of_rounding
from fastln.settings import MethodSettings
from fastln.state import prepared

logger = logging.getLogger(__name__)


def put_again(model: nn.Module, settings: MethodSettings) -> nn.Module:
    """Set up a model as `fastln.engines.put` does, also if it has a method already.

    With the same settings it goes on as it is. Otherwise the earlier method is undone first. The tuned values stay in
    both cases. A line in the log says which.

    Args:
        model: a stock or prepared model, or peft's wrapper or its base after `put_method`.
        settings: what to set it up with.

    Returns:
        The module to train.

    Raises:
        FastLNError: as in `put`; if the model holds layers of peft that `put` did not put there; or if the earlier
            method cannot be undone, because 8-bit weights replaced those of the model.
    """
    wrapper = model if isinstance(model, peft.PeftModel) else model.__dict__.get(WRAPPER)
    if wrapper is not None and SETTINGS in wrapper.__dict__ and _has_layers(wrapper):
        if wrapper.__dict__[SETTINGS] == settings:
            return _goes_on(wrapper, settings)
        _check_undone(wrapper, wrapper.__dict__[SETTINGS].method, settings)
        model = _unwrapped(wrapper, settings.method)
    elif isinstance(model, peft.PeftModel) or any(isinstance(part, BaseTunerLayer) for part in model.modules()):
        raise FastLNError(
            f"the model holds layers of peft already, and method {settings.method!r} needs a stock model: merge them "
            "first (model.merge_and_unload()), or load the model anew"
        )
    if prepared(model) is None:
        return put(model, settings)
    if not can_restore(model) and _is_same(model, settings):
        return _goes_on(model, settings)
    state = prepared(model)
    assert state is not None
    _check_undone(model, state.plan.method, settings)
    return _prepared_again(model, settings)


def _goes_on(trained: nn.Module, settings: MethodSettings) -> nn.Module:
    logger.info("the model has method %s already, and goes on from its tuned values", settings.method)
    return trained


def _is_same(model: nn.Module, settings: MethodSettings) -> bool:
    """Whether a model that dropped its weights was prepared with these settings, for the device that it is on."""
    state = prepared(model)
    assert state is not None
    was = state.plan
    random = {change.name for change in was.changes if change.stand_in == "random_head"}
    return (
        settings.engine == "fastln"
        and not settings.keep_weights
        and (was.method, was.scope, was.without) == (settings.method, settings.scope, settings.without)
        and tuple(name for name in was.also if name not in random) == settings.also
        and was.settings == OpSettings(settings.backend, settings.activations, settings.products)
        and settings.memory_budget is None
        and was.n_bytes is None
        and not was.storages
        and was.device == str(next(model.parameters()).device)
    )


def _check_undone(trained: nn.Module, before: str, settings: MethodSettings) -> None:
    if not can_restore(trained):
        raise FastLNError(
            f"the model had method {before}, whose 8-bit weights replaced its own, so it cannot get method "
            f"{settings.method} with products {settings.products!r} in its place: load it anew, or use "
            "keep_weights=True from the start"
        )


def _unwrapped(wrapper: peft.PeftModel, method: str) -> nn.Module:
    """Return the stock model inside peft's wrapper, with the tuned values merged."""
    before: MethodSettings = wrapper.__dict__[SETTINGS]
    model = wrapper.get_base_model()
    narrow = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.itemsize == 2})
    if before.method in PROMPT_METHODS:
        _tell_replaced(before.method, method, "its virtual tokens are dropped")
        for name, module in list(model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                model.set_submodule(name, module.modules_to_save[module.active_adapter])
    else:
        rounded = f", rounded to {' and '.join(narrow)}" if narrow else ""
        _tell_replaced(before.method, method, f"its tuned values are merged into it{rounded}")
        model = to_stock(wrapper)
    model.__dict__.pop(WRAPPER, None)
    return model


def _prepared_again(model: nn.Module, settings: MethodSettings) -> nn.Module:
    state = prepared(model)
    assert state is not None
    exact = {name: model.get_parameter(name).data for name in state.dtypes}
    restore(model)
    try:
        trained = put(model, settings)
    except BaseException:
        apply(state.plan, model)
        _fill(model, exact)
        raise
    now = prepared(model)
    if now is not None:
        _fill(model, {name: tensor for name, tensor in exact.items() if name in now.dtypes})
    if trained is model and now is not None and now.plan == state.plan:
        return _goes_on(trained, settings)
    _tell_replaced(state.plan.method, settings.method, "its tuned values stay")
    if trained is model:
        warn_of_rounding(exact, dict(model.named_parameters()), "load the model in float32 to keep every digit")
    return trained


def _tell_replaced(before: str, now: str, what: str) -> None:
    again = " with other settings" if before == now else ""
    logger.warning("the model had method %s: %s, and it gets method %s%s", before, what, now, again)


def _has_layers(wrapper: peft.PeftModel) -> bool:
    """Whether a wrapper still wraps: its layers may have been merged and removed."""
    if isinstance(wrapper.active_peft_config, peft.PromptLearningConfig):
        return True
    return any(isinstance(part, BaseTunerLayer | ModulesToSaveWrapper) for part in wrapper.get_base_model().modules())


def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in values.items():
            model.get_parameter(name).copy_(tensor)
