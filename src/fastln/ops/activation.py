"""Activations, plain and gated: the operators, their fakes, their autograd formulas.

Only this file decides which gradients are computed (those that the inputs need) and what is kept for them.

| operation                       | gradients wanted | kept for backward                          |
|---------------------------------|------------------|--------------------------------------------|
| any                             | none             | nothing                                    |
| activation                      | of x             | x; for ReLU the result                     |
| gated, of two tensors           | of gate          | gate and up                                |
|                                 | only of up       | gate                                       |
| gated, of one tensor's halves   | of that tensor   | that tensor                                |

Where storage asks for it, none of these is kept if it can be made again (`fastln.ops.again`).

The backward recomputes the activation of the gate. ReLU keeps its result instead of its argument, because the sign of
either suffices. So the argument is freed before the next layer runs, and a trained next layer keeps the same tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.again import Source, make, source_of
from fastln.ops.backends import implementation
from fastln.ops.dispatch import Ways, call, define, overridable
from fastln.ops.rounded import Reader, for_reader, for_successor
from fastln.ops.settings import DEFAULT, SCHEMA, OpSettings
from fastln_kernels.reference_activation import ACTIVATION_KINDS, ActivationKind, GatedGradients

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Arguments(NamedTuple):
    """The arguments of an activation besides its tensors.

    Attributes:
        kind: Which activation.
        settings: Which backend computes, and in which form.
        reader: What is known about who reads the result. No operator knows it.
    """

    kind: ActivationKind
    settings: OpSettings
    reader: Reader | None = None

    @staticmethod
    def schema() -> str:
        """Return how an operator's schema declares the scalars."""
        return f"str kind, {SCHEMA}"

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as scalars, in the order of the schema."""
        return self.kind, *self.settings.flat

    @classmethod
    def of(cls, kind: ActivationKind, *flat: str) -> "_Arguments":
        """Rebuild the arguments from the scalars of `flat`."""
        return cls(kind, OpSettings.of(*flat))


@overridable
def activation(
    x: Tensor, kind: ActivationKind, *, settings: OpSettings = DEFAULT, reader: Reader | None = None
) -> Tensor:
    """Apply an activation elementwise; differentiable once.

    Args:
        x: Any shape; float32, bfloat16, float16 or float64.
        kind: A name from `ACTIVATION_KINDS`.
        settings: Which backend computes, and in which form.
        reader: The note of the module that calls, about who reads the result.

    Returns:
        A contiguous tensor of the shape and dtype of `x`.

    Raises:
        FastLNError: If the kind is unknown, the dtype is not supported, or the backend cannot run on the device of `x`.
    """
    _check("x", x, kind)
    y: Tensor = call(_PLAIN, (x,), _Arguments(kind, settings, reader))
    return y


@overridable
def gated_activation(
    gate: Tensor,
    up: Tensor,
    kind: ActivationKind,
    *,
    settings: OpSettings = DEFAULT,
    reader: Reader | None = None,
) -> Tensor:
    """Compute `activation(gate) * up` elementwise, rounded once; differentiable once.

    If `gate` and `up` differ in dtype, both are cast to the dtype of their product.

    Args:
        gate: Any shape; float32, bfloat16, float16 or float64.
        up: Shaped like `gate`.
        kind: A name from `ACTIVATION_KINDS`: "silu" gives SwiGLU, "gelu" GEGLU.
        settings: Which backend computes, and in which form.
        reader: The note of the module that calls, about who reads the result.

    Returns:
        A contiguous tensor of the shape of `gate`.

    Raises:
        FastLNError: If the kind is unknown, shapes, dtypes or devices do not match, or the backend cannot run on the
            device of `gate`.
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
    y: Tensor = call(_GATED, (gate, up), _Arguments(kind, settings, reader))
    return y


