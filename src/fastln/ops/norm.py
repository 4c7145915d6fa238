"""Norms, with or without dropout and a residual before them: the operator, its fake, its autograd formula.

Decided here, and only here: which gradients are computed (those that an input asks for) and what is kept for them.

| gradients wanted               | kept for backward                     |
|--------------------------------|---------------------------------------|
| none, or dbias                 | nothing                               |
| dweight (+ dbias)              | the rows, their statistics            |
| of x or residual (+ any)       | the rows, their statistics, the weight|

The rows are `x` itself where nothing comes before the norm; the new residual stream where the caller gets that (it is
there anyway); and x_hat where the caller gets the normed sum alone, so that the sum is never stored. The statistics are
one float32 per row, and two where torch's CPU kernel computes. Dropout keeps its seed, eight bytes.

Under `torch.compile` and whatever else must see operators (fake tensors, tracing, dispatch modes) the operator
`fastln::norm` is called. In plain eager mode the way goes past the dispatcher to the same functions, which costs a
fraction of the time per call; an operator written in Python costs several times what a small LayerNorm takes. Under
torch.func's transforms and forward-mode derivatives the definition runs, op by op: torch can transform that, and no
operator that it knows the reverse-mode gradient of alone.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.backends import resolve
from fastln.ops.dispatch import define, is_transformed, needs_operator, overridable, wants_gradient
from fastln_kernels import reference
from fastln_kernels.cpu import library, native_norm, torch_norm
from fastln_kernels.reference import NormGradients, NormKind, NormOutputs, arithmetic_dtype

_aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Implementation(NamedTuple):
    """A backend's pair of functions, with the signatures of `fastln_kernels.reference`.

    Only its own `backward` reads what `forward` returns as `rstd`: `n_stats` numbers per row.
    """

    forward: Callable[..., NormOutputs]
    backward: Callable[..., NormGradients]
    n_stats: int = 1


class _Settings(NamedTuple):
    """What is not a tensor.

    Attributes:
        kind: which norm.
        dropout: probability.
        keep: the rows that the backward will read: "x" where nothing comes before the norm; else "stream" or "normed",
            which the forward returns beside `y`, or "nothing".
        backend: a name from `fastln.ops.backends.BACKENDS`.
    """

    kind: NormKind
    dropout: float
    keep: str
    backend: str

    @property
    def flat(self) -> tuple[Any, ...]:
        """Arguments of the operator, in its order."""
        kind = self.kind
        return kind.eps, kind.centre, kind.offset, kind.round_normed, self.dropout, self.keep, self.backend

    @classmethod
    def of(cls, *flat: Any) -> "_Settings":
        """The settings of which these are the `flat`."""
        return cls(NormKind(*flat[:4]), *flat[4:])


@overridable
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """Normalise over the last dimension, then scale and shift; differentiable once.

    Args:
        x: `(..., n_cols)`, float32, bfloat16, float16 or float64.
        weight: `(n_cols,)` or None for ones; any of these dtypes, `x`'s or not.
        bias: `(n_cols,)` or None for zeros; likewise.
        eps: Added to the variance.
        backend: A name from `fastln.ops.backends.BACKENDS`.

    Returns:
        A contiguous tensor of the shape and dtype of `x`.

    Raises:
        FastLNError: If shapes, dtypes or devices do not fit, or the backend is unknown or cannot run on the device of
            `x`.
    """
    return _norm(x, weight, bias, None, None, _Settings(NormKind(eps), 0.0, "x", backend))[0]


@overridable
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    offset: float = 0.0,
    *,
    round_normed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Divide by the root mean square over the last dimension, then scale; differentiable once.

    Args:
        x: `(..., n_cols)`, float32, bfloat16, float16 or float64.
        weight: `(n_cols,)` or None for ones; any of these dtypes, `x`'s or not.
        eps: Added to the mean square.
        offset: Added to the weight, as 1 in Gemma.
        round_normed: Whether the normed row is rounded to the dtype of `x` before it is scaled, as in Llama.
        backend: A name from `fastln.ops.backends.BACKENDS`.

    Returns:
        A contiguous tensor of the shape and dtype of `x`.

    Raises:
        FastLNError: If shapes, dtypes or devices do not fit, or the backend is unknown or cannot run on the device of
            `x`.
    """
    return _norm(x, weight, None, None, None, _Settings(NormKind(eps, False, offset, round_normed), 0.0, "x", backend))[
        0
    ]


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise `residual + dropout(x)` over the last dimension; differentiable once. No dropout mask is stored.

    Where `x` and `residual` differ in dtype (under autocast a 16-bit layer's output meets a float32 residual stream),
    both are cast to the dtype that `residual + x` has, and the results have it too.

    Args:
        x: `(..., n_cols)`, float32, bfloat16, float16 or float64.
        residual: Shaped like `x`, or None for zeros.
        weight: `(n_cols,)` or None for ones; any of these dtypes, `x`'s or not.
        bias: `(n_cols,)` or None for zeros; likewise.
        kind: Which norm.
        dropout: Probability of dropping an element of `x`, from 0 to below 1; 0 outside of training.
        return_stream: Whether to return the sum too, as a pre-norm block needs it.
        seed: `(1,)`, int64, on the device of `x`; drawn from torch's generator by default.
        backend: A name from `fastln.ops.backends.BACKENDS`.

    Returns:
        The normed sum, contiguous, of the shape of `x`; with `return_stream`, that and the sum, which is `x` itself
        where nothing is dropped or added.

    Raises:
        FastLNError: If shapes, dtypes, devices or the probability do not fit, or the backend is unknown or cannot run
            on the device of `x`.
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
            y, _ = _norm(x, weight, bias, None, None, _Settings(kind, 0.0, "x", backend))
            return (y, x) if return_stream else y
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    # x_hat stands in for the sum in the backward; without one it is not stored.
    keep = "stream" if return_stream else "normed" if wants_gradient(x, residual, weight) else "nothing"
    y, stream = _norm(x, weight, bias, residual, seed, _Settings(kind, dropout, keep, backend))
    return (y, stream) if return_stream else y


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    settings: _Settings,
) -> tuple[Tensor, Any]:
    """Return `y` and, where that is kept, the stream."""
    _check(x, weight, bias)
    tensors = (x, weight, bias, residual, seed)
    if needs_operator(*tensors):
        return torch.ops.fastln.norm(*tensors, *settings.flat)[:2]
    if is_transformed():
        return _forward(*tensors, settings._replace(backend="reference"))[:2]
    if wants_gradient(x, weight, bias, residual):
        return _EagerNorm.apply(*tensors, settings)
    return _forward(*tensors, settings)[:2]


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _check_input("x", x, x)
    n_cols = x.shape[-1] if x.ndim else 0
    if n_cols == 0:
        raise FastLNError(f"a norm is over the last dimension, of one column or more; x is {(*x.shape,)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_input(name, parameter, x)
            if parameter.shape != (n_cols,):
                raise FastLNError(
                    f"the {name} of a norm must be ({n_cols},), as wide as x; it is {(*parameter.shape,)}"
                )


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
    settings: _Settings,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return `y`, what is kept of the rows (None, the stream, or x_hat as rows) and the statistics."""
    outputs = _implementation(x, settings).forward(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        settings.kind,
        residual=_rows(residual),
        dropout=settings.dropout,
        seed=seed,
        want_stream=settings.keep == "stream",
        want_normed=settings.keep == "normed",
    )
    # No views in autograd's sense, or nobody could write to them in place.
    kept = outputs.normed if outputs.stream is None else _aten._unsafe_view.default(outputs.stream, x.shape)
    return _aten._unsafe_view.default(outputs.y, x.shape), kept, outputs.rstd


def _backward(
    dy: Tensor,
    dstream: Tensor | None,
    saved: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    stats: Tensor | None,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
    grad_dtype: torch.dtype,
    settings: _Settings,
) -> list[Tensor]:
    """Return the wanted gradients."""
    gradients = _implementation(dy, settings).backward(
        dy.reshape(-1, dy.shape[-1]),
        _rows(saved),
        weight,
        stats,
        settings.kind,
        saved_is_normed=settings.keep == "normed",
        dstream=_rows(dstream),
        dropout=settings.dropout,
        seed=seed,
        need_dx=need_dx,
        need_dresidual=need_dresidual,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
        grad_dtype=grad_dtype,
    )
    rows = [gradient.view(dy.shape) for gradient in gradients[:2] if gradient is not None]
    return rows + [gradient for gradient in gradients[2:] if gradient is not None]


def _keep(
    ctx: Any, tensors: tuple[Tensor | None, ...], settings: _Settings, kept: Tensor | None, stats: Tensor
) -> None:
    x, weight, bias, _, seed = tensors
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    need_input = need_dx or need_dresidual
    need_rows = need_input or need_dweight
    saved = x if settings.keep == "x" else kept
    ctx.save_for_backward(
        saved if need_rows else None,
        weight if need_input else None,
        seed if need_dx else None,
        stats if need_rows else None,
    )
    dtypes = [t.dtype for t, wanted in ((weight, need_dweight), (bias, need_dbias)) if t is not None and wanted]
    # Where the two differ, autograd casts the one that is off.
    ctx.grad_dtype = dtypes[0] if dtypes and dtypes[0] == dtypes[-1] else torch.float32
    ctx.settings = settings
    ctx.set_materialize_grads(False)
    ctx.stream_is_differentiable = settings.keep == "stream" and need_input


def _gradients(
    ctx: Any, dy: Tensor | None, dstream: Tensor | None, compute: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, residual and seed."""
    need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
    dropout = ctx.settings.dropout
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
    saved, weight, seed, stats = ctx.saved_tensors
    # Without dropout x and the residual have one gradient: it is asked for once, as that of x.
    wanted = (
        need_dx or (need_dresidual and not dropout),
        need_dresidual and dropout > 0,
        need_dweight,
        need_dbias,
    )
    dstream = dstream if need_dx or need_dresidual else None
    computed = iter(compute(dy, dstream, saved, weight, seed, stats, *wanted, ctx.grad_dtype, ctx.settings))
    dx, dresidual, dweight, dbias = (next(computed) if want else None for want in wanted)
    if not dropout:
        dresidual = dx
    return dx if need_dx else None, dweight, dbias, dresidual if need_dresidual else None, None


class _EagerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        y, kept, stats = _forward(*arguments)
        settings: _Settings = arguments[5]
        _keep(ctx, arguments[:5], settings, kept, stats)
        if settings.keep != "stream":
            return y, None
        if not ctx.stream_is_differentiable:
            ctx.mark_non_differentiable(kept)
        return y, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, dstream, _backward), None


