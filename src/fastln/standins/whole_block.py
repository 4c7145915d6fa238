"""Blocks of which autograd keeps nothing on the device but the input: computed again, or kept in the host's memory.

The seam is transformers' own: a `GradientCheckpointingLayer` calls a function with its forward, if it is told to.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


class _Whole(functools.partial):
    """A checkpointing function that fastln has put in place. The class identifies it."""


def _offloaded(function: Callable[..., Any], *args: Any) -> Any:
    with save_on_cpu(pin_memory=True):
        return function(*args)


@dataclass
class WholeBlock:
    """Has a block's layers computed again in the backward, or has the host keep what they keep.

    transformers' switch of gradient checkpoints writes to the same attributes. While it is on, layers do what it says;
    when it is off again, they do what they did before.

    Attributes:
        layers: Modules of the class `GradientCheckpointingLayer`.
        how: "checkpoint" or "offload".
        model: The model that they are in. Hooks of their own would keep their rows from waiting.
        before: What each layer had in its own dictionary of the two attributes that change.
        handle: The handle of the registered hook.
    """

    layers: list[nn.Module]
    how: str
    model: nn.Module
    before: list[dict[str, Any]] = field(default_factory=list)
    handle: RemovableHandle | None = None

    def put(self) -> None:
        """Tell the layers."""
        self.before = [_own(layer) for layer in self.layers]
        for layer in self.layers:
            self._tell(layer)
        self.handle = self.model.register_forward_pre_hook(self._before_forward)

    def remove(self) -> None:
        """Give the layers back what they had, unless someone has told them something else since."""
        if self.handle is not None:
            self.handle.remove()
        for layer, before in zip(self.layers, self.before, strict=False):
            if is_whole(layer):
                for name in (_FLAG, _FUNCTION):
                    vars(layer).pop(name, None)
                vars(layer).update(before)
        self.before, self.handle = [], None

    def _tell(self, layer: nn.Module) -> None:
        function = _Whole(checkpoint, use_reentrant=False) if self.how == "checkpoint" else _Whole(_offloaded)
        vars(layer).update({_FLAG: True, _FUNCTION: function})

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        for index, layer in enumerate(self.layers):
            if not getattr(layer, _FLAG):
                self.before[index] = _own(layer)
                self._tell(layer)
                _say_that_it_stays(self.how)


def is_whole(layer: nn.Module) -> bool:
    """Whether a layer does what a `WholeBlock` told it."""
    return isinstance(vars(layer).get(_FUNCTION), _Whole)


def _own(layer: nn.Module) -> dict[str, Any]:
    return {name: vars(layer)[name] for name in (_FLAG, _FUNCTION) if name in vars(layer)}


@functools.cache
def _say_that_it_stays(how: str) -> None:
    logger.warning(
        "gradient checkpointing was switched off, but blocks whose storage mode is %r keep that: fastln.restore() "
        "and prepare with other `activations` to change it",
        how,
    )
