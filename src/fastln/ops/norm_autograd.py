"""How norms run: the operator, its fake, its autograd formula. `fastln.ops.norm` has the functions for users.

Only this file decides which gradients are computed (those that the inputs need) and what is kept for them.

| gradients wanted               | kept for backward                     |
|--------------------------------|---------------------------------------|
| none, or dbias                 | nothing                               |
| dweight (+ dbias)              | the rows, their statistics            |
| of x or residual (+ any)       | the rows, their statistics, the weight|

The rows are one of three tensors: `x` itself if nothing comes before the norm; the new residual stream if the caller
gets that (it exists anyway); or x_hat if the caller gets only the normed sum, so that the sum is never stored. The
statistics are one float32 per row, or two with torch's CPU kernel; x_hat in 8 bits has another per 64 columns. Dropout
keeps only its seed, eight bytes.
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
from fastln.ops.dispatch import Ways, call, define, needs_operator, wants_gradient
from fastln.ops.rounded import Reader, for_reader, for_successor
from fastln.ops.settings import SCHEMA, OpSettings
from fastln_kernels.reference import (
    NormAgain,
    NormBackward,
    NormForward,
    NormGradients,
    NormKind,
    arithmetic_dtype,
)
from fastln_kernels.reference_codes import scale_shape

_unsafe_view = torch.ops.aten._unsafe_view.default


class Arguments(NamedTuple):
    """The arguments of a norm besides its tensors.

    Attributes:
        kind: Which norm.
        dropout: Probability of dropping an element.
        keep: The rows that the backward reads: "x" if nothing comes before the norm; else "stream" or "normed", which
            the forward returns with `y`, or "nothing". "codes" is x_hat in 8 bits; "stream, codes" the same, if the
            caller gets the stream.
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
    def of(cls, *flat: Any) -> "Arguments":
        """Rebuild the arguments from the scalars of `flat`."""
        eps, centre, offset, round_normed, dropout, keep, *settings = flat
        return cls(NormKind(eps, centre, offset, round_normed), dropout, keep, OpSettings.of(*settings))

    @property
    def operation(self) -> str:
        """The name of the operation in the table of backends."""
        if self.keep != "x":
            return "dropout_add_norm"
        return "layer_norm" if self.kind.centre else "rms_norm"

    @property
    def in_codes(self) -> bool:
        """Whether the backward reads x_hat in 8 bits."""
        return self.keep in ("codes", "stream, codes")

    @property
    def returns_stream(self) -> bool:
        """Whether the caller gets the sum."""
        return self.keep in ("stream", "stream, codes")

    def kernels_for(self, x: Tensor) -> ModuleType:
        """Return the module with the functions of `fastln_kernels.reference` that computes a norm of `x`.

        Only its own `norm_backward` reads what its `norm_forward` returns as `rstd`: one number per row, or as many as
        the module's `N_STATS` says.
        """
        return implementation(self.operation, x, self.settings)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    arguments: Arguments,
) -> tuple[Tensor, Any]:
    """Return `y` and, if it is kept, the stream."""
    storage = arguments.settings.keeps
    if storage.x_hat_bits and arguments.keep != "nothing" and wants_gradient(x, residual, weight):
        has_source = storage.again and arguments.keep == "x" and source_of(x) is not None
        if not has_source:
            arguments = arguments._replace(keep="stream, codes" if arguments.keep == "stream" else "codes")
    y, stream, *_ = call(_WAYS, (x, weight, bias, residual, seed), arguments)
    return y, stream


class _Made(NamedTuple):
    """What a forward makes; None where it does not.

    Attributes:
        y: The normed sum.
        stream: The sum.
        normed: x_hat as rows, or its codes.
        stats: The statistics.
        scale: What codes are multiplied by, a number for each group of 64 columns of each row.
    """

    y: Tensor
    stream: Tensor | None
    normed: Tensor | None
    stats: Tensor
    scale: Tensor | None


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    arguments: Arguments,
) -> _Made:
    kind, dropout, keep, *_ = arguments
    rows = x.reshape(-1, x.shape[-1])
    request = NormForward(
        rows,
        weight,
        bias,
        kind,
        _rows(residual),
        dropout,
        seed,
        arguments.returns_stream,
        keep == "normed",
        arguments.in_codes,
    )
    kernels = arguments.kernels_for(x)
    rounds = for_reader(arguments.reader, kernels, x)
    outputs = kernels.norm_forward(request, *rounds.told)
    # Autograd must not see views, which could not be written to in place.
    y = rounds.of(_unsafe_view(outputs.y, x.shape))
    stream = None if outputs.stream is None else _unsafe_view(outputs.stream, x.shape)
    return _Made(y, stream, outputs.normed, outputs.rstd, outputs.scale)


