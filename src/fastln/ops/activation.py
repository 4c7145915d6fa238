"""Activations, plain and gated: the operators, their fakes, their autograd formulas.

Decided here, and only here: which gradients are computed (those that an input asks for) and what is kept for them.

| operation                       | gradients wanted | kept for backward                          |
|---------------------------------|------------------|--------------------------------------------|
| any                             | none             | nothing                                    |
| activation                      | of x             | x; for ReLU the result                     |
| gated, of two tensors           | of gate          | gate and up                                |
|                                 | of up alone      | gate                                       |
| gated, of the halves of one     | of it            | that one tensor                            |

What a gate lets through is computed again in the backward. ReLU keeps its result, whose sign says all that the
argument's does: so the argument is free before the next layer runs, and a trained next layer keeps the same tensor.

As in `fastln.ops.norm`, operators are called where something must see them; in plain eager mode the way goes past the
dispatcher, and under torch.func's transforms and forward-mode derivatives the definition runs, op by op.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.backends import resolve
from fastln.ops.dispatch import define, is_transformed, needs_operator, overridable, wants_gradient
from fastln_kernels import reference_activation
from fastln_kernels.cpu import library, native_activation, torch_activation
from fastln_kernels.reference_activation import ACTIVATION_KINDS, ActivationKind, GatedGradients

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Implementation(NamedTuple):
    """A backend's functions, with the signatures of `fastln_kernels.reference_activation`."""

    activation_forward: Callable[..., Tensor]
    activation_backward: Callable[..., Tensor]
    gated_forward: Callable[..., Tensor]
    gated_backward: Callable[..., GatedGradients]


@overridable
def activation(x: Tensor, kind: ActivationKind, *, backend: str = "auto") -> Tensor:
    """Apply an activation elementwise; differentiable once.

    Args:
        x: Any shape; float32, bfloat16, float16 or float64.
        kind: A name from `ACTIVATION_KINDS`.
        backend: A name from `fastln.ops.backends.BACKENDS`.

    Returns:
        A contiguous tensor of the shape and dtype of `x`.

    Raises:
        FastLNError: If there is no such kind, the dtype does not fit, or the backend is unknown or cannot run on the
            device of `x`.
    """
    _check("x", x, kind)
    if needs_operator(x):
        return torch.ops.fastln.activation(x, kind, backend)
    if is_transformed():
        return _activation(x, kind, "reference")
    if wants_gradient(x):
        return _EagerActivation.apply(x, kind, backend)
    return _activation(x, kind, backend)


@overridable
def gated_activation(gate: Tensor, up: Tensor, kind: ActivationKind, *, backend: str = "auto") -> Tensor:
    """Compute `activation(gate) * up` elementwise, rounded once; differentiable once.

    Where `gate` and `up` differ in dtype, both are cast to the dtype that their product has.

    Args:
        gate: Any shape; float32, bfloat16, float16 or float64.
        up: Shaped like `gate`.
        kind: A name from `ACTIVATION_KINDS`: "silu" makes SwiGLU, "gelu" GEGLU.
        backend: A name from `fastln.ops.backends.BACKENDS`.

    Returns:
        A contiguous tensor of the shape of `gate`.

    Raises:
        FastLNError: If there is no such kind, shapes, dtypes or devices do not fit, or the backend is unknown or cannot
            run on the device of `gate`.
    """
    _check("gate", gate, kind)
    _check("up", up, kind)
    if up.shape != gate.shape or up.device != gate.device:
        raise FastLNError(
            f"up must be shaped like gate and on its device, {(*gate.shape,)} on {gate.device}; "
            f"it is {(*up.shape,)} on {up.device}"
        )
    if up.dtype != gate.dtype:
        dtype = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(dtype), up.to(dtype)
    return _gated_activation(gate, up, kind, backend)


@overridable
def packed_gated_activation(gate_up: Tensor, kind: ActivationKind, *, backend: str = "auto") -> Tensor:
    """Compute `activation(gate) * up` of the two halves of a fused projection's result; differentiable once.

    One tensor is kept and one gradient written, where `gated_activation` of two halves would have theirs joined.

    Args:
        gate_up: `(..., 2 * n_cols)`, gate first; float32, bfloat16, float16 or float64.
        kind: A name from `ACTIVATION_KINDS`.
        backend: A name from `fastln.ops.backends.BACKENDS`.

    Returns:
        `(..., n_cols)`, contiguous, in the dtype of `gate_up`.

    Raises:
        FastLNError: If there is no such kind, the shape or dtype does not fit, or the backend is unknown or cannot run
            on the device of `gate_up`.
    """
    _check("gate_up", gate_up, kind)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise FastLNError(f"gate_up must have an even number of columns, gate's and up's; it is {(*gate_up.shape,)}")
    return _gated_activation(gate_up, None, kind, backend)


def _gated_activation(gate: Tensor, up: Tensor | None, kind: ActivationKind, backend: str) -> Tensor:
    """`gate` holds both where `up` is None."""
    if needs_operator(gate, up):
        return torch.ops.fastln.gated_activation(gate, up, kind, backend)
    if is_transformed():
        return _gated(gate, up, kind, "reference")
    if wants_gradient(gate, up):
        return _EagerGatedActivation.apply(gate, up, kind, backend)
    return _gated(gate, up, kind, backend)


def _check(name: str, x: Tensor, kind: str) -> None:
    if kind not in ACTIVATION_KINDS:
        raise FastLNError(f"unknown activation {kind!r}; valid ones: {', '.join(ACTIVATION_KINDS)}")
    if x.dtype not in _DTYPES:
        raise FastLNError(f"an activation takes {', '.join(map(str, _DTYPES))}; {name} is {x.dtype}")