@overridable
def packed_gated_activation(gate_up: Tensor, kind: ActivationKind, *, settings: OpSettings = DEFAULT) -> Tensor:
    """Compute `activation(gate) * up` of the two halves of a fused projection's result; differentiable once.

    This keeps one tensor and writes one gradient. `gated_activation` writes two, which autograd would have to join.

    Args:
        gate_up: `(..., 2 * n_cols)`, gate first; float32, bfloat16, float16 or float64.
        kind: A name from `ACTIVATION_KINDS`.
        settings: Which backend computes, and in which form.

    Returns:
        `(..., n_cols)`, contiguous, in the dtype of `gate_up`.

    Raises:
        FastLNError: If the kind is unknown, the shape or dtype is not supported, or the backend cannot run on the
            device of `gate_up`.
    """
    _check("gate_up", gate_up, kind)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise FastLNError(f"gate_up must have an even number of columns, gate's and up's; it is {(*gate_up.shape,)}")
    y: Tensor = call(_GATED, (gate_up, None), _Arguments(kind, settings))
    return y


def _check(name: str, x: Tensor, kind: str) -> None:
    if kind not in ACTIVATION_KINDS:
        raise FastLNError(f"unknown activation {kind!r}; valid ones: {', '.join(ACTIVATION_KINDS)}")
    if x.dtype not in _DTYPES:
        raise FastLNError(f"an activation takes {', '.join(map(str, _DTYPES))}; {name} is {x.dtype}")


def _activation(x: Tensor, arguments: _Arguments) -> Tensor:
    kernels = implementation("activation", x, arguments.settings)
    rounds = for_reader(arguments.reader, kernels, x)
    return rounds.of(kernels.activation_forward(x, arguments.kind, *rounds.told))


def _activation_backward(dy: Tensor, saved: Tensor, arguments: _Arguments, ctx: Any = None) -> Tensor:
    kernels = implementation("activation", dy, arguments.settings)
    rounds = for_successor(ctx, 0, kernels, dy)
    return rounds.of(kernels.activation_backward(dy, saved, arguments.kind, *rounds.told))


def _gated(gate: Tensor, up: Tensor | None, arguments: _Arguments) -> Tensor:
    """Compute a gated activation. If `up` is None, `gate` holds both halves."""
    halves = gate.chunk(2, -1) if up is None else (gate, up)
    kernels = implementation("gated_activation", gate, arguments.settings)
    rounds = for_reader(arguments.reader, kernels, gate)
    return rounds.of(kernels.gated_forward(*halves, arguments.kind, *rounds.told))


def _gated_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    packed: bool,
    need_dgate: bool,
    need_dup: bool,
    arguments: _Arguments,
    ctx: Any = None,
) -> list[Tensor]:
    """Return the gradients that are needed. A packed gate holds both halves and has one gradient."""
    kernels, kind = implementation("gated_activation", dy, arguments.settings), arguments.kind
    if packed:
        dgate_up = dy.new_empty(gate.shape)
        out = GatedGradients(*dgate_up.chunk(2, -1))
        kernels.gated_backward(dy, *gate.chunk(2, -1), kind, need_dgate=True, need_dup=True, out=out)
        return [dgate_up]
    rounds = [for_successor(ctx if needed else None, i, kernels, dy) for i, needed in enumerate((need_dgate, need_dup))]
    told = {name: one.told[0] for name, one in zip(("round_dgate", "round_dup"), rounds, strict=True) if one.told}
    gradients = kernels.gated_backward(dy, gate, up, kind, need_dgate=need_dgate, need_dup=need_dup, **told)
    return [one.of(gradient) for one, gradient in zip(rounds, gradients, strict=True) if gradient is not None]


def _source(x: Tensor | None, arguments: _Arguments) -> Source | None:
    return source_of(x) if arguments.settings.keeps.hidden == "again" else None


def _keep_activation(ctx: Any, y: Tensor, x: Tensor, arguments: _Arguments) -> None:
    ctx.sources = [_source(x, arguments)]
    saved = y if arguments.kind == "relu" else x
    ctx.save_for_backward(saved if ctx.sources == [None] else None)
    ctx.arguments = arguments
    ctx.set_materialize_grads(False)


def _activation_gradient(ctx: Any, dy: Tensor | None, backward: Callable[..., Tensor], *told: Any) -> Tensor | None:
    if dy is None:
        return None
    _refuse_second_derivative()
    return backward(dy, *make(ctx.saved_tensors, ctx.sources), *told)


