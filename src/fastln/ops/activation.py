"""Activations, plain and gated: the operators, their fakes, their autograd formulas.

Only this file decides which gradients are computed (those that the inputs need) and what is kept for them.

| operation                       | gradients wanted | kept for backward                          |
|---------------------------------|------------------|--------------------------------------------|
| any                             | none             | nothing                                    |
| activation                      | of x             | x; for ReLU the result                     |
| gated, of two tensors           | of gate          | gate and up                                |
|                                 | only of up       | gate                                       |
| gated, of one tensor's halves   | of that tensor   | that tensor                                |

Where storage asks for it, none of these is kept if it can be made again (`fastln.ops.again`); or codes of what the
gradients are multiplied by are kept instead (`fastln_kernels.reference_codes`). For ReLU they are exact.

The backward recomputes the activation of the gate. ReLU keeps its result instead of its argument, because the sign of
either suffices. So the argument is freed before the next layer runs, and a trained next layer keeps the same tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.again import make, sources_of
from fastln.ops.backends import implementation
from fastln.ops.dispatch import Ways, call, define, overridable, wants_gradient
from fastln.ops.rounded import Reader, for_reader, for_successor
from fastln.ops.settings import DEFAULT, SCHEMA, OpSettings
from fastln_kernels.reference_activation import ACTIVATION_KINDS, ActivationKind, GatedGradients
from fastln_kernels.reference_codes import GROUPS, GatedCodes, code_shape

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Arguments(NamedTuple):
    """The arguments of an activation besides its tensors.

    Attributes:
        kind: Which activation.
        settings: Which backend computes, and in which form.
        reader: What is known about who reads the result. No operator knows it.
        bits: How many bits a number that is kept has; 0 if it is kept in full.
    """

    kind: ActivationKind
    settings: OpSettings
    reader: Reader | None = None
    bits: int = 0

    @staticmethod
    def schema() -> str:
        """Return how an operator's schema declares the scalars."""
        return f"str kind, int bits, {SCHEMA}"

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as scalars, in the order of the schema."""
        return self.kind, self.bits, *self.settings.flat

    @classmethod
    def of(cls, kind: ActivationKind, bits: int, *flat: str) -> "_Arguments":
        """Rebuild the arguments from the scalars of `flat`."""
        return cls(kind, OpSettings.of(*flat), None, bits)

    @property
    def gated_bits(self) -> int:
        """The same for a gated activation, which has no codes of 2 bits."""
        return max(self.bits, 4) if self.bits else 0


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
    y: Tensor = call(_PLAIN, (x,), _Arguments(kind, settings, reader, _bits(settings, x, kind=kind)))[0]
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
    y: Tensor = call(_GATED, (gate, up), _Arguments(kind, settings, reader, _bits(settings, gate, up)))[0]
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
    y: Tensor = call(_GATED, (gate_up, None), _Arguments(kind, settings, None, _bits(settings, gate_up)))[0]
    return y


def _bits(settings: OpSettings, *tensors: Tensor, kind: str = "") -> int:
    """Return how many bits a number that is kept has; 0 if all is kept in full, or nothing."""
    bits = settings.keeps.code_bits
    if bits and kind == "relu":
        bits = 2  # more would say nothing more
    return bits if bits and tensors[0].ndim and wants_gradient(*tensors) else 0


def _check(name: str, x: Tensor, kind: str) -> None:
    if kind not in ACTIVATION_KINDS:
        raise FastLNError(f"unknown activation {kind!r}; valid ones: {', '.join(ACTIVATION_KINDS)}")
    if x.dtype not in _DTYPES:
        raise FastLNError(f"an activation takes {', '.join(map(str, _DTYPES))}; {name} is {x.dtype}")


def _activation(x: Tensor, arguments: _Arguments) -> tuple[Tensor, Tensor | None]:
    """Return the result, and the codes of the derivative, if they are kept."""
    kernels, kind = implementation("activation", x, arguments.settings), arguments.kind
    rounds = for_reader(arguments.reader, kernels, x)
    if not arguments.bits:
        return rounds.of(kernels.activation_forward(x, kind, *rounds.told)), None
    y, codes = kernels.activation_forward(x, kind, *rounds.told, bits=arguments.bits)
    return rounds.of(y), codes


def _activation_backward(dy: Tensor, saved: Tensor, arguments: _Arguments, ctx: Any = None) -> Tensor:
    kernels = implementation("activation", dy, arguments.settings)
    rounds = for_successor(ctx, 0, kernels, dy)
    coded = {"bits": arguments.bits} if arguments.bits else {}
    return rounds.of(kernels.activation_backward(dy, saved, arguments.kind, *rounds.told, **coded))


def _gated(gate: Tensor, up: Tensor | None, arguments: _Arguments) -> tuple[Tensor | None, ...]:
    """Compute a gated activation. If `up` is None, `gate` holds both halves. Return it, and codes, if they are kept."""
    halves = gate.chunk(2, -1) if up is None else (gate, up)
    kernels = implementation("gated_activation", gate, arguments.settings)
    rounds = for_reader(arguments.reader, kernels, gate)
    if not arguments.bits:
        return rounds.of(kernels.gated_forward(*halves, arguments.kind, *rounds.told)), None, None, None, None
    y, codes = kernels.gated_forward(*halves, arguments.kind, *rounds.told, bits=arguments.gated_bits)
    return rounds.of(y), *codes


def _gated_backward(
    dy: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    codes: Sequence[Tensor],
    packed: bool,
    need_dgate: bool,
    need_dup: bool,
    arguments: _Arguments,
    ctx: Any = None,
) -> list[Tensor]:
    """Return the gradients that are needed. A packed gate holds both halves and has one gradient."""
    kernels, kind = implementation("gated_activation", dy, arguments.settings), arguments.kind
    kept: tuple[Any, Any] = (GatedCodes(*codes), None) if codes else (gate, up)
    if packed:
        dgate_up = dy.new_empty((*dy.shape[:-1], 2 * dy.shape[-1]))
        out = GatedGradients(*dgate_up.chunk(2, -1))
        if gate is not None:
            kept = tuple(gate.chunk(2, -1))  # type: ignore[assignment]
        kernels.gated_backward(dy, *kept, kind, need_dgate=True, need_dup=True, out=out)
        return [dgate_up]
    rounds = [for_successor(ctx if needed else None, i, kernels, dy) for i, needed in enumerate((need_dgate, need_dup))]
    told = {name: one.told[0] for name, one in zip(("round_dgate", "round_dup"), rounds, strict=True) if one.told}
    gradients = kernels.gated_backward(dy, *kept, kind, need_dgate=need_dgate, need_dup=need_dup, **told)
    return [one.of(gradient) for one, gradient in zip(rounds, gradients, strict=True) if gradient is not None]


def _keep_activation(ctx: Any, y: Tensor, codes: Tensor | None, x: Tensor, arguments: _Arguments) -> None:
    ctx.sources, _ = sources_of((x,), arguments.settings.keeps.hidden == "again")
    saved = codes if arguments.bits else y if arguments.kind == "relu" else x
    ctx.save_for_backward(saved if ctx.sources == [None] else None)
    ctx.arguments = arguments
    ctx.set_materialize_grads(False)


def _activation_gradient(ctx: Any, dy: Tensor | None, backward: Callable[..., Tensor], *told: Any) -> Tensor | None:
    if dy is None:
        return None
    _refuse_second_derivative()
    return backward(dy, *make(ctx.saved_tensors, ctx.sources), *told)


def _keep_gated(
    ctx: Any, gate: Tensor, up: Tensor | None, codes: tuple[Tensor | None, ...], arguments: _Arguments
) -> None:
    need_dgate, need_dup = ctx.needs_input_grad[:2]
    kept: tuple[Tensor | None, ...] = (gate if need_dgate or need_dup else None, up if need_dgate else None)
    if arguments.bits:
        kept = None, None, *codes
    ctx.sources, saved = sources_of(kept, arguments.settings.keeps.hidden == "again")
    ctx.save_for_backward(*saved)
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
    gate, up, *codes = make(ctx.saved_tensors, ctx.sources)
    gradients = iter(backward(dy, gate, up, codes, ctx.packed, *wanted, *told))
    dgate, dup = (next(gradients) if want else None for want in wanted)
    return dgate, dup


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise FastLNError("an activation is differentiable once: its backward cannot run with create_graph=True")


class _EagerActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: _Arguments) -> tuple[Tensor]:
        y, codes = _activation(x, arguments)
        _keep_activation(ctx, y, codes, x, arguments)
        return (y,)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return _activation_gradient(ctx, dys[0], _activation_backward, ctx.arguments, ctx), None


class _EagerGatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, arguments: _Arguments) -> tuple[Tensor | None]:
        y, *codes = _gated(gate, up, arguments)
        _keep_gated(ctx, gate, up, tuple(codes), arguments)
        return (y,)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gated_gradients(ctx, dys[0], _gated_backward, ctx.arguments, ctx), None


def _operator_activation(x: Tensor, arguments: _Arguments) -> tuple[Tensor, Tensor]:
    y, codes = _activation(x, arguments)
    return y, _or_empty(codes, x, torch.uint8)


def _fake_activation(x: Tensor, arguments: _Arguments) -> tuple[Tensor, Tensor]:
    shape = code_shape(x.shape, arguments.bits) if arguments.bits else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.uint8)


def _fake_activation_backward(dy: Tensor, saved: Tensor, arguments: _Arguments) -> Tensor:
    return dy.new_empty(dy.shape)


def _operator_gated(gate: Tensor, up: Tensor | None, arguments: _Arguments) -> tuple[Tensor, ...]:
    y, *codes = _gated(gate, up, arguments)
    assert y is not None
    if not arguments.bits:
        return y, *(gate.new_empty(0) for _ in codes)
    return y, *(code for code in codes if code is not None)


def _fake_gated(gate: Tensor, up: Tensor | None, arguments: _Arguments) -> tuple[Tensor, ...]:
    *batch, n_cols = gate.shape
    n_cols = n_cols if up is not None else n_cols // 2
    y = gate.new_empty((*batch, n_cols))
    if not arguments.bits:
        return y, *(gate.new_empty(0) for _ in range(4))
    bits = arguments.gated_bits
    dtype = torch.int8 if bits == 8 else torch.uint8
    codes = [gate.new_empty(code_shape(y.shape, bits), dtype=dtype) for _ in range(2)]
    n_groups = -(-n_cols // GROUPS[bits])
    return y, *codes, *(gate.new_empty((*batch, n_groups), dtype=torch.float32) for _ in range(2))


def _fake_gated_backward(
    dy: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    codes: Sequence[Tensor],
    packed: bool,
    need_dgate: bool,
    need_dup: bool,
    arguments: _Arguments,
) -> list[Tensor]:
    if packed:
        return [dy.new_empty((*dy.shape[:-1], 2 * dy.shape[-1]))]
    return [dy.new_empty(dy.shape) for _ in range(need_dgate + need_dup)]


def _or_empty(x: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(0, dtype=dtype) if x is None else x


def _setup_activation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *flat = inputs
    _keep_activation(ctx, *output, x, _Arguments.of(*flat))
    ctx.mark_non_differentiable(output[1])


def _activation_operator_gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    flat = ctx.arguments.flat
    return _activation_gradient(ctx, dy, torch.ops.fastln.activation_backward, *flat), *(None for _ in flat)


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate, up, *flat = inputs
    _keep_gated(ctx, gate, up, output[1:], _Arguments.of(*flat))
    ctx.mark_non_differentiable(*output[1:])


def _gated_operator_gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    flat = ctx.arguments.flat
    gradients = _gated_gradients(ctx, dy, torch.ops.fastln.gated_activation_backward, *flat)
    return *gradients, *(None for _ in flat)


define(
    "fastln::activation",
    f"(Tensor x, {_Arguments.schema()}) -> (Tensor y, Tensor codes)",
    _Arguments,
    _operator_activation,
    _fake_activation,
)
define(
    "fastln::activation_backward",
    f"(Tensor dy, Tensor saved, {_Arguments.schema()}) -> Tensor",
    _Arguments,
    _activation_backward,
    _fake_activation_backward,
)
define(
    "fastln::gated_activation",
    f"(Tensor gate, Tensor? up, {_Arguments.schema()}) "
    "-> (Tensor y, Tensor value, Tensor slope, Tensor value_scale, Tensor slope_scale)",
    _Arguments,
    _operator_gated,
    _fake_gated,
)
define(
    "fastln::gated_activation_backward",
    "(Tensor dy, Tensor? gate, Tensor? up, Tensor?[] codes, bool packed, bool need_dgate, bool need_dup, "
    f"{_Arguments.schema()}) -> Tensor[]",
    _Arguments,
    _gated_backward,
    _fake_gated_backward,
)
torch.library.register_autograd("fastln::activation", _activation_operator_gradients, setup_context=_setup_activation)
torch.library.register_autograd("fastln::gated_activation", _gated_operator_gradients, setup_context=_setup_gated)
_PLAIN = Ways(torch.ops.fastln.activation.default, _EagerActivation, _activation)
_GATED = Ways(torch.ops.fastln.gated_activation.default, _EagerGatedActivation, _gated)
