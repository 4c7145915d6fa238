"""The last block of a model: after its attention, it computes only the tokens that are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers.utils import output_capturing

from fastln.late.rows import LazyRows
from fastln.late.when import may_be_late


@dataclass
class WaitingRows:
    """In training, defers the last block of a stack from its attention's output projection on.

    From there on, no token depends on another token. `fastln.late.rows` explains how the rows are computed later.

    Attributes:
        block: The last block.
        around: The modules that contain it, starting with the model.
        projection: The output projection of the block's last attention.
    """

    block: nn.Module
    around: tuple[nn.Module, ...]
    projection: nn.Module
    handle: RemovableHandle | None = None

    def put(self) -> None:
        """Start to defer the rows."""
        self.handle = self.projection.register_forward_pre_hook(self._wait)

    def remove(self) -> None:
        """Stop deferring: compute all rows immediately again."""
        if self.handle is not None:
            self.handle.remove()

    def _wait(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) != 1 or type(args[0]) is not Tensor or not projection.training or not may_be_late(args[0]):
            return None
        if not args[0].requires_grad and not any(parameter.requires_grad for parameter in self.block.parameters()):
            return None  # a frozen tower: cached features must equal, bit for bit, rows that are all computed at once
        others = [module for module in self.block.modules() if module is not projection]
        # Hooks may gather weights before a call and release them after it. A replaced forward may do the same, and so
        # may FSDP. FSDP1 then shows its own views of the weights; FSDP2 may do this for a module around this one.
        if not _unhooked(*others) or len(projection._forward_pre_hooks) > 1 or projection._forward_hooks:
            return None
        if any("forward" in vars(module) for module in (*others, projection)):
            return None
        if type(projection.weight) is not nn.Parameter or any(isinstance(around, FSDPModule) for around in self.around):
            return None
        return (LazyRows.of(args[0]),)


def _unhooked(*modules: nn.Module) -> bool:
    """Whether the modules have no hooks, apart from those with which transformers captures outputs: these stay set."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (hook for module in modules for kind in kinds for hook in getattr(module, kind).values())
    return all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks)