def _backward(request: NormBackward, arguments: Arguments, ctx: Any = None) -> NormGradients:
    """Compute the gradients that are needed, for tensors with any number of dimensions."""
    dy = request.dy
    rows = request._replace(dy=dy.reshape(-1, dy.shape[-1]), saved=_rows(request.saved), dstream=_rows(request.dstream))
    kernels = arguments.kernels_for(dy)
    rounds = for_successor(ctx if request.need_dx else None, 0, kernels, dy)
    dx, dresidual, dweight, dbias = kernels.norm_backward(rows, *rounds.told)
    return NormGradients(None if dx is None else rounds.of(dx.view(dy.shape)), _shaped(dresidual, dy), dweight, dbias)


def _shaped(rows: Tensor | None, like: Tensor) -> Tensor | None:
    return None if rows is None else rows.view(like.shape)


def _keep(ctx: Any, tensors: tuple[Tensor | None, ...], arguments: Arguments, made: _Made) -> None:
    x, weight, bias, _, seed = tensors
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    need_input = need_dx or need_dresidual
    need_rows = need_input or need_dweight
    storage = arguments.settings.keeps
    saved = made.normed if made.normed is not None else x if arguments.keep == "x" else made.stream
    ctx.source = source_of(x) if need_rows and storage.again and arguments.keep == "x" else None
    ctx.save_for_backward(
        saved if need_rows and ctx.source is None else None,
        weight if need_input else None,
        seed if need_dx else None,
        made.stats if need_rows else None,
        made.scale if need_rows else None,
    )
    dtypes = [t.dtype for t, wanted in ((weight, need_dweight), (bias, need_dbias)) if t is not None and wanted]
    # If the two differ, autograd casts the other one.
    ctx.grad_dtype = dtypes[0] if dtypes and dtypes[0] == dtypes[-1] else torch.float32
    ctx.arguments = arguments
    ctx.set_materialize_grads(False)
    ctx.stream_is_differentiable = arguments.returns_stream and need_input
    if need_rows and x is not None:
        ctx.result = x.shape, x.dtype, weight, bias  # the parameters exist anyway
        makes_again(ctx, _make_again, *(() if ctx.source is None else (ctx.source,)), reads=(weight, bias))


def _make_again(node: Any, memo: Memo) -> Tensor:
    """Return `y` again, from what the node keeps."""
    saved, _, _, stats, scale = node.saved_tensors
    if node.source is not None:
        saved = node.source.make(memo)
    shape, dtype, weight, bias = node.result
    arguments: Arguments = node.arguments._replace(dropout=0.0, reader=None)
    if arguments.keep in ("x", "stream"):
        return norm(saved, weight, bias, None, None, arguments._replace(keep="x"))[0]
    rows = saved.reshape(-1, saved.shape[-1])
    if needs_operator(saved, weight, bias):
        y = torch.ops.fastln.norm_again(rows, weight, bias, stats, scale, dtype, *arguments.flat)
    else:
        y = _again(rows, weight, bias, stats, scale, dtype, arguments)
    return _unsafe_view(y, shape)


def _again(
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    arguments: Arguments,
) -> Tensor:
    kernels = arguments.kernels_for(stats)
    y: Tensor = kernels.norm_again(NormAgain(rows, weight, bias, stats, arguments.kind, True, scale, dtype))
    return y


def _fake_again(rows: Tensor, *others: Any) -> Tensor:
    return rows.new_empty(rows.shape, dtype=others[-2])


