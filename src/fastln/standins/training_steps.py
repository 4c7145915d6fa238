"""Defaults of transformers that norm tuning turns off in training: the key-value cache and reentrant checkpoints."""

from __future__ import annotations

import functools
import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastln.families.parts import CACHE
from fastln.standins.whole_block import is_whole

logger = logging.getLogger(__name__)

_FUNCTION = "_gradient_checkpointing_func"


@dataclass
class NoCache:
    """Stops a model from making a key-value cache in training, where it would copy keys and values.

    The model still makes a cache in evaluation, without autograd (so in `generate`), and if the caller passes
    `use_cache=True` or a cache.
    """

    model: PreTrainedModel
    n_before: int  # how many arguments may come by position before one that decides about a cache
    handle: RemovableHandle | None = None

    def put(self) -> None:
        """Register the hook."""
        hook = functools.partial(_without_cache, self.n_before)
        self.handle = self.model.register_forward_pre_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Remove the hook."""
        if self.handle is not None:
            self.handle.remove()


def _without_cache(
    n_before: int, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Set `use_cache=False` in training, unless the caller decides about the cache.

    `n_before` is the number of positional arguments before the first one that decides about the cache.
    """
    if not model.training or not torch.is_grad_enabled():
        return None
    if len(args) > n_before or any(kwargs.get(name) is not None for name in CACHE):
        return None
    return args, {**kwargs, "use_cache": False}


@dataclass
class NoReentry:
    """Makes a model's gradient checkpointing non-reentrant, whenever it is enabled.

    Reentrant checkpoints drop the gradients of layers whose input needs none, as behind frozen embeddings. To avoid
    this, transformers makes the outputs of token embeddings require gradients. Without reentry that is not needed. It
    would compute extra gradients, and BLIP's code fails with it, so this class undoes it.

    Attributes:
        model: The model.
        handle: The handle of the registered hook.
        replaced: Modules with the checkpointing function that each had before.
        asked: Whether transformers had made the token embeddings' outputs require gradients.
    """

    model: PreTrainedModel
    handle: RemovableHandle | None = None
    replaced: list[tuple[nn.Module, Any]] = field(default_factory=list)
    asked: bool = False

    def put(self) -> None:
        """Register the hook."""
        self.handle = self.model.register_forward_pre_hook(self._before_forward)

    def remove(self) -> None:
        """Restore the model's checkpointing functions and its hooks on the token embeddings."""
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
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        checkpointed = [block for block in blocks if block.gradient_checkpointing]
        functions = {getattr(block, _FUNCTION) for block in checkpointed if not is_whole(block)}
        others = [function for function in functions if isinstance(function, functools.partial)]
        reentrant = next((function for function in others if function.keywords.get("use_reentrant", True)), None)
        if reentrant is not None:
            without = _Checkpoint(reentrant, use_reentrant=False)
            for module in model.modules():
                if _FUNCTION in vars(module) and not is_whole(module):
                    self.replaced.append((module, vars(module)[_FUNCTION]))
                    vars(module)[_FUNCTION] = without
        if others and not _told.issuperset(checkpointed):  # models have others inside, with hooks like this
            _told.update(checkpointed)
            logger.warning(_MEANING, sum(not is_whole(block) for block in checkpointed), len(blocks))
        if checkpointed and getattr(model, "_require_grads_hooks", None):
            self.asked = True
            model.disable_input_require_grads()


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The blocks of which a line has said in which storage mode they are."""

_MEANING = (
    "gradient checkpointing is on: in %d of %d blocks that is the storage mode activations='checkpoint', without "
    "reentry; activations='recompute' in its place computes less again, so that steps are faster"
)


class _Checkpoint(functools.partial):
    """A checkpointing function that fastln has put in place. The class identifies it."""
