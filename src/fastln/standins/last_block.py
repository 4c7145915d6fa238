"""The last block of a model: what comes after its attention is computed for the tokens that are read."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D
from transformers.utils import output_capturing

from fastln.families.parts import attention_maps
from fastln.late.rows import LazyRows
from fastln.standins.modules import may_be_late


def spare_last_rows(model: nn.Module) -> list[RemovableHandle]:
    """Have the last block of every stack in `model` wait, in training, from its attention's output projection on.

    What is computed of a token there depends on no other token; `fastln.late.rows` tells what becomes of it.

    Returns:
        The handles that undo it.
    """
    return [
        projection.register_forward_pre_hook(functools.partial(_wait, block, around))
        for block, around, projection in _last_projections(model)
    ]


def _last_projections(model: nn.Module) -> list[tuple[nn.Module, tuple[nn.Module, ...], nn.Module]]:
    """Return the last block of each outermost stack of blocks, the modules around it, and the projection in it.

    That is the last linear layer of the block's last attention.

    Where that is another layer than the output projection, its result is wanted whole, and is computed whole.
    """
    linears = [name for name, module in attention_maps(model).items() if isinstance(module, nn.Linear | Conv1D)]
    found: dict[str, tuple[nn.Module, tuple[nn.Module, ...], nn.Module]] = {}
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or not len(stack) or name.startswith(tuple(found)):
            continue
        inside = [linear for linear in linears if linear.startswith(f"{name}.{len(stack) - 1}.")]
        if inside:
            parts = name.split(".")
            around = tuple(model.get_submodule(".".join(parts[:n])) for n in range(len(parts)))
            found[f"{name}."] = stack[-1], around, model.get_submodule(inside[-1])
    return list(found.values())


def _unhooked(*modules: nn.Module) -> bool:
    """Whether no module has hooks but transformers' that capture outputs, which stay once they were needed."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (hook for module in modules for kind in kinds for hook in getattr(module, kind).values())
    return all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks)


def _wait(
    block: nn.Module, around: tuple[nn.Module, ...], projection: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    if len(args) != 1 or type(args[0]) is not Tensor or not projection.training or not may_be_late(args[0]):
        return None
    if not args[0].requires_grad and not any(parameter.requires_grad for parameter in block.parameters()):
        return None  # a frozen tower: a cache may have its features, with the bits of all rows computed at once
    others = [module for module in block.modules() if module is not projection]
    # Hooks may gather weights around a call and release them after it, as may a forward put in the class's place, and
    # FSDP: its first form shows views of its own meanwhile, its second may do so for a module around this one.
    if not _unhooked(*others) or len(projection._forward_pre_hooks) > 1 or projection._forward_hooks:
        return None
    if any("forward" in vars(module) for module in (*others, projection)):
        return None
    if type(projection.weight) is not nn.Parameter or any(isinstance(module, FSDPModule) for module in around):
        return None
    return (LazyRows.of(args[0]),)