def _operation(settings: _Settings) -> str:
    if settings.keep != "x":
        return "dropout_add_norm"
    return "layer_norm" if settings.kind.centre else "rms_norm"


def _implementation(x: Tensor, settings: _Settings) -> _Implementation:
    name = resolve(_operation(settings), x.device, settings.backend).backend
    if name in ("triton", "cpu") and x.dtype == torch.float64:
        if settings.backend == "triton":
            raise FastLNError("backend 'triton' computes in float32; use 'auto' or 'reference' for float64 tensors")
        name = "reference"
    return _load(name)


@functools.cache
def _load(backend: str) -> _Implementation:
    if backend == "cpu":
        if library.why_not("norm") is None:
            return _Implementation(native_norm.norm_forward, native_norm.norm_backward)
        return _Implementation(torch_norm.norm_forward, torch_norm.norm_backward, n_stats=2)
    if backend == "triton":
        # Where Triton does not exist, nothing but this line may miss it.
        from fastln_kernels import norm

        return _Implementation(norm.norm_forward, norm.norm_backward)
    return _Implementation(reference.norm_forward, reference.norm_backward)


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _Settings.of(*settings)
    n_stats, n_rows = _implementation(x, chosen).n_stats, math.prod(x.shape[:-1])
    stats = x.new_empty((n_rows,) if n_stats == 1 else (n_stats, n_rows, 1), dtype=arithmetic_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape if chosen.keep in ("stream", "normed") else 0), stats


