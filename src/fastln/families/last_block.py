"""Find the last block of each stack. After its attention, each token is computed independently."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastln.families.parts import attention_maps


@dataclass(frozen=True)
class LastBlock:
    """The last block of a stack of blocks.

    Attributes:
        name: The block's name in the model.
        projection: Name of the last linear layer of the block's last attention. If that is not the output projection,
            its whole result is needed, and the whole result is computed.
    """

    name: str
    projection: str


def last_blocks(model: nn.Module) -> list[LastBlock]:
    """Return the last block of each outermost stack whose last block contains attention."""
    linears = [name for name, module in attention_maps(model).items() if isinstance(module, nn.Linear | Conv1D)]
    found: dict[str, LastBlock] = {}
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or not len(stack) or name.startswith(tuple(found)):
            continue
        block = f"{name}.{len(stack) - 1}"
        inside = [linear for linear in linears if linear.startswith(f"{block}.")]
        if inside:
            found[f"{name}."] = LastBlock(block, inside[-1])
    return list(found.values())
