"""What models do in a training step by default and norms do not need: a cache, checkpoints with reentry."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger(__name__)

_CACHE = ("use_cache", "past_key_values")  # the arguments that decide about one


def spare_training_steps(model: nn.Module) -> list[RemovableHandle]:
    """Have every model in `model` make no cache, and checkpoint without reentry, in training.

    A cache of keys and values copies them. It is made in evaluation, without autograd (so by `generate`), and wherever
    `use_cache=True` or a cache is passed.

    Reentrant checkpoints drop the gradients of layers whose input wants none, as behind frozen embeddings. What
    transformers does about that where there are token embeddings, to ask for gradients of these, is not needed without
    reentry; it is undone, since it would have them computed, and BLIP's code cannot bear it.

    Returns:
        The handles that undo it.
    """
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [
        module.register_forward_pre_hook(functools.partial(_before_forward, _n_before_cache(module)), with_kwargs=True)
        for module in models
    ]


def _n_before_cache(model: PreTrainedModel) -> int:
    """How many arguments may come by position before one that decides about a cache; -1 where none does."""
    names = list(inspect.signature(model.forward).parameters)
    return min(names.index(name) for name in _CACHE if name in names) if "use_cache" in names else -1


def _before_forward(
    n_before_cache: int, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not model.training or not torch.is_grad_enabled():
        return None
    if not torch.compiler.is_compiling():
        _checkpoint_without_reentry(model)
    if len(args) > n_before_cache or any(kwargs.get(name) is not None for name in _CACHE):
        return None
    return args, {**kwargs, "use_cache": False}


def _checkpoint_without_reentry(model: PreTrainedModel) -> None:
    layer = next((module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)), None)
    if layer is None or not layer.gradient_checkpointing:
        return
    checkpoint = layer._gradient_checkpointing_func
    if not isinstance(checkpoint, functools.partial):
        return
    if checkpoint.keywords.get("use_reentrant", True):
        logger.info("checkpoints are without reentry now: reentrant ones give no gradient to layers behind frozen ones")
        for module in model.modules():
            if "_gradient_checkpointing_func" in vars(module):
                vars(module)["_gradient_checkpointing_func"] = functools.partial(checkpoint, use_reentrant=False)
    model.disable_input_require_grads()
