"""LayerNorm: the operator, its fake, its autograd formula.

Decided here, and only here: which gradients are computed (those that an input asks for) and what is kept for them.

| gradients wanted   | kept for backward                        |
|--------------------|------------------------------------------|
| none               | nothing                                  |
| dbias              | nothing                                  |
| dweight (+ dbias)  | x, the rows' statistics                  |
| dx (+ any)         | x, the rows' statistics, the weight      |

Under `torch.compile` and whatever else must see operators (fake tensors, tracing, dispatch modes) `layer_norm` calls
the operator `fastln::layer_norm`. In plain eager mode it goes past the dispatcher to the same functions, which costs a
fraction of the time per call; an operator written in Python costs several times what a small LayerNorm takes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.backends import resolve
from fastln_kernels import reference

_aten = torch.ops.aten
_BLOCK_ROWS = 512


class _Implementation(NamedTuple):
    """A backend's pair of functions.

    `forward(x, weight, bias, eps)` returns `y` and the rows' statistics, `(n_stats, n_rows, 1)`, which only its own
    `backward(dy, x, weight, stats, *, need_dx, need_dweight, need_dbias, grad_dtype)` reads. `x` and `dy` are
    `(n_rows, n_cols)`.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, ...]]  # dx, dweight, dbias
    n_stats: int


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
        FastLNError: If shapes or dtypes do not fit, or the backend is unknown or cannot run on the device of `x`.
    """
    _check(x, weight, bias)
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return torch.ops.fastln.layer_norm(x, weight, bias, eps, backend)[0]
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _EagerLayerNorm.apply(x, weight, bias, eps, backend)
    return _forward(x, weight, bias, eps, backend)[0]


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise FastLNError(f"layer_norm takes floating-point tensors; x is {x.dtype}")
    n_cols = x.shape[-1] if x.ndim else 0
    if n_cols == 0:
        raise FastLNError(f"layer_norm normalises over the last dimension, of one column or more; x is {(*x.shape,)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (n_cols,):
            raise FastLNError(
                f"the {name} of layer_norm must be ({n_cols},), as wide as x; it is {(*parameter.shape,)}"
            )


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    y, stats = _implementation(x, backend).forward(x.reshape(-1, x.shape[-1]), weight, bias, eps)
    return y.view(x.shape), stats


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    grad_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    n_cols = dy.shape[-1]
    dx, dweight, dbias = _implementation(dy, backend).backward(
        dy.reshape(-1, n_cols),
        None if x is None else x.reshape(-1, n_cols),
        weight,
        stats,
        need_dx=need_dx,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
        grad_dtype=grad_dtype,
    )
    return [grad for grad in (None if dx is None else dx.view(dy.shape), dweight, dbias) if grad is not None]


def _keep(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, backend: str) -> None:
    need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
    need_x = need_dx or need_dweight
    ctx.save_for_backward(x if need_x else None, weight if need_dx else None, stats if need_x else None)
    ctx.wanted = (need_dx, need_dweight, need_dbias)
    dtypes = [t.dtype for t, wanted in ((weight, need_dweight), (bias, need_dbias)) if t is not None and wanted]
    # Where the two differ, autograd casts the one that is off.
    ctx.grad_dtype = dtypes[0] if dtypes and dtypes[0] == dtypes[-1] else torch.float32
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: Tensor | None, compute: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if dy is None:
        return None, None, None
    if torch.is_grad_enabled():
        raise FastLNError("layer_norm is differentiable once: its backward cannot run with create_graph=True")
    grads = iter(compute(dy, *ctx.saved_tensors, *ctx.wanted, ctx.grad_dtype, ctx.backend))
    dx, dweight, dbias = (next(grads) if wanted else None for wanted in ctx.wanted)
    return dx, dweight, dbias


class _EagerLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> Tensor:
        y, stats = _forward(x, weight, bias, eps, backend)
        _keep(ctx, x, weight, bias, stats, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, _backward), None, None


def _implementation(x: Tensor, backend: str) -> _Implementation:
    name = resolve("layer_norm", x.device, backend).backend
    if name == "triton" and x.dtype == torch.float64:
        if backend == "triton":
            raise FastLNError("backend 'triton' computes in float32; use 'auto' or 'reference' for float64 tensors")
        name = "reference"
    return _load(name)


@functools.cache
def _load(backend: str) -> _Implementation:
    if backend == "cpu":
        return _Implementation(_cpu_forward, _cpu_backward, n_stats=2)
    if backend == "triton":
        # Where Triton does not exist, nothing but this line may miss it.
        from fastln_kernels import norm

        return _Implementation(norm.layer_norm_forward, norm.layer_norm_backward, reference.N_STATS)
    return _Implementation(reference.layer_norm_forward, reference.layer_norm_backward, reference.N_STATS)


def _cpu_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    dtype = _arithmetic(x)
    if weight is None and x.dtype != dtype:
        # torch's CPU kernel rounds the statistics to the dtype of x, unless the weight is float32.
        weight = _ones(x.shape[-1], dtype)
    y, mean, rstd = _aten.native_layer_norm.default(x, x.shape[-1:], _cast(weight, dtype), _cast(bias, dtype), eps)
    return y, torch.stack((mean, rstd))


def _cpu_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    *,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    grad_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    dtype = _arithmetic(dy)
    if x is None or stats is None:
        return None, None, dy.sum(0, dtype=dtype).to(grad_dtype)
    mean, rstd = stats
    n_rows, n_cols = x.shape
    ones = _ones(n_cols, dtype)  # torch asks for parameters, if only for their shape
    parameters = (ones if weight is None else _cast(weight, dtype), ones)
    wanted = [need_dx, need_dweight, need_dbias]
    torch_backward = _aten.native_layer_norm_backward.default
    if n_rows and x.dtype != dtype and (need_dweight or need_dbias):
        # Over a bfloat16 x torch sums the parameters' gradients in bfloat16: a few percent off at 1,000 rows. So the
        # rows are cast to float32, a block at a time that stays in the cache.
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else None
        sums: list[Tensor | None] = [None, None]
        for rows in (slice(start, start + _BLOCK_ROWS) for start in range(0, n_rows, _BLOCK_ROWS)):
            block = (dy[rows].to(dtype), x[rows].to(dtype), (n_cols,), mean[rows], rstd[rows])
            block_dx, *block_sums = torch_backward(*block, *parameters, wanted)
            if dx is not None:
                dx[rows] = block_dx
            sums = [b if a is None else a.add_(b) for a, b in zip(sums, block_sums, strict=True)]
    else:
        dx, *sums = torch_backward(dy, x, (n_cols,), mean, rstd, *parameters, wanted)
    return dx, *(_cast(grad, grad_dtype) for grad in sums)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


@functools.cache
def _ones(n_cols: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(n_cols, dtype=dtype)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    n_stats = _implementation(x, backend).n_stats
    stats = x.new_empty((n_stats, math.prod(x.shape[:-1]), 1), dtype=_arithmetic(x))
    return x.new_empty(x.shape), stats


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    grad_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    parameters = need_dweight + need_dbias
    return [dy.new_empty(dy.shape)] * need_dx + [
        dy.new_empty(dy.shape[-1:], dtype=grad_dtype) for _ in range(parameters)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, backend = inputs
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, x, weight, bias, output[1], backend)


def _operator_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, dy, torch.ops.fastln.layer_norm_backward), None, None


# Defined through `torch.library` and not its `custom_op`, whose wrapper doubles the time of a call.
torch.library.define(
    "fastln::layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor y, Tensor stats)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("fastln::layer_norm", "default", _forward)
torch.library.register_fake("fastln::layer_norm", _fake_forward)
torch.library.register_autograd("fastln::layer_norm", _operator_gradients, setup_context=_setup_context)

torch.library.define(
    "fastln::layer_norm_backward",
    "(Tensor dy, Tensor? x, Tensor? weight, Tensor? stats, bool need_dx, bool need_dweight, bool need_dbias, "
    "ScalarType grad_dtype, str backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("fastln::layer_norm_backward", "default", _backward)
torch.library.register_fake("fastln::layer_norm_backward", _fake_backward)
