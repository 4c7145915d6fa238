"""Several processes that train one model: which of them this is, and what of the model is here."""

from __future__ import annotations

import os

from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one.

    The Trainer joins them by torch.distributed. Before that, and where only a head trains, there is torchrun's word: a
    rank among several, for a number alone may be a job's that has nothing to do with others.
    """
    if distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of `model` are distributed tensors, as FSDP2 makes them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor's values: where it is distributed those of all processes, which must all call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_class(model: nn.Module) -> type[nn.Module]:
    """Return the class that `model` was made of: FSDP2 gives it a subclass."""
    kind = type(model)
    return kind.__bases__[-1] if FSDPModule in kind.__bases__ else kind
