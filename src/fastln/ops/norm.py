"""Norms, with or without dropout and a residual before them: the operator, its fake, its autograd formula.

Only this file decides which gradients are computed (those that the inputs need) and what is kept for them.

| gradients wanted               | kept for backward                     |
|--------------------------------|---------------------------------------|
| none, or dbias                 | nothing                               |
| dweight (+ dbias)              | the rows, their statistics            |
| of x or residual (+ any)       | the rows, their statistics, the weight|

The rows are one of three tensors: `x` itself if nothing comes before the norm; the new residual stream if the caller
gets that (it exists anyway); or x_hat if the caller gets only the normed sum, so that the sum is never stored. The
statistics are one float32 per row, or two with torch's CPU kernel. Dropout keeps only its seed, eight bytes.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.again import Memo, make, makes_again, source_of
from fastln.ops.backends import implementation
from fastln.ops.dispatch import Ways, call, define, overridable, wants_gradient
from fastln.ops.rounded import Reader, for_reader, for_successor
from fastln.ops.settings import DEFAULT, SCHEMA, OpSettings
from fastln_kernels.reference import NormBackward, NormForward, NormGradients, NormKind, arithmetic_dtype

_unsafe_view = torch.ops.aten._unsafe_view.default
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Arguments(NamedTuple):
    """The arguments of a norm besides its tensors.

    Attributes:
        kind: Which norm.
        dropout: Probability of dropping an element.
        keep: The rows that the backward reads: "x" if nothing comes before the norm; else "stream" or "normed", which
            the forward returns with `y`, or "nothing".
        settings: Which backend computes, and in which form.
        reader: What is known about who reads the result. No operator knows it.
    """

    kind: NormKind
    dropout: float
    keep: str
    settings: OpSettings
    reader: Reader | None = None

    @staticmethod
    def schema() -> str:
        """Return how an operator's schema declares the scalars."""
        return f"float eps, bool centre, float offset, bool round_normed, float dropout, str keep, {SCHEMA}"

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as scalars, in the order of the schema."""
        kind = self.kind
        numbers = (kind.eps, kind.centre, kind.offset, kind.round_normed, self.dropout, self.keep)
        return numbers + self.settings.flat

    @classmethod
    def of(cls, *flat: Any) -> "_Arguments":
        """Rebuild the arguments from the scalars of `flat`."""
        eps, centre, offset, round_normed, dropout, keep, *settings = flat
        return cls(NormKind(eps, centre, offset, round_normed), dropout, keep, OpSettings.of(*settings))

    @property
    def operation(self) -> str:
        """The name of the operation in the table of backends."""
        if self.keep != "x":
            return "dropout_add_norm"
        return "layer_norm" if self.kind.centre else "rms_norm"

    def kernels_for(self, x: Tensor) -> ModuleType:
        """Return the module with the functions of `fastln_kernels.reference` that computes a norm of `x`.

        Only its own `norm_backward` reads what its `norm_forward` returns as `rstd`: one number per row, or as many as
        the module's `N_STATS` says.
        """
        return implementation(self.operation, x, self.settings)


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
    return _norm(x, weight, bias, None, None, _Arguments(NormKind(eps), 0.0, "x", settings))[0]


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
    return _norm(x, weight, None, None, None, _Arguments(kind, 0.0, "x", settings))[0]


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
            y, _ = _norm(x, weight, bias, None, None, _Arguments(kind, 0.0, "x", settings, reader))
            return (y, x) if return_stream else y
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    # The backward reads x_hat instead of the sum. Without a backward it is not stored.
    keep = "stream" if return_stream else "normed" if wants_gradient(x, residual, weight) else "nothing"
    y, stream = _norm(x, weight, bias, residual, seed, _Arguments(kind, dropout, keep, settings, reader))
    return (y, stream) if return_stream else y


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    arguments: _Arguments,
) -> tuple[Tensor, Any]:
    """Return `y` and, if it is kept, the stream."""
    _check(x, weight, bias)
    y, stream, *_ = call(_WAYS, (x, weight, bias, residual, seed), arguments)
    return y, stream


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


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    arguments: _Arguments,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return `y`, the rows that are kept (None, the stream, or x_hat as rows) and the statistics."""
    kind, dropout, keep, *_ = arguments
    rows = x.reshape(-1, x.shape[-1])
    request = NormForward(rows, weight, bias, kind, _rows(residual), dropout, seed, keep == "stream", keep == "normed")
    kernels = arguments.kernels_for(x)
    rounds = for_reader(arguments.reader, kernels, x)
    outputs = kernels.norm_forward(request, *rounds.told)
    # Autograd must not see views, which could not be written to in place.
    kept = outputs.normed if outputs.stream is None else _unsafe_view(outputs.stream, x.shape)
    return rounds.of(_unsafe_view(outputs.y, x.shape)), kept, outputs.rstd