def _fake_backward(
    dy: Tensor,
    dstream: Tensor | None,
    saved: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    stats: Tensor | None,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
    grad_dtype: torch.dtype,
    *settings: Any,
) -> list[Tensor]:
    rows = [dy.new_empty(dy.shape) for _ in range(need_dx + need_dresidual)]
    return rows + [dy.new_empty(dy.shape[-1:], dtype=grad_dtype) for _ in range(need_dweight + need_dbias)]


def _operator_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, kept, stats = _forward(x, weight, bias, residual, seed, _Settings.of(*settings))
    return y, x.new_empty(0) if kept is None else _aten._unsafe_view.default(kept, x.shape), stats


def _operator_backward(*arguments: Any) -> list[Tensor]:
    compute: Callable[..., list[Tensor]] = _backward
    return compute(*arguments[:11], _Settings.of(*arguments[11:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, kept, stats = output
    _keep(ctx, inputs[:5], _Settings.of(*inputs[5:]), kept, stats)
    ctx.mark_non_differentiable(*([stats] if ctx.stream_is_differentiable else [kept, stats]))


def _operator_gradients(ctx: Any, dy: Tensor | None, dstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    def compute(*arguments: Any) -> list[Tensor]:
        *given, settings = arguments
        return torch.ops.fastln.norm_backward(*given, *settings.flat)

    return *_gradients(ctx, dy, dstream, compute), *(None for _ in ctx.settings.flat)


_SETTINGS = "float eps, bool centre, float offset, bool round_normed, float dropout, str keep, str backend"
define(
    "fastln::norm",
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, {_SETTINGS}) "
    "-> (Tensor y, Tensor kept, Tensor stats)",
    _operator_forward,
    _fake_forward,
)
define(
    "fastln::norm_backward",
    "(Tensor dy, Tensor? dstream, Tensor? saved, Tensor? weight, Tensor? seed, Tensor? stats, bool need_dx, "
    f"bool need_dresidual, bool need_dweight, bool need_dbias, ScalarType grad_dtype, {_SETTINGS}) -> Tensor[]",
    _operator_backward,
    _fake_backward,
)
torch.library.register_autograd("fastln::norm", _operator_gradients, setup_context=_setup_context)
