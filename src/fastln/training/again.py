"""Put a method on a model that may have one already, as from a notebook's cell that ran twice."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fastln.engines import PROMPT_METHODS, SETTINGS, WRAPPER, MethodSettings, put_method, to_stock
from fastln.errors import FastLNError
from fastln.plan import apply, prepared
from fastln.prepare import restore
from fastln.rounding import warn_of_rounding

logger = logging.getLogger(__name__)


def put_method_again(model: nn.Module, **settings: Any) -> nn.Module:
    """Set up a model as `fastln.engines.put_method` does, also if it has a method already.

    With the same settings it goes on as it is. Otherwise the earlier method is undone first. The tuned values stay in
    both cases. A line in the log says which.

    Args:
        model: a stock or prepared model, or peft's wrapper or its base after `put_method`.
        **settings: as `put_method` takes them.

    Returns:
        The module to train.

    Raises:
        FastLNError: as in `put_method`; and if the model holds layers of peft that `put_method` did not put there.
    """
    wanted = MethodSettings.of(**settings)
    wrapper = model if isinstance(model, peft.PeftModel) else model.__dict__.get(WRAPPER)
    if wrapper is not None and SETTINGS in wrapper.__dict__ and _has_layers(wrapper):
        if wrapper.__dict__[SETTINGS] == wanted:
            logger.info("the model has method %s already, and goes on from its tuned values", wanted.method)
            return wrapper
        model = _unwrapped(wrapper, wanted.method)
    elif isinstance(model, peft.PeftModel) or any(isinstance(part, BaseTunerLayer) for part in model.modules()):
        raise FastLNError(
            f"the model holds layers of peft already, and method {wanted.method!r} needs a stock model: merge them "
            "first (model.merge_and_unload()), or load the model anew"
        )
    if prepared(model) is None:
        return put_method(model, **settings)
    return _prepared_again(model, wanted.method, settings)


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


def _prepared_again(model: nn.Module, method: str, settings: Mapping[str, Any]) -> nn.Module:
    state = prepared(model)
    assert state is not None
    exact = {name: model.get_parameter(name).data for name in state.dtypes}
    restore(model)
    try:
        trained = put_method(model, **settings)
    except BaseException:
        apply(state.plan, model)
        _fill(model, exact)
        raise
    now = prepared(model)
    if now is not None:
        _fill(model, {name: tensor for name, tensor in exact.items() if name in now.dtypes})
    if trained is model and now is not None and now.plan == state.plan:
        logger.info("the model has method %s already, and goes on from its tuned values", method)
        return trained
    _tell_replaced(state.plan.method, method, "its tuned values stay")
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
