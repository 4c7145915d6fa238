"""Activations in plain PyTorch: the definition for testing the other implementations.

Arithmetic is as in `fastln_kernels.reference`: float32, or float64 for float64 inputs, rounded once at the end. Every
function takes tensors of any shape and strides.

Four of the five are `x * s(x)`, where s is a distribution function, written to avoid cancellation for s near 0:

| kind       | s(x)                                                  | source                                      |
|------------|-------------------------------------------------------|---------------------------------------------|
| gelu       | erfc(-x / sqrt(2)) / 2, the normal distribution's     | Hendrycks and Gimpel, arXiv 1606.08415      |
| gelu_tanh  | sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))            | there, with (1 + tanh(u)) / 2 = sigmoid(2u) |
| quick_gelu | sigmoid(1.702 x)                                      | there                                       |
| silu       | sigmoid(x)                                            | there                                       |
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastln_kernels.reference import arithmetic_dtype

ActivationKind = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]
"""The kinds of activation. With a gate, "gelu" is GEGLU and "silu" is SwiGLU (Shazeer, arXiv 2002.05202)."""

ACTIVATION_KINDS: tuple[ActivationKind, ...] = get_args(ActivationKind)

QUICK_GELU_SLOPE = 1.702
GELU_TANH_SLOPE = 2 * math.sqrt(2 / math.pi)
GELU_TANH_CUBIC = 0.044715


class GatedGradients(NamedTuple):
    """The results of `gated_backward`; None for those that were not requested.

    Attributes:
        dgate: Same shape and dtype as `dy`.
        dup: Likewise.
    """

    dgate: Tensor | None
    dup: Tensor | None


def activation_forward(x: Tensor, kind: ActivationKind) -> Tensor:
    """Apply an activation. The result is contiguous, with the shape and dtype of `x` (any floating dtype)."""
    return _value(_wide(x), kind).to(x.dtype).contiguous()


def activation_backward(dy: Tensor, saved: Tensor, kind: ActivationKind) -> Tensor:
    """Compute dx, contiguous, with the shape and dtype of `dy`.

    Args:
        dy: The gradient of the result.
        saved: The activation's input. For "relu" its output works too, because only the sign matters.
        kind: The kind of activation.
    """
    return _times_slope(_wide(dy), _wide(saved), kind).to(dy.dtype).contiguous()


def gated_forward(gate: Tensor, up: Tensor, kind: ActivationKind) -> Tensor:
    """Compute `activation(gate) * up`, contiguous, with the shape and dtype of `gate`.

    Args:
        gate: The activation's input.
        up: Same shape and dtype as `gate`.
        kind: The kind of activation.
    """
    return (_value(_wide(gate), kind) * up).to(gate.dtype).contiguous()


def gated_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: ActivationKind,
    *,
    need_dgate: bool = False,
    need_dup: bool = False,
    out: GatedGradients | None = None,
) -> GatedGradients:
    """Compute only the requested gradients.

    Args:
        dy: The gradient of the result.
        gate: As in the forward.
        up: As in the forward; may be None if only `dup` is requested.
        kind: As in the forward.
        need_dgate: Whether to compute the gradient of `gate`.
        need_dup: Whether to compute the gradient of `up`.
        out: Tensors that receive the gradients and are returned. Their columns must be contiguous (two halves of one
            tensor work). By default, new contiguous tensors.
    """
    dy_wide, gate = _wide(dy), _wide(gate)
    dgate = dup = None
    if need_dgate:
        assert up is not None
        dgate = _times_slope(dy_wide * up, gate, kind).to(dy.dtype).contiguous()
    if need_dup:
        dup = (dy_wide * _value(gate, kind)).to(dy.dtype).contiguous()
    if out is None:
        return GatedGradients(dgate, dup)
    for buffer, gradient in zip(out, (dgate, dup), strict=True):
        if gradient is not None:
            assert buffer is not None
            buffer.copy_(gradient)
    return out


def _value(x: Tensor, kind: ActivationKind) -> Tensor:
    if kind == "relu":
        return torch.where(x <= 0, 0.0, x)  # keeps NaN
    return x * _share(x, kind)


def _times_slope(dy: Tensor, x: Tensor, kind: ActivationKind) -> Tensor:
    """Return `dy` times the derivative at `x`. With `s = sigmoid(z(x))` the derivative is `s + x s (1 - s) z'(x)`."""
    if kind == "relu":
        return torch.where(x <= 0, 0.0, dy)
    share = _share(x, kind)
    if kind == "gelu":
        return dy * (share + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))
    left = x * share * (1 - share)
    if kind == "silu":
        return dy * (share + left)
    if kind == "quick_gelu":
        return dy * (share + left * QUICK_GELU_SLOPE)
    # Clamp the square: infinity times the 0 of `left` would be NaN.
    square = (x * x).clamp(max=1e30)
    return dy * (share + left * (GELU_TANH_SLOPE * (1 + 3 * GELU_TANH_CUBIC * square)))


def _share(x: Tensor, kind: ActivationKind) -> Tensor:
    if kind == "gelu":
        return 0.5 * torch.erfc(x * -math.sqrt(0.5))
    if kind == "gelu_tanh":
        return torch.sigmoid(GELU_TANH_SLOPE * x * (1 + GELU_TANH_CUBIC * x * x))
    return torch.sigmoid(QUICK_GELU_SLOPE * x if kind == "quick_gelu" else x)


def _wide(x: Tensor) -> Tensor:
    return x.to(arithmetic_dtype(x))
