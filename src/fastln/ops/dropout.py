"""Dropout without a mask: the operator, its fake, its autograd formula.

Only the seed, eight bytes, is kept for backward. Dropout is linear in `x`, so its gradient is the same dropout: the
backward draws the same numbers again and drops the elements of `dy` that the forward dropped of `x`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.again import Memo, makes_again, source_of
from fastln.ops.backends import implementation
from fastln.ops.dispatch import Ways, call, define, is_transformed, needs_operator, overridable, wants_gradient
from fastln.ops.rounded import Reader, for_reader, for_successor
from fastln.ops.settings import DEFAULT, SCHEMA, OpSettings


class _Arguments(NamedTuple):
    """The arguments of dropout besides its tensors.

    Attributes:
        p: Probability of dropping an element.
        settings: Which backend computes, and in which form.
        reader: What is known about who reads the result. No operator knows it.
    """

    p: float
    settings: OpSettings
    reader: Reader | None = None

    @staticmethod
    def schema() -> str:
        """Return how an operator's schema declares the scalars."""
        return f"float p, {SCHEMA}"

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as scalars, in the order of the schema."""
        return self.p, *self.settings.flat

    @classmethod
    def of(cls, p: float, *flat: str) -> "_Arguments":
        """Rebuild the arguments from the scalars of `flat`."""
        return cls(p, OpSettings.of(*flat))


@overridable
def dropout(
    x: Tensor,
    p: float,
    *,
    seed: Tensor | None = None,
    settings: OpSettings = DEFAULT,
    reader: Reader | None = None,
) -> Tensor:
    """Drop elements of `x` at random and scale the others, so that the expected value stays the same.

    Args:
        x: `(..., n_cols)`, float32, bfloat16, float16 or float64.
        p: Probability of dropping an element, from 0 to below 1, in steps of 2^-16.
        seed: `(1,)`, int64, on the device of `x`; drawn from torch's generator by default.
        settings: Which backend computes, and in which form.
        reader: The note of the module that calls, about who reads the result.

    Returns:
        A contiguous tensor of the shape and dtype of `x`.

    Raises:
        FastLNError: If the probability, the dtype or the seed is not valid, or the backend cannot run on the device
            of `x`.
    """
    if not 0 <= p < 1:
        raise FastLNError(f"dropout is {p}; it must be from 0 to below 1")
    if not x.is_floating_point() or not x.ndim:
        raise FastLNError(
            f"dropout takes floating-point tensors of one dimension or more; x is {(*x.shape,)} {x.dtype}"
        )
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    elif seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != x.device:
        raise FastLNError(
            f"the seed of dropout must be (1,), int64, on {x.device}; "
            f"it is {(*seed.shape,)}, {seed.dtype}, on {seed.device}"
        )
    return _by_seed(x, seed, _Arguments(p, settings, reader))


def _by_seed(x: Tensor, seed: Tensor, arguments: _Arguments) -> Tensor:
    """Differentiable any number of times."""
    y: Tensor = call(_WAYS, (x, seed), arguments)
    return y


def _dropout(x: Tensor, seed: Tensor, arguments: _Arguments, ctx: Any = None) -> Tensor:
    """Compute dropout, or its gradient: then `ctx` is the context of the dropout whose gradient it is."""
    kernels = implementation("dropout", x, arguments.settings)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    rounds = for_reader(arguments.reader, kernels, x) if ctx is None else for_successor(ctx, 0, kernels, x)
    y = kernels.dropout(rows, arguments.p, seed, *rounds.told)
    # Autograd must not see a view, which could not be written to in place.
    return rounds.of(torch.ops.aten._unsafe_view.default(y, x.shape))


def _fake(x: Tensor, seed: Tensor, arguments: _Arguments) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, x: Tensor, seed: Tensor, arguments: _Arguments) -> None:
    ctx.save_for_backward(seed)
    ctx.arguments = arguments  # its reader is that of the result, not of the gradient
    source = source_of(x) if arguments.settings.keeps.again else None
    if source is not None:

        def run(node: Any, memo: Memo) -> Tensor:
            (seed,) = node.saved_tensors
            return _by_seed(source.make(memo), seed, arguments._replace(reader=None))

        makes_again(ctx, run, source)


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    (seed,) = ctx.saved_tensors
    return _by_seed(dy, seed, ctx.arguments._replace(reader=None))


class _EagerDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, arguments: _Arguments) -> Tensor:
        _keep(ctx, x, seed, arguments)
        return _dropout(x, seed, arguments)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = dys
        if needs_operator(dy) or is_transformed() or wants_gradient(dy):
            return _gradient(ctx, dy), None, None
        (seed,) = ctx.saved_tensors
        return _dropout(dy, seed, ctx.arguments, ctx), None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, seed, *flat = inputs
    _keep(ctx, x, seed, _Arguments.of(*flat))


def _operator_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, dy), None, *(None for _ in ctx.arguments.flat)


define("fastln::dropout", f"(Tensor x, Tensor seed, {_Arguments.schema()}) -> Tensor", _Arguments, _dropout, _fake)
torch.library.register_autograd("fastln::dropout", _operator_gradients, setup_context=_setup_context)
_WAYS = Ways(torch.ops.fastln.dropout.default, _EagerDropout, _dropout)