def _gradients(
    ctx: Any,
    dy: Tensor | None,
    dstream: Tensor | None,
    backward: Callable[[NormBackward, Arguments], NormGradients],
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
    saved, weight, seed, stats, scale = ctx.saved_tensors
    (saved,) = make((saved,), (ctx.source,))
    request = NormBackward(
        dy,
        saved,
        weight,
        stats,
        kind,
        saved_is_normed=keep == "normed" or ctx.arguments.in_codes,
        dstream=dstream if need_dx or need_dresidual else None,
        dropout=dropout,
        seed=seed,
        # Without dropout, x and the residual have the same gradient. It is computed once, as that of x.
        need_dx=need_dx or (need_dresidual and not dropout),
        need_dresidual=need_dresidual and dropout > 0,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
        grad_dtype=ctx.grad_dtype,
        scale=scale,
    )
    dx, dresidual, dweight, dbias = backward(request, ctx.arguments)
    if not dropout:
        dresidual = dx
    return dx if need_dx else None, dweight, dbias, dresidual if need_dresidual else None, None


class _EagerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        made = _forward(*inputs)
        _keep(ctx, inputs[:5], inputs[5], made)
        if made.stream is not None and not ctx.stream_is_differentiable:
            ctx.mark_non_differentiable(made.stream)
        return made.y, made.stream

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, dstream, lambda rows, arguments: _backward(rows, arguments, ctx)), None


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    arguments: Arguments,
) -> tuple[Tensor, ...]:
    n_rows, n_stats = math.prod(x.shape[:-1]), getattr(arguments.kernels_for(x), "N_STATS", 1)
    stats = x.new_empty((n_rows,) if n_stats == 1 else (n_stats, n_rows, 1), dtype=arithmetic_dtype(x))
    stream = x.new_empty(x.shape if arguments.returns_stream else 0)
    if arguments.in_codes:
        normed = x.new_empty(n_rows, x.shape[-1], dtype=torch.int8)
    else:
        normed = x.new_empty((n_rows, x.shape[-1]) if arguments.keep == "normed" else 0)
    scales = scale_shape((n_rows, x.shape[-1]), 8) if arguments.in_codes else 0
    scale = x.new_empty(scales, dtype=torch.float32)
    return x.new_empty(x.shape), stream, normed, stats, scale


def _operator_forward(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple([x.new_empty(0) if made is None else made for made in _forward(x, *others)])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    arguments = Arguments.of(*inputs[5:])
    y, stream, normed, stats, scale = output
    made = _Made(
        y,
        stream if arguments.returns_stream else None,
        normed if arguments.in_codes or arguments.keep == "normed" else None,
        stats,
        scale if arguments.in_codes else None,
    )
    _keep(ctx, inputs[:5], arguments, made)
    ctx.mark_non_differentiable(*output[2:], *(() if ctx.stream_is_differentiable else (stream,)))


def _operator_gradients(ctx: Any, dy: Tensor | None, dstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy, dstream, _backward_by_operator), *(None for _ in ctx.arguments.flat)


def _backward_by_operator(request: NormBackward, arguments: Arguments) -> NormGradients:
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
            request.scale,
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
    scale: Tensor | None,
    *wanted: Any,
) -> list[Tensor]:
    """Return the gradients that are needed; `wanted` says which, and ends with their dtype and the arguments."""
    *wants, arguments = wanted
    kind, dropout, keep, *_ = arguments
    is_normed = keep == "normed" or arguments.in_codes
    request = NormBackward(dy, saved, weight, stats, kind, is_normed, dstream, dropout, seed, *wants)._replace(
        scale=scale
    )
    return [gradient for gradient in _backward(request, arguments) if gradient is not None]


def _fake_backward(dy: Tensor, *others: Any) -> list[Tensor]:
    *_, need_dx, need_dresidual, need_dweight, need_dbias, grad_dtype, _ = others
    rows = [dy.new_empty(dy.shape) for _ in range(need_dx + need_dresidual)]
    return rows + [dy.new_empty(dy.shape[-1:], dtype=grad_dtype) for _ in range(need_dweight + need_dbias)]


define(
    "fastln::norm",
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, {Arguments.schema()}) "
    "-> (Tensor y, Tensor stream, Tensor normed, Tensor stats, Tensor scale)",
    Arguments,
    _operator_forward,
    _fake_forward,
)
define(
    "fastln::norm_backward",
    "(Tensor dy, Tensor? dstream, Tensor? saved, Tensor? weight, Tensor? seed, Tensor? stats, Tensor? scale, "
    "bool need_dx, bool need_dresidual, bool need_dweight, bool need_dbias, ScalarType grad_dtype, "
    f"{Arguments.schema()}) -> Tensor[]",
    Arguments,
    _operator_backward,
    _fake_backward,
)
define(
    "fastln::norm_again",
    "(Tensor rows, Tensor? weight, Tensor? bias, Tensor? stats, Tensor? scale, ScalarType dtype, "
    f"{Arguments.schema()}) -> Tensor",
    Arguments,
    _again,
    _fake_again,
)
torch.library.register_autograd("fastln::norm", _operator_gradients, setup_context=_setup_context)
_WAYS = Ways(torch.ops.fastln.norm.default, _EagerNorm, _forward)
