"""Rotary positions: the operator, its fake, its autograd formula.

The gradient of the input turns the gradient of the result back, for which cosines and sines alone are kept; all layers
share them. They get no gradient themselves.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.again import Memo, makes_again, source_of
from fastln.ops.backends import implementation
from fastln.ops.dispatch import Ways, call, define, is_transformed, needs_operator, overridable, wants_gradient
from fastln.ops.rounded import for_successor, has_rows, rows_of
from fastln.ops.settings import DEFAULT, SCHEMA, OpSettings


class _Arguments(NamedTuple):
    """The arguments of rotary positions besides the tensors.

    Attributes:
        backward: Whether to turn back, as the gradient does.
        settings: Which backend computes, and in which form.
    """

    backward: bool
    settings: OpSettings

    @staticmethod
    def schema() -> str:
        """Return how an operator's schema declares the scalars."""
        return f"bool backward, {SCHEMA}"

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as scalars, in the order of the schema."""
        return self.backward, *self.settings.flat

    @classmethod
    def of(cls, backward: bool, *flat: str) -> "_Arguments":
        """Rebuild the arguments from the scalars of `flat`."""
        return cls(backward, OpSettings.of(*flat))


@overridable
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, settings: OpSettings = DEFAULT) -> Tensor:
    """Turn the heads of queries or keys by their positions; differentiable in `x` any number of times.

    `x cos + turned(x) sin`, where `turned` maps halves (a, b) of a head to (-b, a): transformers'
    `apply_rotary_pos_emb` for one tensor.

    Args:
        x: `(B, H, S, D)`, float32, bfloat16, float16 or float64, D even.
        cos: `(B or 1, S, D)`, the dtype and device of `x`.
        sin: `(B or 1, S, D)`, likewise.
        settings: Which backend computes, and in which form.

    Returns:
        `(B, H, S, D)` in the dtype of `x`, with the memory layout `(B, S, H, D)`.

    Raises:
        FastLNError: If shapes, dtypes or devices do not match, or the backend cannot run on the device of `x`.
    """
    if (reason := why_not(x, cos, sin)) is not None:
        raise FastLNError(f"rotary positions: {reason}")
    return _turned(x, cos.detach(), sin.detach(), _Arguments(False, settings))


def why_not(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Say why `rotary` does not take these tensors; None if it does."""
    if x.ndim != 4 or not x.is_floating_point() or x.shape[3] % 2:
        return f"x must be (B, H, S, D), floating-point, with an even D; it is {(*x.shape,)} {x.dtype}"
    for name, given in (("cos", cos), ("sin", sin)):
        if given.ndim != 3 or given.shape[1:] != x.shape[2:] or given.shape[0] not in (1, x.shape[0]):
            return f"{name} must be (B or 1, S, D) for x {(*x.shape,)}; it is {(*given.shape,)}"
        if given.dtype != x.dtype or given.device != x.device:
            return f"{name} must be {x.dtype} on {x.device}; it is {given.dtype} on {given.device}"
        if given.requires_grad:
            return f"{name} wants a gradient"
    return None if cos.shape == sin.shape else "cos and sin differ in shape"


def _turned(x: Tensor, cos: Tensor, sin: Tensor, arguments: _Arguments) -> Tensor:
    y: Tensor = call(_WAYS, (x, cos, sin), arguments)
    return y


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, arguments: _Arguments, ctx: Any = None) -> Tensor:
    """Turn heads. `ctx` is the context of the operation whose gradient this is, if it is one in eager mode."""
    backward, settings = arguments
    kernels = implementation("rotary", x, settings)
    rounds = for_successor(ctx, 0, kernels, rows_of(x), laid_out=True)
    return rounds.of(kernels.rotary(x, cos, sin, *rounds.told, backward=backward))


def _fake(x: Tensor, cos: Tensor, sin: Tensor, arguments: _Arguments) -> Tensor:
    n_batches, n_heads, n_tokens, dim = x.shape
    return x.new_empty(n_batches, n_tokens, n_heads, dim).transpose(1, 2)


def _keep(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, arguments: _Arguments) -> None:
    ctx.save_for_backward(cos, sin)
    ctx.arguments = arguments
    ctx.has_rows = has_rows(x)
    source = source_of(x) if arguments.settings.keeps.again else None
    if source is not None:

        def run(node: Any, memo: Memo) -> Tensor:
            cos, sin = node.saved_tensors
            return _turned(source.make(memo), cos, sin, arguments)

        makes_again(ctx, run, source)


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    cos, sin = ctx.saved_tensors
    return _turned(dy, cos, sin, ctx.arguments._replace(backward=not ctx.arguments.backward))


class _EagerRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, arguments: _Arguments) -> Tensor:
        _keep(ctx, x, cos, sin, arguments)
        return _rotary(x, cos, sin, arguments)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = dys
        if needs_operator(dy) or is_transformed() or wants_gradient(dy):
            return _gradient(ctx, dy), None, None, None
        cos, sin = ctx.saved_tensors
        arguments = ctx.arguments._replace(backward=not ctx.arguments.backward)
        return _rotary(dy, cos, sin, arguments, ctx if ctx.has_rows else None), None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, *flat = inputs
    _keep(ctx, x, cos, sin, _Arguments.of(*flat))


def _operator_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, dy), None, None, *(None for _ in ctx.arguments.flat)


define(
    "fastln::rotary",
    f"(Tensor x, Tensor cos, Tensor sin, {_Arguments.schema()}) -> Tensor",
    _Arguments,
    _rotary,
    _fake,
)
torch.library.register_autograd("fastln::rotary", _operator_gradients, setup_context=_setup_context)
_WAYS = Ways(torch.ops.fastln.rotary.default, _EagerRotary, _rotary)
