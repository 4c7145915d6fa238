"""Frozen linear layers in 8 bits: the operators and the autograd formula.

Nothing is kept for backward but the weight, which exists anyway. The gradient of `x` is a product with the same 8-bit
weight, and that of a bias that trains is the sum of the rows of `dy`, before they are rounded. Rows may be at hand in 8
bits (`fastln.ops.rounded`): because another layer has rounded them, as queries, keys and values come from the same
rows, or because the kernel that made them did.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.backends import implementation
from fastln.ops.dispatch import Ways, define, is_transformed, needs_operator, overridable, wants_gradient
from fastln.ops.linear import bias_gradient
from fastln.ops.rounded import Form, gradient_rows, input_rows
from fastln.ops.settings import DEFAULT, SCHEMA, OpSettings
from fastln_kernels.reference_int8 import Weight8

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_N_TENSORS = 10  # that the operator takes: x, the weight's four, the bias, the second term's four


class _Arguments(NamedTuple):
    """The arguments of a linear layer in 8 bits besides its tensors.

    Attributes:
        turned: Whether the weight is turned.
        dtype: The dtype of the result.
        settings: Which backend computes, and in which form.
    """

    turned: bool
    dtype: torch.dtype
    settings: OpSettings

    @staticmethod
    def schema() -> str:
        """Return how an operator's schema declares the scalars."""
        return f"bool turned, ScalarType dtype, {SCHEMA}"

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as scalars, in the order of the schema."""
        return (self.turned, self.dtype, *self.settings.flat)

    @classmethod
    def of(cls, turned: bool, dtype: torch.dtype, *flat: str) -> _Arguments:
        """Rebuild the arguments from the scalars of `flat`."""
        return cls(turned, dtype, OpSettings.of(*flat))


@overridable
def int8_linear(
    x: Tensor,
    weight: Weight8,
    bias: Tensor | None = None,
    *,
    rest: Weight8 | None = None,
    settings: OpSettings = DEFAULT,
) -> Tensor:
    """Compute `x Wᵀ + bias` with a frozen weight in 8 bits and `x` rounded to 8 bits, row by row; differentiable once.

    `fastln_kernels.reference_int8` defines it. Under autocast the result has the autocast dtype.

    Args:
        x: `(..., n_inner)`, of a floating dtype.
        weight: `(n_cols, n_inner)`.
        bias: `(n_cols,)`, frozen or trained, of a floating dtype, that of `x` or not, or None. It is added in float32.
        rest: The weight's second term: what rounding left over, in 8 bits. Its product with the same rows is added to
            the result before that is rounded to its dtype. The gradient does without it.
        settings: Which backend computes.

    Returns:
        `(..., n_cols)`.

    Raises:
        FastLNError: If shapes, dtypes or devices are not valid, the backend cannot run on the device of `x`, or
            torch.func's transforms are active: the derivative of rounding is zero almost everywhere.
    """
    if x.dtype not in _DTYPES or not x.ndim or x.shape[-1] != weight.values.shape[1]:
        raise FastLNError(
            f"x must be (..., {weight.values.shape[1]}), of a floating dtype; it is {(*x.shape,)} and {x.dtype}"
        )
    if is_transformed():
        raise FastLNError("layers in 8 bits have no derivatives by torch.func; prepare the model with products='exact'")
    if rest is not None and (rest.values.shape, rest.turned) != (weight.values.shape, weight.turned):
        raise FastLNError("the second term of a weight must have the first's shape, and be turned if the first is")
    arguments = _Arguments(weight.turned, _result_dtype(x), settings)
    bias = bias if bias is None else _checked_bias(bias, x, len(weight.values))
    tensors = (x, *_parts(weight), bias, *((None,) * 4 if rest is None else _parts(rest)))
    if needs_operator(*tensors):
        return _WAYS.operator(*tensors, *arguments.flat)
    if wants_gradient(x, bias):
        return _WAYS.function.apply(*tensors, arguments)
    return _linear(*tensors, arguments)


def _parts(weight: Weight8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return weight.values.contiguous(), weight.scale, weight.row_sums, weight.col_sums


def _checked_bias(bias: Tensor, x: Tensor, n_cols: int) -> Tensor:
    """Return a bias as kernels take it: contiguous, and at most as wide as float32, in which it is added."""
    if bias.shape != (n_cols,) or bias.dtype not in _DTYPES or bias.device != x.device:
        raise FastLNError(
            f"the bias must be ({n_cols},), of a floating dtype and on {x.device}, as x is; "
            f"it is {(*bias.shape,)}, {bias.dtype} and on {bias.device}"
        )
    return (bias.to(torch.float32) if bias.dtype == torch.float64 else bias).contiguous()


def _result_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    row_sums: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    *others: Any,
) -> Tensor:
    *parts, arguments = others
    kernels = implementation("int8_linear", x, arguments.settings)
    weight = Weight8(values, scale, arguments.turned, row_sums, col_sums)
    rows = input_rows(x, Form(kernels, x.shape[-1], arguments.turned))
    rest = None if parts[0] is None else Weight8(parts[0], parts[1], arguments.turned, parts[2], parts[3])
    y: Tensor = kernels.linear(rows, weight, bias, arguments.dtype, rest)
    # Autograd must not see a view, which could not be written to in place.
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


def _linear_backward(
    dy: Tensor,
    values: Tensor,
    scale: Tensor,
    row_sums: Tensor,
    col_sums: Tensor,
    arguments: _Arguments,
    form: Form | None = None,
) -> Tensor:
    kernels = implementation("int8_linear", dy, arguments.settings)
    weight = Weight8(values, scale, arguments.turned, row_sums, col_sums)
    form = Form(kernels, len(scale), factors=scale) if form is None else form
    dx: Tensor = kernels.linear_backward(gradient_rows(dy, form), weight, arguments.dtype)
    return dx.view(*dy.shape[:-1], dx.shape[-1])


def _fake_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    row_sums: Tensor,
    col_sums: Tensor,
    bias: Tensor | None,
    *others: Any,
) -> Tensor:
    *_, arguments = others
    return x.new_empty((*x.shape[:-1], values.shape[0]), dtype=arguments.dtype)


def _fake_linear_backward(
    dy: Tensor, values: Tensor, scale: Tensor, row_sums: Tensor, col_sums: Tensor, arguments: _Arguments
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], values.shape[1]), dtype=arguments.dtype)


def _keep(ctx: Any, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, arguments: _Arguments) -> None:
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*weight)
    ctx.arguments = arguments._replace(dtype=x.dtype)
    ctx.set_materialize_grads(False)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise FastLNError("int8_linear is differentiable once: its backward cannot run with create_graph=True")


class _EagerInt8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, *weight = inputs[:5]
        bias, arguments = inputs[5], inputs[-1]
        _keep(ctx, x, tuple(weight), bias, arguments)
        if ctx.needs_input_grad[0]:
            # The scale is the layer's own, which lives anyway.
            kernels, scale = implementation("int8_linear", x, arguments.settings), weight[1]
            ctx.takes = Form(kernels, len(scale), factors=scale)
        return _linear(*inputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = dys
        if dy is None:
            return (None,) * (_N_TENSORS + 1)
        _refuse_second_derivative()
        dx = None
        if ctx.needs_input_grad[0]:
            values, scale, row_sums, col_sums = ctx.saved_tensors
            dx = _linear_backward(dy, values, scale, row_sums, col_sums, ctx.arguments, ctx.takes)
        return dx, *(None,) * 4, _dbias(ctx, dy), *(None,) * (_N_TENSORS - 5)


def _dbias(ctx: Any, dy: Tensor) -> Tensor | None:
    return bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[5] else None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight = inputs[:5]
    _keep(ctx, x, tuple(weight), inputs[5], _Arguments.of(*inputs[_N_TENSORS:]))


def _operator_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    flat = ctx.arguments.flat
    if dy is None:
        return (None,) * (_N_TENSORS + len(flat))
    _refuse_second_derivative()
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.fastln.int8_linear_backward(dy, *ctx.saved_tensors, *flat)
    return dx, *(None,) * 4, _dbias(ctx, dy), *(None,) * (_N_TENSORS - 6 + len(flat))


_WEIGHT = "Tensor values, Tensor scale, Tensor row_sums, Tensor col_sums"
_REST = "Tensor? rest_values, Tensor? rest_scale, Tensor? rest_row_sums, Tensor? rest_col_sums"
define(
    "fastln::int8_linear",
    f"(Tensor x, {_WEIGHT}, Tensor? bias, {_REST}, {_Arguments.schema()}) -> Tensor",
    _Arguments,
    _linear,
    _fake_linear,
)
define(
    "fastln::int8_linear_backward",
    f"(Tensor dy, {_WEIGHT}, {_Arguments.schema()}) -> Tensor",
    _Arguments,
    _linear_backward,
    _fake_linear_backward,
)
torch.library.register_autograd("fastln::int8_linear", _operator_gradients, setup_context=_setup)
_WAYS = Ways(torch.ops.fastln.int8_linear.default, _EagerInt8Linear, _linear)