def _backward(request: NormBackward, arguments: _Arguments, ctx: Any = None) -> NormGradients:
    """Compute the gradients that are needed, for tensors with any number of dimensions."""
    dy = request.dy
    rows = request._replace(dy=dy.reshape(-1, dy.shape[-1]), saved=_rows(request.saved), dstream=_rows(request.dstream))
    kernels = arguments.kernels_for(dy)
    rounds = for_successor(ctx if request.need_dx else None, 0, kernels, dy)
    dx, dresidual, dweight, dbias = kernels.norm_backward(rows, *rounds.told)
    return NormGradients(None if dx is None else rounds.of(dx.view(dy.shape)), _shaped(dresidual, dy), dweight, dbias)


def _shaped(rows: Tensor | None, like: Tensor) -> Tensor | None:
    return None if rows is None else rows.view(like.shape)


def _keep(
    ctx: Any, tensors: tuple[Tensor | None, ...], arguments: _Arguments, kept: Tensor | None, stats: Tensor
) -> None:
    x, weight, bias, _, seed = tensors
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    need_input = need_dx or need_dresidual
    need_rows = need_input or need_dweight
    again = need_rows and arguments.settings.keeps.again
    saved = x if arguments.keep == "x" else kept
    ctx.source = source_of(x) if again and arguments.keep == "x" else None
    ctx.save_for_backward(
        saved if need_rows and ctx.source is None else None,
        weight if need_input or again else None,
        seed if need_dx else None,
        stats if need_rows else None,
        bias if again else None,
    )
    if again:
        makes_again(ctx, _make_again, *(() if ctx.source is None else (ctx.source,)))
    dtypes = [t.dtype for t, wanted in ((weight, need_dweight), (bias, need_dbias)) if t is not None and wanted]
    # If the two differ, autograd casts the other one.
    ctx.grad_dtype = dtypes[0] if dtypes and dtypes[0] == dtypes[-1] else torch.float32
    ctx.arguments = arguments
    ctx.set_materialize_grads(False)
    ctx.stream_is_differentiable = arguments.keep == "stream" and need_input


def _make_again(node: Any, memo: Memo) -> Tensor:
    """Return `y` again, from what the node keeps."""
    saved, weight, _, _, bias = node.saved_tensors
    if node.source is not None:
        saved = node.source.make(memo)
    arguments: _Arguments = node.arguments
    if arguments.keep != "normed":
        alone = arguments._replace(dropout=0.0, keep="x", reader=None)
        return _norm(saved, weight, bias, None, None, alone)[0]
    wide = saved.to(arithmetic_dtype(saved))
    wide = wide if weight is None else wide * (weight + arguments.kind.offset)
    return (wide if bias is None else wide + bias).to(saved.dtype)


