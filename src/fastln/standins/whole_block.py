"""Blocks of which autograd keeps nothing on the device but the input: computed again, or kept in the host's memory.

The seam is transformers' own: a `GradientCheckpointingLayer` calls a function with its forward, if it is told to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


class _Whole(functools.partial):
    """A checkpointing function that fastln has put in place. The class identifies it."""


def _offloaded(function: Callable[..., Any], *args: Any, use_reentrant: bool = False) -> Any:
    """Call a block. The other argument says, as for a checkpoint, that `NoReentry` has nothing to put right."""
    with save_on_cpu(pin_memory=True):
        return function(*args)


@dataclass
class WholeBlock:
    """Has a block's layers computed again in the backward, or has the host keep what they keep.

    Attributes:
        layers: Modules of the class `GradientCheckpointingLayer`.
        how: "checkpoint" or "offload".
        before: What each layer had in its own dictionary of the two attributes that change.
    """

    layers: list[nn.Module]
    how: str
    before: list[dict[str, Any]] = field(default_factory=list)

    def put(self) -> None:
        """Tell the layers."""
        self.before = [
            {name: vars(layer)[name] for name in (_FLAG, _FUNCTION) if name in vars(layer)} for layer in self.layers
        ]
        function = _Whole(checkpoint if self.how == "checkpoint" else _offloaded, use_reentrant=False)
        for layer in self.layers:
            vars(layer).update({_FLAG: True, _FUNCTION: function})

    def remove(self) -> None:
        """Give the layers back what they had, unless someone has told them something else since."""
        for layer, before in zip(self.layers, self.before, strict=False):
            if isinstance(vars(layer).get(_FUNCTION), _Whole):
                for name in (_FLAG, _FUNCTION):
                    vars(layer).pop(name, None)
                vars(layer).update(before)
