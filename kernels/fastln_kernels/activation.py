"""Activations in Triton, plain and gated, forward and backward; README.md beside this package has the formulas.

Values are cast to float32 before any arithmetic; addresses are int64. A program takes one block of neighbouring
elements of one row, and tensors that are all contiguous count as a single row. Element counts are run-time arguments
that Triton does not specialise on; only whether they are whole 16-byte vectors is known when a kernel is compiled (two
versions), for then the mask is the same for a whole vector and accesses stay 16 bytes wide.

A row stride may be anything (gate and up may be two halves of one tensor); columns that are not contiguous are copied.
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

    Of -|x| it is `exp(-x^2 / 2) p(t)`, `t = 1 / (1 + 0.285 |x|)`: the form of Hastings' approximation 7.1.26 in
    Abramowitz and Stegun, with p fitted to err by at most 2.8e-8 (half a rounding of 1) and by 2.8e-4 of the result,
    however small. With the backward's exponential in it, it takes two thirds of the instructions that a library's erf
    does, which cost more time than the memory.
    """
    # A square root's reciprocal is one instruction, a quotient is eight.
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
    """Return what `x` is multiplied by, from 0 to 1; an exponential that overflows makes the 0 that is right."""
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
        return tl.where(x <= 0, 0.0, x)  # NaN stays
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
            # An infinite square would meet the 0 of `left`.
            square = tl.minimum(x * x, 1e30, propagate_nan=tl.PropagateNan.ALL)
            left *= (square * (3 * GELU_TANH_CUBIC) + 1) * GELU_TANH_SLOPE
        elif KIND == "quick_gelu":
            left *= QUICK_GELU_SLOPE
        return dy * (s + left)


@triton.jit
def block_of(n_cols, blocks_a_row, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Return this program's row (int64), columns and mask, which is the same for each `VECTOR` neighbours."""
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
    """`y = activation(x)`, times `up` where there is one."""
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
    """The gradients of `x` and `up` that are wanted; a plain activation has no `up` and no `dup`."""
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

    Takes and returns what `fastln_kernels.reference_activation.activation_forward` does, for float32, bfloat16 and
    float16. The other three functions follow the definition likewise.
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
    """Compute the gradients that are wanted; nothing is loaded or stored for the others."""
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
    """Launch over tensors of one shape; the results' columns are contiguous."""
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
    # A single row needs no stride, and 0 is one that Triton takes for a multiple of 16.
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
