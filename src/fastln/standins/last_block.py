"""The last block of a model: what comes after its attention is computed for the tokens that are read."""

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
    """Has the last block of a stack wait, in training, from its attention's output projection on.

    What is computed of a token there depends on no other token; `fastln.late.rows` tells what becomes of it.

    Attributes:
        block: The last block.
        around: The modules that hold it, from the model on.
        projection: The output projection of the block's last attention.
    """

    block: nn.Module
    around: tuple[nn.Module, ...]
    projection: nn.Module
    handle: RemovableHandle | None = None

    def put(self) -> None:
        """Begin to wait."""
        self.handle = self.projection.register_forward_pre_hook(self._wait)

    def remove(self) -> None:
        """Compute all rows at once again."""
        if self.handle is not None:
            self.handle.remove()

    def _wait(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) != 1 or type(args[0]) is not Tensor or not projection.training or not may_be_late(args[0]):
            return None
        if not args[0].requires_grad and not any(parameter.requires_grad for parameter in self.block.parameters()):
            return None  # a frozen tower: a cache may have its features, with the bits of all rows computed at once
        others = [module for module in self.block.modules() if module is not projection]
        # Hooks may gather weights around a call and release them after it, as may a forward put in the class's place,
        # and FSDP: its first form shows views of its own meanwhile, its second may do so for a module around this one.
        if not _unhooked(*others) or len(projection._forward_pre_hooks) > 1 or projection._forward_hooks:
            return None
        if any("forward" in vars(module) for module in (*others, projection)):
            return None
        if type(projection.weight) is not nn.Parameter or any(isinstance(around, FSDPModule) for around in self.around):
            return None
        return (LazyRows.of(args[0]),)


def _unhooked(*modules: nn.Module) -> bool:
    """Whether no module has hooks but transformers' that capture outputs, which stay once they were needed."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (hook for module in modules for kind in kinds for hook in getattr(module, kind).values())
    return all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks)
