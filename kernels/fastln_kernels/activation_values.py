"""Activations of one element and their slopes, for kernels. kernels/README.md has the formulas."""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import math

import triton
import triton.language as tl

from fastln_kernels import reference_activation

RSQRT_TWO_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
QUICK_GELU_SLOPE = tl.constexpr(reference_activation.QUICK_GELU_SLOPE)
GELU_TANH_SLOPE = tl.constexpr(reference_activation.GELU_TANH_SLOPE)
GELU_TANH_CUBIC = tl.constexpr(reference_activation.GELU_TANH_CUBIC)


@triton.jit
def bell(x):
    """Return `exp(-x^2 / 2)`."""
    return tl.exp(-0.5 * x * x)


@triton.jit
def normal_share(x, bell_of_x):
    """Return the normal distribution function of `x`.

    At -|x| it is `exp(-x^2 / 2) p(t)` with `t = 1 / (1 + 0.285 |x|)`. This is the form of Hastings' approximation
    7.1.26 in Abramowitz and Stegun, with p fitted to an absolute error of at most 2.8e-8 (half a rounding of 1) and a
    relative error of at most 2.8e-4. It reuses the exponential of the backward, so it is shorter than erf.
    """
    # A reciprocal square root is one instruction; a division is eight.
    root = tl.rsqrt(1 + 0.285 * tl.abs(x))
    t = root * root
    p = 0.3285763208304476 - 0.0957163233615396 * t
    p = -0.14884338820886783 + p * t
    p = 0.21038475570167567 + p * t
    p = 0.08983254610032954 + p * t
    p = 0.11576610817632839 + p * t
    below = bell_of_x * (p * t)
    return tl.where(x < 0, below, 1 - below)


@triton.jit
def share(x, KIND: tl.constexpr):
    """Return the factor on `x`, from 0 to 1. If the exponential overflows, the result is 0, which is correct."""
    if KIND == "gelu":
        return normal_share(x, bell(x))
    elif KIND == "gelu_tanh":
        return tl.sigmoid(x * GELU_TANH_SLOPE * (x * x * GELU_TANH_CUBIC + 1))
    elif KIND == "quick_gelu":
        return tl.sigmoid(x * QUICK_GELU_SLOPE)
    else:
        tl.static_assert(KIND == "silu")
        return tl.sigmoid(x)


@triton.jit
def value(x, KIND: tl.constexpr):
    """Return the activation of `x`."""
    if KIND == "relu":
        return tl.where(x <= 0, 0.0, x)  # keeps NaN
    else:
        return x * share(x, KIND)


@triton.jit
def times_slope(dy, x, KIND: tl.constexpr):
    """Return `dy` times the derivative of the activation at `x`."""
    if KIND == "relu":
        return tl.where(x <= 0, 0.0, dy)
    else:
        if KIND == "gelu":
            bell_of_x = bell(x)
            return dy * (normal_share(x, bell_of_x) + x * bell_of_x * RSQRT_TWO_PI)
        s = share(x, KIND)
        left = x * s * (1 - s)
        if KIND == "gelu_tanh":
            # Clamp the square: infinity times the 0 of `left` would be NaN.
            square = tl.minimum(x * x, 1e30, propagate_nan=tl.PropagateNan.ALL)
            left *= (square * (3 * GELU_TANH_CUBIC) + 1) * GELU_TANH_SLOPE
        elif KIND == "quick_gelu":
            left *= QUICK_GELU_SLOPE
        return dy * (s + left)