def _keep_gated(ctx: Any, gate: Tensor, up: Tensor | None, arguments: _Arguments) -> None:
    need_dgate, need_dup = ctx.needs_input_grad[:2]
    saved = (gate if need_dgate or need_dup else None, up if need_dgate else None)
    ctx.sources = [_source(x, arguments) for x in saved]
    ctx.save_for_backward(*(x if source is None else None for x, source in zip(saved, ctx.sources, strict=True)))
    ctx.packed = up is None
    ctx.arguments = arguments
    ctx.set_materialize_grads(False)


def _gated_gradients(
    ctx: Any, dy: Tensor | None, backward: Callable[..., Sequence[Tensor]], *told: Any
) -> tuple[Tensor | None, Tensor | None]:
    if dy is None:
        return None, None
    _refuse_second_derivative()
    wanted = ctx.needs_input_grad[:2]
    gradients = iter(backward(dy, *make(ctx.saved_tensors, ctx.sources), ctx.packed, *wanted, *told))
    dgate, dup = (next(gradients) if want else None for want in wanted)
    return dgate, dup


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise FastLNError("an activation is differentiable once: its backward cannot run with create_graph=True")


class _EagerActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _activation(*inputs)
        _keep_activation(ctx, y, *inputs)
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return _activation_gradient(ctx, dys[0], _activation_backward, ctx.arguments, ctx), None


class _EagerGatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep_gated(ctx, *inputs)
        return _gated(*inputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gated_gradients(ctx, dys[0], _gated_backward, ctx.arguments, ctx), None


def _fake_activation(x: Tensor, arguments: _Arguments) -> Tensor:
    return x.new_empty(x.shape)


def _fake_activation_backward(dy: Tensor, saved: Tensor, arguments: _Arguments) -> Tensor:
    return dy.new_empty(dy.shape)


def _fake_gated(gate: Tensor, up: Tensor | None, arguments: _Arguments) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _fake_gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, packed: bool, need_dgate: bool, need_dup: bool, arguments: _Arguments
) -> list[Tensor]:
    return [dy.new_empty(gate.shape) for _ in range(1 if packed else need_dgate + need_dup)]


def _setup_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *flat = inputs
    _keep_activation(ctx, output, x, _Arguments.of(*flat))


def _activation_operator_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    flat = ctx.arguments.flat
    return _activation_gradient(ctx, dy, torch.ops.fastln.activation_backward, *flat), *(None for _ in flat)


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *flat = inputs
    _keep_gated(ctx, gate, up, _Arguments.of(*flat))


def _gated_operator_gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    flat = ctx.arguments.flat
    gradients = _gated_gradients(ctx, dy, torch.ops.fastln.gated_activation_backward, *flat)
    return *gradients, *(None for _ in flat)


define("fastln::activation", f"(Tensor x, {_Arguments.schema()}) -> Tensor", _Arguments, _activation, _fake_activation)
define(
    "fastln::activation_backward",
    f"(Tensor dy, Tensor saved, {_Arguments.schema()}) -> Tensor",
    _Arguments,
    _activation_backward,
    _fake_activation_backward,
)
define(
    "fastln::gated_activation",
    f"(Tensor gate, Tensor? up, {_Arguments.schema()}) -> Tensor",
    _Arguments,
    _gated,
    _fake_gated,
)
define(
    "fastln::gated_activation_backward",
    "(Tensor dy, Tensor gate, Tensor? up, bool packed, bool need_dgate, bool need_dup, "
    f"{_Arguments.schema()}) -> Tensor[]",
    _Arguments,
    _gated_backward,
    _fake_gated_backward,
)
torch.library.register_autograd("fastln::activation", _activation_operator_gradients, setup_context=_setup_activation)
torch.library.register_autograd("fastln::gated_activation", _gated_operator_gradients, setup_context=_setup_gated)
_PLAIN = Ways(torch.ops.fastln.activation.default, _EagerActivation, _activation)
_GATED = Ways(torch.ops.fastln.gated_activation.default, _EagerGatedActivation, _gated)