def _gradients(
    ctx: Any,
    dy: Tensor | None,
    dstream: Tensor | None,
    backward: Callable[[NormBackward, _Arguments], NormGradients],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, residual and seed."""
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    kind, dropout, keep, *_ = ctx.arguments
    if dy is None:
        if dstream is None:
            return (None,) * 5
        # Nothing used the normed sum.
        need_dweight = need_dbias = False
        if not dropout:
            return dstream if need_dx else None, None, None, dstream if need_dresidual else None, None
        dy = torch.zeros_like(dstream)
    if torch.is_grad_enabled():
        raise FastLNError("a norm is differentiable once: its backward cannot run with create_graph=True")
    saved, weight, seed, stats, _ = ctx.saved_tensors
    (saved,) = make((saved,), (ctx.source,))
    request = NormBackward(
        dy,
        saved,
        weight,
        stats,
        kind,
        saved_is_normed=keep == "normed",
        dstream=dstream if need_dx or need_dresidual else None,
        dropout=dropout,
        seed=seed,
        # Without dropout, x and the residual have the same gradient. It is computed once, as that of x.
        need_dx=need_dx or (need_dresidual and not dropout),
        need_dresidual=need_dresidual and dropout > 0,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
        grad_dtype=ctx.grad_dtype,
    )
    dx, dresidual, dweight, dbias = backward(request, ctx.arguments)
    if not dropout:
        dresidual = dx
    return dx if need_dx else None, dweight, dbias, dresidual if need_dresidual else None, None


class _EagerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        y, kept, stats = _forward(*inputs)
        arguments: _Arguments = inputs[5]
        _keep(ctx, inputs[:5], arguments, kept, stats)
        if arguments.keep != "stream":
            return y, None
        if not ctx.stream_is_differentiable:
            ctx.mark_non_differentiable(kept)
        return y, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, dstream, lambda rows, arguments: _backward(rows, arguments, ctx)), None


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    arguments: _Arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_stats = math.prod(x.shape[:-1]), getattr(arguments.kernels_for(x), "N_STATS", 1)
    stats = x.new_empty((n_rows,) if n_stats == 1 else (n_stats, n_rows, 1), dtype=arithmetic_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape if arguments.keep in ("stream", "normed") else 0), stats


def _operator_forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, kept, stats = _forward(x, *others)
    return y, x.new_empty(0) if kept is None else _unsafe_view(kept, x.shape), stats


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, kept, stats = output
    _keep(ctx, inputs[:5], _Arguments.of(*inputs[5:]), kept, stats)
    ctx.mark_non_differentiable(*([stats] if ctx.stream_is_differentiable else [kept, stats]))


def _operator_gradients(ctx: Any, dy: Tensor | None, dstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy, dstream, _backward_by_operator), *(None for _ in ctx.arguments.flat)


def _backward_by_operator(request: NormBackward, arguments: _Arguments) -> NormGradients:
    """Like `_backward`, through the operator, for compilers and tracers."""
    wanted = (request.need_dx, request.need_dresidual, request.need_dweight, request.need_dbias)
    made = iter(
        torch.ops.fastln.norm_backward(
            request.dy,
            request.dstream,
            request.saved,
            request.weight,
            request.seed,
            request.rstd,
            *wanted,
            request.grad_dtype,
            *arguments.flat,
        )
    )
    return NormGradients(*[next(made) if want else None for want in wanted])


def _operator_backward(
    dy: Tensor,
    dstream: Tensor | None,
    saved: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    stats: Tensor | None,
    *wanted: Any,
) -> list[Tensor]:
    """Return the gradients that are needed; `wanted` says which, and ends with their dtype and the arguments."""
    *wants, arguments = wanted
    kind, dropout, keep, *_ = arguments
    request = NormBackward(dy, saved, weight, stats, kind, keep == "normed", dstream, dropout, seed, *wants)
    return [gradient for gradient in _backward(request, arguments) if gradient is not None]


def _fake_backward(dy: Tensor, *others: Any) -> list[Tensor]:
    *_, need_dx, need_dresidual, need_dweight, need_dbias, grad_dtype, _ = others
    rows = [dy.new_empty(dy.shape) for _ in range(need_dx + need_dresidual)]
    return rows + [dy.new_empty(dy.shape[-1:], dtype=grad_dtype) for _ in range(need_dweight + need_dbias)]


define(
    "fastln::norm",
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, {_Arguments.schema()}) "
    "-> (Tensor y, Tensor kept, Tensor stats)",
    _Arguments,
    _operator_forward,
    _fake_forward,
)
define(
    "fastln::norm_backward",
    "(Tensor dy, Tensor? dstream, Tensor? saved, Tensor? weight, Tensor? seed, Tensor? stats, bool need_dx, "
    "bool need_dresidual, bool need_dweight, bool need_dbias, ScalarType grad_dtype, "
    f"{_Arguments.schema()}) -> Tensor[]",
    _Arguments,
    _operator_backward,
    _fake_backward,
)
torch.library.register_autograd("fastln::norm", _operator_gradients, setup_context=_setup_context)
_WAYS = Ways(torch.ops.fastln.norm.default, _EagerNorm, _forward)
