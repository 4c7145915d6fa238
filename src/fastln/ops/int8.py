"""Frozen linear layers in 8 bits: the operators and the autograd formula.

Nothing is kept for backward but the weight, which exists anyway. Where storage asks for it, a layer can make its result
again for the backward of what reads it (`fastln.ops.again`). The gradient of `x` is a product with the same 8-bit
weight, and that of a bias that trains is the sum of the rows of `dy`, before they are rounded. Rows may be at hand in 8
bits (`fastln.ops.rounded`): because another layer has rounded them, as queries, keys and values come from the same
rows, or because the kernel that made them did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.again import MOST_PRODUCTS, Memo, check_weight, makes_again, source_of
from fastln.ops.backends import implementation
from fastln.ops.dispatch import define, is_transformed, needs_operator, overridable, wants_gradient
from fastln.ops.linear import bias_gradient
from fastln.ops.rounded import Form, gradient_rows, input_rows
from fastln.ops.settings import DEFAULT, SCHEMA, OpSettings
from fastln_kernels.reference_int8 import Weight8

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_unsafe_view = torch.ops.aten._unsafe_view.default
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


class _Layer(NamedTuple):
    """What eager mode's function is told about a layer in one argument, because each costs time.

    Attributes:
        weight: The weight.
        rest: Its second term, or None.
        dtype: The dtype of the result.
        settings: Which backend computes, and in which form.
    """

    weight: Weight8
    rest: Weight8 | None
    dtype: torch.dtype
    settings: OpSettings


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
    values = weight.values
    shape = values.shape
    if x.dtype not in _DTYPES or not x.ndim or x.shape[-1] != shape[1]:
        raise FastLNError(f"x must be (..., {shape[1]}), of a floating dtype; it is {(*x.shape,)} and {x.dtype}")
    if is_transformed():
        raise FastLNError("layers in 8 bits have no derivatives by torch.func; prepare the model with products='exact'")
    if rest is not None and (rest.values.shape, rest.turned) != (shape, weight.turned):
        raise FastLNError("the second term of a weight must have the first's shape, and be turned if the first is")
    bias = bias if bias is None else _checked_bias(bias, x, shape[0])
    dtype = _result_dtype(x)
    if needs_operator(x, values, bias):
        arguments = _Arguments(weight.turned, dtype, settings)
        return _operator(x, *_parts(weight), bias, *_parts(rest), *arguments.flat)
    layer = _Layer(_contiguous(weight), None if rest is None else _contiguous(rest), dtype, settings)
    if wants_gradient(x, bias):
        return _EagerInt8Linear.apply(x, bias, layer)
    return _linear(x, bias, layer)


def _contiguous(weight: Weight8) -> Weight8:
    """Return a weight as kernels take it."""
    values = weight.values
    return weight if values.is_contiguous() else weight._replace(values=values.contiguous())


def _parts(weight: Weight8 | None) -> tuple[Tensor | None, ...]:
    """Return the tensors of a weight as the operator takes them."""
    if weight is None:
        return (None,) * 4
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
    if x.is_meta or x.dtype == torch.float64:
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _linear(x: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
    weight, rest, dtype, settings = layer
    kernels = implementation("int8_linear", x, settings)
    rows = input_rows(x, Form(kernels, x.shape[-1], weight.turned))
    y: Tensor = kernels.linear(rows, weight, bias, dtype, rest)
    # Autograd must not see a view, which could not be written to in place.
    return y if x.ndim == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _linear_backward(dy: Tensor, weight: Weight8, dtype: torch.dtype, form: Form) -> Tensor:
    dx: Tensor = form.kernels.linear_backward(gradient_rows(dy, form), weight, dtype)
    return dx if dy.ndim == 2 else dx.view(*dy.shape[:-1], dx.shape[-1])


def _form_of_gradients(like: Tensor, scale: Tensor, settings: OpSettings) -> Form:
    """Return how a layer takes the gradient of its result. The scale is the layer's own, which lives anyway."""
    return Form(implementation("int8_linear", like, settings), scale.shape[0], factors=scale)


