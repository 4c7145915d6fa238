"""Models of which one kind of thing is changed, and whose parameters train as they did before."""

from torch import nn

import fastln
from fastln.standins.tricks import TRICKS


def prepare_only(model: nn.Module, *tricks: str) -> nn.Module:
    """Prepare `model` with these of the changes that `without` can leave out, and no other."""
    training = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fastln.prepare(model, "full", without=[name for name in TRICKS if name not in tricks])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(training[name])
    return model
