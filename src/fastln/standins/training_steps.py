"""What models do in a training step by default and norms do not need: a cache, checkpoints with reentry."""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger(__name__)

_CACHE = ("use_cache", "past_key_values")  # the arguments that decide about one
_FUNCTION = "_gradient_checkpointing_func"


@dataclass
class NoCache:
    """Has a model make no cache of keys and values in training, which would copy them.

    A cache is made in evaluation, without autograd (so by `generate`), and wherever `use_cache=True` or a cache is
    passed.
    """

    model: PreTrainedModel
    handle: RemovableHandle | None = None

    def put(self) -> None:
        """Begin."""
        names = list(inspect.signature(self.model.forward).parameters)
        if "use_cache" in names:
            n_before = min(names.index(name) for name in _CACHE if name in names)
            hook = functools.partial(_without_cache, n_before)
            self.handle = self.model.register_forward_pre_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Leave it to the model again."""
        if self.handle is not None:
            self.handle.remove()


def _without_cache(
    n_before: int, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`n_before`: how many arguments may come by position before one that decides about a cache."""
    if not model.training or not torch.is_grad_enabled():
        return None
    if len(args) > n_before or any(kwargs.get(name) is not None for name in _CACHE):
        return None
    return args, {**kwargs, "use_cache": False}


@dataclass
class NoReentry:
    """Has a model checkpoint without reentry, whenever it is switched on.

    Reentrant checkpoints drop the gradients of layers whose input wants none, as behind frozen embeddings. What
    transformers does about that where there are token embeddings, to ask for gradients of these, is not needed without
    reentry; it is undone, since it would have them computed, and BLIP's code cannot bear it.

    Attributes:
        model: The model.
        replaced: Modules, and the checkpointing function that each had.
        asked: Whether gradients of the token embeddings had been asked for.
    """

    model: PreTrainedModel
    handle: RemovableHandle | None = None
    replaced: list[tuple[nn.Module, Any]] = field(default_factory=list)
    asked: bool = False

    def put(self) -> None:
        """Begin."""
        self.handle = self.model.register_forward_pre_hook(self._before_forward)

    def remove(self) -> None:
        """Give the model its functions, and its hooks on the token embeddings, back."""
        if self.handle is not None:
            self.handle.remove()
        for module, function in reversed(self.replaced):
            current = vars(module).get(_FUNCTION)
            if isinstance(current, _Checkpoint):
                vars(module)[_FUNCTION] = function
        if self.asked and not getattr(self.model, "_require_grads_hooks", None):
            self.model.enable_input_require_grads()
        self.replaced, self.asked = [], False

    def _before_forward(self, model: PreTrainedModel, args: tuple[Any, ...]) -> None:
        if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        layer = next((module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)), None)
        if layer is None or not layer.gradient_checkpointing:
            return
        function = getattr(layer, _FUNCTION)
        if not isinstance(function, functools.partial):
            return
        if function.keywords.get("use_reentrant", True):
            logger.info(
                "activation checkpoints run without reentry: reentrant ones give no gradient to layers behind frozen "
                "ones (without=('checkpointing',) leaves them as they are)"
            )
            without = _Checkpoint(function, use_reentrant=False)
            for module in model.modules():
                if _FUNCTION in vars(module):
                    self.replaced.append((module, vars(module)[_FUNCTION]))
                    vars(module)[_FUNCTION] = without
        if getattr(model, "_require_grads_hooks", None):
            self.asked = True
            model.disable_input_require_grads()


class _Checkpoint(functools.partial):
    """A checkpointing function that is fastln's, told by its class."""
