"""Distributed training: whether this is the first process, and whether the model is sharded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar, cast

from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one.

    torch.distributed decides once the Trainer has initialised it. Before that, and when only a head trains, torchrun's
    environment variables decide. A RANK counts only if WORLD_SIZE is not 1: a job scheduler may set RANK for jobs that
    run alone.
    """
    if distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def from_first_process(find: Callable[[], T], *, on_cpu: bool) -> T:
    """Return what `find` returns in the first process, in all of them. Every process must call this.

    Args:
        find: Runs in the first process only. Its result must be picklable.
        on_cpu: Whether the processes train on CPUs. This initialises torch.distributed, as the Trainer would.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" and not distributed.is_initialized():
        return find()
    from accelerate import PartialState  # slow to import, and needed here only
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=on_cpu)
    found = [find() if is_first_process() else None]
    broadcast_object_list(found)
    return cast(T, found[0])


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of `model` is a distributed tensor, as in FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """Return the full values of a tensor. If it is distributed, all processes must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_class(model: nn.Module) -> type[nn.Module]:
    """Return the class that `model` was made of: FSDP2 gives it a subclass."""
    kind = type(model)
    return kind.__bases__[-1] if FSDPModule in kind.__bases__ else kind
