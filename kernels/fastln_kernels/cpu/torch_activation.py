"""Activations for CPU tensors, computed by torch's fused kernels in float32 and rounded once.

torch has no kernels for "quick_gelu", for gated activations and for codes. The reference computes those.
"""

from typing import overload

import torch
from torch import Tensor

from fastln_kernels import reference_activation
from fastln_kernels.reference_activation import ActivationKind, gated_backward, gated_forward
from fastln_kernels.reference_codes import Bits

__all__ = ["activation_backward", "activation_forward", "gated_backward", "gated_forward"]

_aten = torch.ops.aten
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


@overload
def activation_forward(x: Tensor, kind: ActivationKind, *, bits: None = None) -> Tensor: ...
@overload
def activation_forward(x: Tensor, kind: ActivationKind, *, bits: Bits) -> tuple[Tensor, Tensor]: ...
def activation_forward(x: Tensor, kind: ActivationKind, *, bits: Bits | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Apply an activation, as `fastln_kernels.reference_activation.activation_forward` does."""
    if bits is not None:
        return reference_activation.activation_forward(x, kind, bits=bits)
    x = x.contiguous()
    if kind in _APPROXIMATE:
        return _aten.gelu.default(x, approximate=_APPROXIMATE[kind])
    if kind == "silu":
        return _aten.silu.default(x)
    if kind == "relu":
        return _aten.relu.default(x)
    return reference_activation.activation_forward(x, kind)


def activation_backward(dy: Tensor, saved: Tensor, kind: ActivationKind, *, bits: Bits | None = None) -> Tensor:
    """Compute dx, as `fastln_kernels.reference_activation.activation_backward` does."""
    if bits is not None:
        return reference_activation.activation_backward(dy, saved, kind, bits=bits)
    dy, saved = dy.contiguous(), saved.contiguous()
    if kind in _APPROXIMATE:
        return _aten.gelu_backward.default(dy, saved, approximate=_APPROXIMATE[kind])
    if kind == "silu":
        return _aten.silu_backward.default(dy, saved)
    if kind == "relu":
        return _aten.threshold_backward.default(dy, saved, 0)
    return reference_activation.activation_backward(dy, saved, kind)
