"""Whether a module's result may be computed after the module has returned."""

from __future__ import annotations

import torch
from torch import Tensor

from fastln.late.rows import LazyRows


def may_be_late(x: Tensor) -> bool:
    """Whether a module may return a late result for `x`, to be computed after the module has returned."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and type(x) in (Tensor, LazyRows)  # fakes, proxies and distributed tensors are others
        and x.ndim > 1
        and torch.amp.is_autocast_available(x.device.type)  # not on meta tensors
    )
