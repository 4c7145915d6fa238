"""Which linear layers of a model fastln computes: the frozen ones, where it has the faster way."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D as StockConv1D

from fastln.ops.backends import resolve
from fastln.ops.settings import OpSettings
from fastln.standins.modules import Conv1D, Linear, stand_in


def use_fast_linears(model: nn.Module, backend: str, device: torch.device) -> None:
    """Have fastln compute the linear layers of `model` whose weight does not train, in place.

    Args:
        model: Any module.
        backend: A name from `fastln.ops.backends.BACKENDS`.
        device: Where the model is. Where fastln has no linear layers of its own, nothing changes.
    """
    if resolve("linear", device, OpSettings(backend)).backend != "cpu":
        return
    for module in model.modules():
        if type(module) in _STAND_INS and not module.weight.requires_grad:
            stand_in(module, _STAND_INS[type(module)], backend)


_STAND_INS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, StockConv1D: Conv1D}