def _operator_linear(
    x: Tensor, values: Tensor, scale: Tensor, row_sums: Tensor, col_sums: Tensor, bias: Tensor | None, *others: Any
) -> Tensor:
    *parts, arguments = others
    turned, dtype, settings = arguments
    weight = Weight8(values, scale, turned, row_sums, col_sums)
    rest = None if parts[0] is None else Weight8(parts[0], parts[1], turned, parts[2], parts[3])
    return _linear(x, bias, _Layer(weight, rest, dtype, settings))


def _operator_linear_backward(
    dy: Tensor, values: Tensor, scale: Tensor, row_sums: Tensor, col_sums: Tensor, arguments: _Arguments
) -> Tensor:
    turned, dtype, settings = arguments
    weight = Weight8(values, scale, turned, row_sums, col_sums)
    return _linear_backward(dy, weight, dtype, _form_of_gradients(dy, scale, settings))


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


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise FastLNError("int8_linear is differentiable once: its backward cannot run with create_graph=True")


class _EagerInt8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        values, scale, turned, row_sums, col_sums = layer.weight
        ctx.save_for_backward(values, scale, row_sums, col_sums)
        ctx.of = turned, x.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            ctx.takes = _form_of_gradients(x, scale, layer.settings)
        _note_how(ctx, x, layer.settings, values, bias, lambda x: _linear(x, bias, layer))
        return _linear(x, bias, layer)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = dys
        if dy is None:
            return None, None, None
        _refuse_second_derivative()
        turned, dtype, bias_dtype = ctx.of
        need_dx, need_dbias, _ = ctx.needs_input_grad
        dx = None
        if need_dx:
            values, scale, row_sums, col_sums = ctx.saved_tensors
            dx = _linear_backward(dy, Weight8(values, scale, turned, row_sums, col_sums), dtype, ctx.takes)
        return dx, bias_gradient(dy, bias_dtype) if need_dbias else None, None


def _note_how(
    ctx: Any,
    x: Tensor,
    settings: OpSettings,
    values: Tensor,
    bias: Tensor | None,
    layer: Callable[[Tensor], Tensor],
) -> None:
    """Note in a node how the layer makes its result again, if what it was given can be made again."""
    source = source_of(x, MOST_PRODUCTS - 1) if settings.keeps.again else None
    if source is None:
        return

    def run(_: Any, memo: Memo) -> Tensor:
        check_weight(values)
        return layer(source.make(memo))

    makes_again(ctx, run, source, n_products=1, reads=(values, bias))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, scale, row_sums, col_sums, bias = inputs[:6]
    ctx.save_for_backward(values, scale, row_sums, col_sums)
    arguments = _Arguments.of(*inputs[_N_TENSORS:])
    ctx.arguments = arguments._replace(dtype=x.dtype)
    others = inputs[1:]  # without x, which nothing must keep
    _note_how(ctx, x, arguments.settings, values, bias, lambda x: _operator(x, *others))
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _operator_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    flat = ctx.arguments.flat
    if dy is None:
        return (None,) * (_N_TENSORS + len(flat))
    _refuse_second_derivative()
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.fastln.int8_linear_backward(dy, *ctx.saved_tensors, *flat)
    dbias = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[5] else None
    return dx, *(None,) * 4, dbias, *(None,) * (_N_TENSORS - 6 + len(flat))


_WEIGHT = "Tensor values, Tensor scale, Tensor row_sums, Tensor col_sums"
_REST = "Tensor? rest_values, Tensor? rest_scale, Tensor? rest_row_sums, Tensor? rest_col_sums"
define(
    "fastln::int8_linear",
    f"(Tensor x, {_WEIGHT}, Tensor? bias, {_REST}, {_Arguments.schema()}) -> Tensor",
    _Arguments,
    _operator_linear,
    _fake_linear,
)
define(
    "fastln::int8_linear_backward",
    f"(Tensor dy, {_WEIGHT}, {_Arguments.schema()}) -> Tensor",
    _Arguments,
    _operator_linear_backward,
    _fake_linear_backward,
)
torch.library.register_autograd("fastln::int8_linear", _operator_gradients, setup_context=_setup)
_operator = torch.ops.fastln.int8_linear.default
