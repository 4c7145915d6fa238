"""Activations in Triton, plain and gated, forward and backward. kernels/README.md has the formulas.

Values are cast to float32 before any arithmetic. Addresses are int64. A program processes one block of neighbouring
elements of one row. If all tensors are contiguous, they are treated as one row. Element counts are run-time arguments
on which Triton does not specialise. At compile time only one thing is known about them: whether they are whole 16-byte
vectors. If so, the mask is the same for a whole vector, and accesses stay 16 bytes wide. Each kernel has two versions.

Rows may have any stride (gate and up may be two halves of one tensor). Tensors with non-contiguous columns are copied.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastln_kernels import launch, reference_activation
from fastln_kernels.reference_activation import ActivationKind, GatedGradients

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
    relative error of at most 2.8e-4. It reuses the exponential of the backward, so it takes fewer instructions than
    erf.
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


@triton.jit
def block_of(n_cols, blocks_a_row, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Return this program's row (int64), columns and mask. `VECTOR` neighbours share one mask value."""
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    start = (tl.program_id(0) % blocks_a_row).to(tl.int64) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    return row, cols, tl.max_constancy(cols < n_cols, VECTOR)


@triton.jit(do_not_specialize=["n_cols", "blocks_a_row"])
def forward_kernel(
    x_ptr,
    up_ptr,
    y_ptr,
    n_cols,
    blocks_a_row,
    x_stride,
    up_stride,
    y_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute `y = activation(x)`, or `activation(x) * up` if there is an `up`."""
    row, cols, mask = block_of(n_cols, blocks_a_row, BLOCK, VECTOR)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0)
    y = value(x.to(tl.float32), KIND)
    if up_ptr is not None:
        y *= up.to(tl.float32)
    tl.store(y_ptr + row * y_stride + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_cols", "blocks_a_row"])
def backward_kernel(
    dy_ptr,
    x_ptr,
    up_ptr,
    dx_ptr,
    dup_ptr,
    n_cols,
    blocks_a_row,
    dy_stride,
    x_stride,
    up_stride,
    dx_stride,
    dup_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute the requested gradients of `x` and `up`. A plain activation has no `up` and no `dup`."""
    row, cols, mask = block_of(n_cols, blocks_a_row, BLOCK, VECTOR)
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0)
    dy = dy.to(tl.float32)
    x = x.to(tl.float32)
    if dx_ptr is not None:
        dvalue = dy
        if up_ptr is not None:
            dvalue *= up.to(tl.float32)
        tl.store(dx_ptr + row * dx_stride + cols, times_slope(dvalue, x, KIND), mask=mask)
    if dup_ptr is not None:
        tl.store(dup_ptr + row * dup_stride + cols, dy * value(x, KIND), mask=mask)


def activation_forward(x: Tensor, kind: ActivationKind) -> Tensor:
    """Apply an activation.

    This and the other three functions have the arguments and results of those in
    `fastln_kernels.reference_activation`, for float32, bfloat16 and float16.
    """
    return _forward(x, None, kind)


def activation_backward(dy: Tensor, saved: Tensor, kind: ActivationKind) -> Tensor:
    """Compute dx."""
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    _launch(backward_kernel, (dy, saved, None), (dx, None), kind)
    return dx


def gated_forward(gate: Tensor, up: Tensor, kind: ActivationKind) -> Tensor:
    """Compute `activation(gate) * up`."""
    return _forward(gate, up, kind)


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
    """Compute only the requested gradients. The kernel loads and stores nothing for the others."""
    wanted = (need_dgate, need_dup)
    if out is None:
        out = GatedGradients(
            *(torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) if need else None for need in wanted)
        )
    if any(wanted):
        results = tuple(t if need else None for t, need in zip(out, wanted, strict=True))
        _launch(backward_kernel, (dy, gate, up if need_dgate else None), results, kind)
    return out


def _forward(x: Tensor, up: Tensor | None, kind: ActivationKind) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(forward_kernel, (x, up), (y,), kind)
    return y


def _launch(
    kernel: Any, inputs: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...], kind: ActivationKind
) -> None:
    """Launch a kernel. All tensors have the same shape, and the results have contiguous columns."""
    given = [t for t in (*inputs, *results) if t is not None]
    if given[0].numel() == 0:
        return
    flat = all(t.is_contiguous() for t in given)
    shape = (1, -1) if flat else (-1, given[0].shape[-1])
    rows = [t if t is None else t.view(shape) if flat else _unit_columns(t.reshape(shape)) for t in inputs]
    rows += [t if t is None else t.view(shape) for t in results]
    n_rows, n_cols = next(t.shape for t in rows if t is not None)
    block = launch.elementwise_block(given[0].element_size())
    blocks_a_row = triton.cdiv(n_cols, block.cols)
    vector = 16 // given[0].element_size()
    # A single row needs no stride. Triton treats 0 as a multiple of 16, so pass 0.
    strides = (0 if t is None or flat else t.stride(0) for t in rows)
    options = {
        "KIND": kind,
        "BLOCK": block.cols,
        "VECTOR": 1 if n_cols % vector else vector,
        "num_warps": block.warps,
        "enable_fp_fusion": True,
    }
    with launch.on_device(given[0].device):
        kernel[(n_rows * blocks_a_row,)](*rows, n_cols, blocks_a_row, *strides, **options)


def _unit_columns(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