def _activation(x: Tensor, kind: str, backend: str) -> Tensor:
    return _implementation("activation", x, backend).activation_forward(x, kind)


def _activation_backward(dy: Tensor, saved: Tensor, kind: str, backend: str) -> Tensor:
    return _implementation("activation", dy, backend).activation_backward(dy, saved, kind)


def _gated(gate: Tensor, up: Tensor | None, kind: str, backend: str) -> Tensor:
    implementation = _implementation("gated_activation", gate, backend)
    return implementation.gated_forward(*_halves(gate, up), kind)


def _gated_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    packed: bool,
    need_dgate: bool,
    need_dup: bool,
    kind: str,
    backend: str,
) -> list[Tensor]:
    """Return the wanted gradients; that of a packed gate, which holds both, is one."""
    implementation = _implementation("gated_activation", dy, backend)
    if packed:
        dgate_up = dy.new_empty(gate.shape)
        out = GatedGradients(*dgate_up.chunk(2, -1))
        implementation.gated_backward(dy, *gate.chunk(2, -1), kind, need_dgate=True, need_dup=True, out=out)
        return [dgate_up]
    gradients = implementation.gated_backward(dy, gate, up, kind, need_dgate=need_dgate, need_dup=need_dup)
    return [gradient for gradient in gradients if gradient is not None]


def _halves(gate: Tensor, up: Tensor | None) -> Sequence[Tensor]:
    return gate.chunk(2, -1) if up is None else (gate, up)


def _keep_activation(ctx: Any, y: Tensor, x: Tensor, kind: str, backend: str) -> None:
    ctx.save_for_backward(y if kind == "relu" else x)
    ctx.settings = (kind, backend)
    ctx.set_materialize_grads(False)


def _activation_gradient(ctx: Any, dy: Tensor | None, compute: Callable[..., Tensor]) -> Tensor | None:
    if dy is None:
        return None
    _refuse_second_derivative()
    return compute(dy, *ctx.saved_tensors, *ctx.settings)


def _keep_gated(ctx: Any, gate: Tensor, up: Tensor | None, kind: str, backend: str) -> None:
    need_dgate, need_dup = ctx.needs_input_grad[:2]
    ctx.save_for_backward(gate if need_dgate or need_dup else None, up if need_dgate else None)
    ctx.packed = up is None
    ctx.settings = (kind, backend)
    ctx.set_materialize_grads(False)


def _gated_gradients(
    ctx: Any, dy: Tensor | None, compute: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor | None, Tensor | None]:
    if dy is None:
        return None, None
    _refuse_second_derivative()
    wanted = ctx.needs_input_grad[:2]
    gradients = iter(compute(dy, *ctx.saved_tensors, ctx.packed, *wanted, *ctx.settings))
    dgate, dup = (next(gradients) if want else None for want in wanted)
    return dgate, dup


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise FastLNError("an activation is differentiable once: its backward cannot run with create_graph=True")


class _EagerActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = _activation(*arguments)
        _keep_activation(ctx, y, *arguments)
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return _activation_gradient(ctx, dys[0], _activation_backward), None, None


class _EagerGatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _keep_gated(ctx, *arguments)
        return _gated(*arguments)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gated_gradients(ctx, dys[0], _gated_backward), None, None


def _implementation(op: str, x: Tensor, backend: str) -> _Implementation:
    name = resolve(op, x.device, backend).backend
    if name in ("triton", "cpu") and x.dtype == torch.float64:
        if backend == "triton":
            raise FastLNError("backend 'triton' computes in float32; use 'auto' or 'reference' for float64 tensors")
        name = "reference"
    return _load(name)


@functools.cache
def _load(backend: str) -> _Implementation:
    module: Any = reference_activation
    if backend == "cpu":
        module = native_activation if library.why_not("activation") is None else torch_activation
    elif backend == "triton":
        # Where Triton does not exist, nothing but this line may miss it.
        from fastln_kernels import activation as module
    return _Implementation(*(getattr(module, name) for name in _Implementation._fields))


def _fake_activation(x: Tensor, kind: str, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_activation_backward(dy: Tensor, saved: Tensor, kind: str, backend: str) -> Tensor:
    return dy.new_empty(dy.shape)


def _fake_gated(gate: Tensor, up: Tensor | None, kind: str, backend: str) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _fake_gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, packed: bool, need_dgate: bool, need_dup: bool, kind: str, backend: str
) -> list[Tensor]:
    return [dy.new_empty(gate.shape) for _ in range(1 if packed else need_dgate + need_dup)]


def _setup_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_activation(ctx, output, *inputs)


def _activation_operator_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    return _activation_gradient(ctx, dy, torch.ops.fastln.activation_backward), None, None


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_gated(ctx, *inputs)


def _gated_operator_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_gated_gradients(ctx, dy, torch.ops.fastln.gated_activation_backward), None, None


define(
    "fastln::activation",
    "(Tensor x, str kind, str backend) -> Tensor",
    _activation,
    _fake_activation,
)
define(
    "fastln::activation_backward",
    "(Tensor dy, Tensor saved, str kind, str backend) -> Tensor",
    _activation_backward,
    _fake_activation_backward,
)
define(
    "fastln::gated_activation",
    "(Tensor gate, Tensor? up, str kind, str backend) -> Tensor",
    _gated,
    _fake_gated,
)
define(
    "fastln::gated_activation_backward",
    "(Tensor dy, Tensor gate, Tensor? up, bool packed, bool need_dgate, bool need_dup, str kind, str backend) "
    "-> Tensor[]",
    _gated_backward,
    _fake_gated_backward,
)
torch.library.register_autograd("fastln::activation", _activation_operator_gradients, setup_context=_setup_activation)
torch.library.register_autograd("fastln::gated_activation", _gated_operator_gradients, setup_context=_setup_gated)
