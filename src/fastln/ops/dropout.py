"""Dropout without a mask: the operator, its fake, its autograd formula.

What is kept for backward is the seed, eight bytes. Dropout is linear in `x`, and so its own gradient: the backward
drops of `dy` what the forward dropped of `x`, by drawing the same numbers again.

As in `fastln.ops.norm`, the operator is called where something must see it; in plain eager mode the way goes past the
dispatcher, and under torch.func's transforms and forward-mode derivatives the definition runs, op by op.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.backends import resolve
from fastln.ops.dispatch import define, is_transformed, needs_operator, overridable, wants_gradient
from fastln_kernels import reference
from fastln_kernels.cpu import native_dropout


@overridable
def dropout(x: Tensor, p: float, *, seed: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Drop elements of `x` at random and scale the others, so that the expected value stays.

    Args:
        x: `(..., n_cols)`, float32, bfloat16, float16 or float64.
        p: Probability of dropping an element, from 0 to below 1, in steps of 2^-16.
        seed: `(1,)`, int64, on the device of `x`; drawn from torch's generator by default.
        backend: A name from `fastln.ops.backends.BACKENDS`.

    Returns:
        A contiguous tensor of the shape and dtype of `x`.

    Raises:
        FastLNError: If the probability, the dtype or the seed does not fit, or the backend is unknown or cannot run on
            the device of `x`.
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
    return _by_seed(x, seed, p, backend)


def _by_seed(x: Tensor, seed: Tensor, p: float, backend: str) -> Tensor:
    """Differentiable, and as often as one likes."""
    if needs_operator(x, seed):
        return torch.ops.fastln.dropout(x, seed, p, backend)
    if is_transformed():
        return _dropout(x, seed, p, "reference")
    if wants_gradient(x):
        return _EagerDropout.apply(x, seed, p, backend)
    return _dropout(x, seed, p, backend)


def _dropout(x: Tensor, seed: Tensor, p: float, backend: str) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # No view in autograd's sense, or nobody could write to it in place.
    return torch.ops.aten._unsafe_view.default(_implementation(x, backend)(rows, p, seed), x.shape)


def _implementation(x: Tensor, backend: str) -> Callable[[Tensor, float, Tensor], Tensor]:
    name = resolve("dropout", x.device, backend).backend
    if name == "cpu" and x.dtype != torch.float64:
        return native_dropout.dropout
    if name == "triton" and x.dtype != torch.float64:
        # Where Triton does not exist, nothing but this line may miss it.
        from fastln_kernels import dropout as triton_dropout

        return triton_dropout.dropout
    return reference.dropout


def _fake(x: Tensor, seed: Tensor, p: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    (seed,) = ctx.saved_tensors
    return _by_seed(dy, seed, ctx.p, ctx.backend), None, None, None


class _EagerDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = _dropout(*arguments)
        _setup_context(ctx, arguments, y)
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None, None, None]:
        return _gradient(ctx, *dys)


define("fastln::dropout", "(Tensor x, Tensor seed, float p, str backend) -> Tensor", _dropout, _fake)
torch.library.register_autograd("fastln::dropout", _gradient, setup_context=_setup_context)
