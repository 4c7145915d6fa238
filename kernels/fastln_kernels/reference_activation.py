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
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from fastln_kernels.reference import arithmetic_dtype
from fastln_kernels.reference_codes import (
    Bits,
    GatedBits,
    GatedCodes,
    decode_groups,
    decode_slopes,
    encode_groups,
    encode_slopes,
)

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


@overload
def activation_forward(x: Tensor, kind: ActivationKind, *, bits: None = None) -> Tensor: ...
@overload
def activation_forward(x: Tensor, kind: ActivationKind, *, bits: Bits) -> tuple[Tensor, Tensor]: ...
def activation_forward(x: Tensor, kind: ActivationKind, *, bits: Bits | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Apply an activation. The result is contiguous, with the shape and dtype of `x` (any floating dtype).

    Args:
        x: `(..., n_cols)`.
        kind: The kind of activation.
        bits: If given, the codes of the derivative, with so many bits, are returned too: `(..., ceil(n_cols * bits /
            8))`, uint8, contiguous. See `fastln_kernels.reference_codes`.
    """
    wide = _wide(x)
    y = _value(wide, kind).to(x.dtype).contiguous()
    if bits is None:
        return y
    return y, encode_slopes(_times_slope(torch.ones_like(wide), wide, kind), kind, bits)


def activation_backward(dy: Tensor, saved: Tensor, kind: ActivationKind, *, bits: Bits | None = None) -> Tensor:
    """Compute dx, contiguous, with the shape and dtype of `dy`.

    Args:
        dy: The gradient of the result.
        saved: The activation's input, or the codes of its derivative. For "relu" its output works too, because only the
            sign matters.
        kind: The kind of activation.
        bits: If given, `saved` holds codes of so many bits.
    """
    wide = _wide(dy)
    if bits is None:
        dx = _times_slope(wide, _wide(saved), kind)
    else:
        slope = decode_slopes(saved, kind, bits, dy.shape, wide.dtype)
        dx = torch.where(slope == 0, 0.0, wide) if kind == "relu" else wide * slope
    return dx.to(dy.dtype).contiguous()


@overload
def gated_forward(gate: Tensor, up: Tensor, kind: ActivationKind, *, bits: None = None) -> Tensor: ...
@overload
def gated_forward(gate: Tensor, up: Tensor, kind: ActivationKind, *, bits: GatedBits) -> tuple[Tensor, GatedCodes]: ...
def gated_forward(
    gate: Tensor, up: Tensor, kind: ActivationKind, *, bits: GatedBits | None = None
) -> Tensor | tuple[Tensor, GatedCodes]:
    """Compute `activation(gate) * up`, contiguous, with the shape and dtype of `gate`.

    Args:
        gate: The activation's input.
        up: Same shape and dtype as `gate`.
        kind: The kind of activation.
        bits: If given, codes of the factors of the gradients, with so many bits, are returned too.
    """
    wide = _wide(gate)
    value = _value(wide, kind)
    y = (value * up).to(gate.dtype).contiguous()
    if bits is None:
        return y
    codes, value_scale = encode_groups(value, bits)
    slopes, slope_scale = encode_groups(_times_slope(_wide(up), wide, kind), bits)
    return y, GatedCodes(codes, slopes, value_scale, slope_scale)


def gated_backward(
    dy: Tensor,
    gate: Tensor | GatedCodes,
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
        gate: As in the forward; or the codes that the forward returned.
        up: As in the forward; may be None if only `dup` is requested, or if there are codes.
        kind: As in the forward.
        need_dgate: Whether to compute the gradient of `gate`.
        need_dup: Whether to compute the gradient of `up`.
        out: Tensors that receive the gradients and are returned. Their columns must be contiguous (two halves of one
            tensor work). By default, new contiguous tensors.
    """
    dy_wide = _wide(dy)
    dgate = dup = None
    if need_dgate:
        if isinstance(gate, GatedCodes):
            dgate = dy_wide * decode_groups(gate.slope, gate.slope_scale, dy.shape, dy_wide.dtype)
        else:
            assert up is not None
            dgate = _times_slope(dy_wide * up, _wide(gate), kind)
        dgate = dgate.to(dy.dtype).contiguous()
    if need_dup:
        if isinstance(gate, GatedCodes):
            value = decode_groups(gate.value, gate.value_scale, dy.shape, dy_wide.dtype)
        else:
            value = _value(_wide(gate), kind)
        dup = (dy_wide * value).to(dy.dtype).contiguous()
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
