"""Linear layers with a frozen weight: the autograd formula, and when fastln's kernel is used.

The weight is kept for backward, which costs nothing: it exists anyway. The gradient of `x` is also a linear layer, with
the weight transposed. The bias may train: its gradient is the sum of `dy` over rows. torch computes the cases without a
kernel here: trained weights, GPUs, compilers, float16.

Where storage asks for it, a layer can make its result again for the backward of what reads it (`fastln.ops.again`).
Then a frozen layer is an operation of its own everywhere, also where torch computes its products.

Under autocast, torch makes a rounded copy of a frozen float32 weight in every call. Here the weight is rounded while it
is packed for the kernel, and the bias is not changed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastln.ops.again import MOST_PRODUCTS, Memo, Source, check_weight, makes_again, source_of
from fastln.ops.backends import resolve
from fastln.ops.dispatch import is_transformed, needs_operator, overridable, wants_gradient
from fastln.ops.settings import DEFAULT, OpSettings
from fastln_kernels.cpu import native_linear


@overridable
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transpose: bool = True,
    settings: OpSettings = DEFAULT,
) -> Tensor:
    """Compute `x weightᵀ + bias`, or `x weight + bias` without `transpose`; differentiable.

    Args:
        x: `(..., n_inner)`.
        weight: `(n_cols, n_inner)`, as `torch.nn.Linear` has it, or `(n_inner, n_cols)` without `transpose`.
        bias: `(n_cols,)` or None.
        transpose: Whether each row of `weight` gives one column of the result.
        settings: Which backend computes, and in which form.

    Returns:
        `(..., n_cols)`.

    Raises:
        FastLNError: If the backend cannot run on the device of `x`.
    """
    source = source_of(x, MOST_PRODUCTS - 1) if settings.keeps.again else None
    if _is_ours(x, weight, bias, settings):
        rows = x.to(_compute_dtype(x))
        if native_linear.has_own(rows, weight, bias, transpose=transpose):
            return _linear(rows, weight, bias, transpose, source)
    if source is not None and not is_transformed() and not wants_gradient(weight):
        rows = x.to(_compute_dtype(x))
        if rows.dtype == weight.dtype or rows.dtype != x.dtype:
            return _TorchLinear.apply(rows, weight, bias, transpose, source)
    return functional.linear(x, weight if transpose else weight.t(), bias)


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None, settings: OpSettings) -> bool:
    return (
        not needs_operator(x, weight, bias)
        and not is_transformed()
        and all(t is None or (t.is_cpu and t.layout is torch.strided) for t in (x, weight, bias))
        and not x.is_nested
        and (x.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
        and not wants_gradient(weight)
        and resolve("linear", x.device, settings).backend == "cpu"
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch would compute a linear layer of `x`."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not x.is_floating_point():
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transpose: bool, source: Source | None = None) -> Tensor:
    if wants_gradient(x, bias):
        return _FrozenLinear.apply(x, weight, bias, transpose, source)
    return _product(x, weight, bias, transpose)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, transpose: bool) -> Tensor:
    y = native_linear.linear(x.reshape(-1, x.shape[-1]), weight, bias, transpose=transpose)
    # Autograd must not see a view, which could not be written to in place.
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


class _FrozenLinear(torch.autograd.Function):
    """A layer whose products are fastln's."""

    compute = staticmethod(_product)

    @classmethod
    def forward(
        cls, ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transpose: bool, source: Source | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.transpose, ctx.bias_dtype = transpose, None if bias is None else bias.dtype
        if source is not None:

            def run(node: Any, memo: Memo) -> Tensor:
                (weight,) = node.saved_tensors
                check_weight(weight)
                return cls.compute(source.make(memo).to(dtype), weight, bias, transpose)

            dtype = x.dtype
            makes_again(ctx, run, source, n_products=1, reads=(bias,))
        return cls.compute(x, weight, bias, transpose)

    @classmethod
    def backward(cls, ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (weight,) = dys, ctx.saved_tensors
        dx = cls.gradient(dy, weight, not ctx.transpose) if ctx.needs_input_grad[0] else None
        return dx, None, bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[2] else None, None, None

    @staticmethod
    def gradient(dy: Tensor, weight: Tensor, transpose: bool) -> Tensor:
        return _linear(dy, weight, None, transpose)


class _TorchLinear(_FrozenLinear):
    """A layer whose products are torch's; only where its result may be made again."""

    @staticmethod
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None, transpose: bool) -> Tensor:
        weight, rows = weight.to(x.dtype), x.reshape(-1, x.shape[-1])
        y = functional.linear(rows, weight if transpose else weight.t(), None if bias is None else bias.to(x.dtype))
        return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def gradient(dy: Tensor, weight: Tensor, transpose: bool) -> Tensor:
        return _TorchLinear.compute(dy, weight, None, transpose)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a linear layer's bias: the sum of `dy` over rows, in float32 and in a fixed order.

    Args:
        dy: `(..., n_cols)`.
        dtype: The dtype of the bias.

    Returns:
        `(n_cols,)`, rounded once.
    """
    rows = dy.reshape(-1, dy.shape[-1])
    if dtype == dy.dtype:  # torch sums 16-bit numbers in float32; asked for float32, it would make a copy of them first
        return rows.sum(0)
    return rows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dtype)
