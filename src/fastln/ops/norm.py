"""Norms, with or without dropout and a residual before them: the functions for users, which check their arguments."""

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.dispatch import overridable, wants_gradient
from fastln.ops.norm_autograd import Arguments, norm
from fastln.ops.rounded import Reader
from fastln.ops.settings import DEFAULT, OpSettings
from fastln_kernels.reference import NormKind

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overridable
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, *, settings: OpSettings = DEFAULT
) -> Tensor:
    """Normalise over the last dimension, then scale and shift; differentiable once.

    Args:
        x: `(..., n_cols)`, float32, bfloat16, float16 or float64.
        weight: `(n_cols,)` or None for ones; any of these dtypes, `x`'s or not.
        bias: `(n_cols,)` or None for zeros; likewise.
        eps: Added to the variance.
        settings: Which backend computes, and in which form.

    Returns:
        A contiguous tensor of the shape and dtype of `x`.

    Raises:
        FastLNError: If shapes, dtypes or devices do not fit, or the backend cannot run on the device of `x`.
    """
    _check(x, weight, bias)
    return norm(x, weight, bias, None, None, Arguments(NormKind(eps), 0.0, "x", settings))[0]


@overridable
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    offset: float = 0.0,
    *,
    round_normed: bool = False,
    settings: OpSettings = DEFAULT,
) -> Tensor:
    """Divide by the root mean square over the last dimension, then scale; differentiable once.

    Args:
        x: `(..., n_cols)`, float32, bfloat16, float16 or float64.
        weight: `(n_cols,)` or None for ones; any of these dtypes, `x`'s or not.
        eps: Added to the mean square.
        offset: Added to the weight, as 1 in Gemma.
        round_normed: Whether the normed row is rounded to the dtype of `x` before it is scaled, as in Llama.
        settings: Which backend computes, and in which form.

    Returns:
        A contiguous tensor of the shape and dtype of `x`.

    Raises:
        FastLNError: If shapes, dtypes or devices do not fit, or the backend cannot run on the device of `x`.
    """
    kind = NormKind(eps, False, offset, round_normed)
    _check(x, weight, None)
    return norm(x, weight, None, None, None, Arguments(kind, 0.0, "x", settings))[0]


@overridable
def dropout_add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: NormKind,
    *,
    dropout: float = 0.0,
    return_stream: bool = False,
    seed: Tensor | None = None,
    settings: OpSettings = DEFAULT,
    reader: Reader | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise `residual + dropout(x)` over the last dimension; differentiable once. No dropout mask is stored.

    If `x` and `residual` differ in dtype (under autocast, a 16-bit layer's output meets a float32 residual stream),
    both are cast to the dtype of `residual + x`, which is also the dtype of the results.

    Args:
        x: `(..., n_cols)`, float32, bfloat16, float16 or float64.
        residual: Shaped like `x`, or None for zeros.
        weight: `(n_cols,)` or None for ones; any of these dtypes, `x`'s or not.
        bias: `(n_cols,)` or None for zeros; likewise.
        kind: Which norm.
        dropout: Probability of dropping an element of `x`, from 0 to below 1; 0 outside of training.
        return_stream: Whether to return the sum too, which a pre-norm block needs.
        seed: `(1,)`, int64, on the device of `x`; drawn from torch's generator by default.
        settings: Which backend computes, and in which form.
        reader: The note of the module that calls, about who reads the result.

    Returns:
        The normed sum, contiguous, of the shape of `x`; with `return_stream`, also the sum, which is `x` itself
        if nothing is dropped or added.

    Raises:
        FastLNError: If shapes, dtypes, devices or the probability do not fit, or the backend cannot run on the
            device of `x`.
    """
    if not 0 <= dropout < 1:
        raise FastLNError(f"dropout is {dropout}; it must be from 0 to below 1")
    _check(x, weight, bias)
    if residual is not None:
        _check_input("residual", residual, x)
        if residual.shape != x.shape:
            raise FastLNError(f"the residual must be shaped like x, {(*x.shape,)}; it is {(*residual.shape,)}")
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != x.device):
        raise FastLNError(
            f"the seed must be (1,), torch.int64 and on {x.device}, as x is; "
            f"it is {(*seed.shape,)}, {seed.dtype} and on {seed.device}"
        )
    if dropout == 0:
        seed = None
        if residual is None:
            y, _ = norm(x, weight, bias, None, None, Arguments(kind, 0.0, "x", settings, reader))
            return (y, x) if return_stream else y
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    # The backward reads x_hat instead of the sum. Without a backward it is not stored.
    keep = "stream" if return_stream else "normed" if wants_gradient(x, residual, weight) else "nothing"
    y, stream = norm(x, weight, bias, residual, seed, Arguments(kind, dropout, keep, settings, reader))
    return (y, stream) if return_stream else y


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    shape, device = x.shape[-1:], x.device
    if not shape or not shape[0] or x.dtype not in _DTYPES:
        _check_input("x", x, x)
        raise FastLNError(f"a norm needs a last dimension of one column or more; x is {(*x.shape,)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None or (
            parameter.shape == shape and parameter.device == device and parameter.dtype in _DTYPES
        ):
            continue
        _check_input(name, parameter, x)
        raise FastLNError(f"the {name} of a norm must be {(*shape,)}, as wide as x; it is {(*parameter.shape,)}")


def _check_input(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise FastLNError(f"a norm takes {', '.join(map(str, _DTYPES))}; {name} is {tensor.dtype}")
    if tensor.device != x.device:
        raise FastLNError(f"the {name} of a norm must be on {x.device}, as x is; it is on {tensor.device}")
