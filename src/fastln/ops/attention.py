"""Softmax attention: the operator, its fake, its autograd formula.

Only this file decides which gradients are computed (those that the inputs need) and what is kept for them.

| gradients wanted     | kept for backward                                         |
|----------------------|-----------------------------------------------------------|
| none                 | nothing                                                   |
| only dv              | q, k, one number per query and head, the mask, the seed   |
| dq or dk (+ any)     | the same, plus v and the output                           |

Where storage asks for it, q, k and v are not kept if they can be made again (`fastln.ops.again`).

The mask is kept in the form in which it was passed. Dropout keeps no mask, only its seed (eight bytes), from which the
backward draws the same numbers again.

fastln's compiled kernels compute attention of CPU tensors. Without them, or if the settings ask for the reference,
plain PyTorch computes training with dropout, in blocks, so that nothing of the size of the scores is kept. Everything
else (other devices, float64, masks that need a gradient, torch.func's transforms) goes to torch's own
`scaled_dot_product_attention`.

With `products="int8"` the compiled kernels multiply q kᵀ and do vᵀ in 8 bits where that pays; `why_exact` says where it
does not. What is kept stays exact.
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastln.errors import FastLNError
from fastln.ops.again import make, sources_of, without
from fastln.ops.backends import resolve
from fastln.ops.dispatch import Ways, call, define, is_transformed, wants_gradient
from fastln.ops.rounded import Reader, for_reader, for_successor, has_rows, rows_of
from fastln.ops.settings import DEFAULT, SCHEMA, OpSettings
from fastln_kernels import reference_attention
from fastln_kernels.cpu import native_attention, products, units
from fastln_kernels.cpu.library import DTYPES
from fastln_kernels.reference import arithmetic_dtype
from fastln_kernels.reference_attention import AttentionBackward, AttentionForward, AttentionGradients

logger = logging.getLogger(__name__)

_FEW_QUERIES = 16

SWITCH = "FASTLN_CPU_INT8_ATTENTION"
"""The environment variable that settles whether attention runs in 8 bits with `products="int8"`: 1 or 0."""

# What 8 bits cost, measured on an Intel server at 3 GHz: to round a row, and to scale what it gives with another row.
# To measure them again: `benchmarks/test_attention.py` times `int8` beside `fastln`. Take off what the rates of `fastln
# doctor` say that the two products in 8 bits save; of the rest, rows grow with the tokens and scores with their square.
_ROW_SECONDS, _SCORE_SECONDS = 40e-9, 0.1e-9
_USUAL_COLUMNS = 64  # of a head
_MULTIPLE = 32  # the kernels pad heads to multiples of this


class _Arguments(NamedTuple):
    """The arguments of attention besides its tensors.

    Attributes:
        scale: Factor on the scores.
        causal: Whether query i sees keys 0..i only.
        dropout: Probability of dropping an attention weight.
        settings: Which backend computes, and in which form.
        reader: What is known about who reads the result. No operator knows it.
    """

    scale: float
    causal: bool
    dropout: float
    settings: OpSettings
    reader: Reader | None = None

    @staticmethod
    def schema() -> str:
        """Return how an operator's schema declares the scalars."""
        return f"float scale, bool causal, float dropout, {SCHEMA}"

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as scalars, in the order of the schema."""
        return self.scale, self.causal, self.dropout, *self.settings.flat

    @classmethod
    def of(cls, scale: float, causal: bool, dropout: float, *flat: str) -> "_Arguments":
        """Rebuild the arguments from the scalars of `flat`."""
        return cls(scale, causal, dropout, OpSettings.of(*flat))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    settings: OpSettings = DEFAULT,
    reader: Reader | None = None,
) -> Tensor:
    """Compute softmax attention; differentiable once in q, k and v (and, through torch's own, in an additive mask).

    Under autocast, q, k and v are cast to its dtype, as in torch's own attention.

    Args:
        q: Queries `(B, H, Sq, D)`, any floating dtype.
        k: Keys `(B, Hk, Sk, D)`, same dtype; Hk divides H (grouped queries).
        v: Values `(B, Hk, Sk, Dv)`, same dtype.
        scale: Factor on the scores, 1/sqrt(D) by default.
        causal: Query i sees keys 0..i. Not together with a mask.
        mask: Boolean (True: attend) or additive, broadcastable to `(B, H, Sq, Sk)`.
        dropout: Probability of dropping an attention weight, from 0 to below 1; 0 outside of training.
        settings: Which backend computes, and in which form.
        reader: The note of the module that calls, about who reads the result.

    Returns:
        `(B, H, Sq, Dv)`; on CPU laid out as `(B, Sq, H, Dv)`. A row without a key is 0 and has no gradient.

    Raises:
        FastLNError: If the probability is out of range, causal is combined with a mask, or the backend cannot run on
            the device of `q`.
    """
    if not 0 <= dropout < 1:
        raise FastLNError(f"dropout is {dropout}; it must be from 0 to below 1")
    if causal and mask is not None:
        raise FastLNError("causal attention takes no mask: write the causal part into the mask")
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = (_autocast(x) for x in (q, k, v))
    if not has_own(q, k, v, mask=mask, dropout=dropout, settings=settings):
        groups = q.ndim == 4 and q.shape[1] != k.shape[1]
        with without(q, k, v) if settings.keeps.again else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=groups)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64) if dropout else None
    arguments = _Arguments(q.shape[-1] ** -0.5 if scale is None else scale, causal, dropout, settings, reader)
    out: Tensor = call(_WAYS, (q, k, v, mask, seed), arguments)[0]
    return out


def has_own(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout: float, settings: OpSettings = DEFAULT
) -> bool:
    """Whether `attention` computes this call itself instead of using torch's own attention.

    torch computes inference with few queries, such as a generation step, because the kernels would repack all keys each
    time. Meta tensors are treated like CPU tensors.

    Args:
        q: As `attention` takes it.
        k: Likewise.
        v: Likewise.
        mask: Likewise.
        dropout: Likewise.
        settings: Likewise.

    Raises:
        FastLNError: If the backend cannot run on the device of `q`.
    """
    compiled = _has_kernels(q, settings)
    if not (
        q.device.type == k.device.type == v.device.type
        and q.device.type in ("cpu", "meta")
        and q.dtype == k.dtype == v.dtype
        and q.is_floating_point()
        and q.ndim == k.ndim == v.ndim == 4
        and (mask is None or mask.ndim <= 4)
        and q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[3] == k.shape[3]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
        and (mask is None or (mask.device.type == q.device.type and not mask.requires_grad))
        and not is_transformed()
    ):
        return False
    trained = wants_gradient(q, k, v)
    if compiled:
        return trained or dropout > 0 or q.shape[2] > _FEW_QUERIES
    return trained and dropout > 0


def why_exact(
    settings: OpSettings,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dim: int | None = None,
    n_queries: int | None = None,
    n_keys: int | None = None,
) -> str | None:
    """Say why attention's products are exact; None if q kᵀ and do vᵀ run in 8 bits.

    Args:
        settings: Which backend computes, and in which form.
        device: The device of the tensors; the meta device counts as a CPU.
        dtype: Their dtype.
        dim: The width of a head; None if it is not known, which counts as 64.
        n_queries: The number of queries; None if it is not known, which counts as many.
        n_keys: The number of keys; likewise.

    Raises:
        FastLNError: If the backend cannot run on this device, or `FASTLN_CPU_INT8_ATTENTION` has no valid value.
    """
    if settings.products != "int8":
        return "products are exact"
    device = torch.device("cpu") if device.type == "meta" else device
    reason = _why_exact_here(settings, device, dtype, os.environ.get(SWITCH, ""))
    if reason is None and not torch.backends.mkldnn.enabled:
        reason = "oneDNN is switched off"
    if reason is not None or os.environ.get(SWITCH) == "1":
        return reason
    dim = _USUAL_COLUMNS if dim is None else max(dim, 1)
    few = _tokens_to_gain(dim, dtype)
    if isinstance(few, str):
        return few
    if any(number is not None and number < few for number in (n_queries, n_keys)):
        return f"with heads of {dim} columns, too few tokens to gain (under {few})"
    return None


def _tokens_to_gain(dim: int, dtype: torch.dtype) -> int | str:
    """Return from how many tokens on 8 bits are faster by the rates of this machine's units, or why they never are."""
    measured, name = units.rates(), str(units.compute_dtype(dtype)).removeprefix("torch.")
    exact, int8 = measured[name], measured["int8"]
    gained = 2 * math.ceil(dim / _MULTIPLE) * _MULTIPLE * (1 / exact - 1 / int8) - _SCORE_SECONDS
    if gained > 0:
        return math.ceil(_ROW_SECONDS / gained)
    return (
        f"with heads of {dim} columns, units in 8 bits are too little faster here: {int8 / 1e9:.0f} GFLOP/s a thread, "
        f"{name} {exact / 1e9:.0f}"
    )


@functools.cache
def _why_exact_here(settings: OpSettings, device: torch.device, dtype: torch.dtype, switch: str) -> str | None:
    """Say why attention is exact at any size; None if it is not."""
    if switch not in ("", "0", "1"):
        raise FastLNError(f"{SWITCH} is {switch!r}; it must be 0 or 1, or unset")
    choice = resolve("attention", device, settings)
    if choice.module != "cpu.native_attention" or dtype not in DTYPES:
        return "only fastln's compiled kernels for CPUs compute attention in 8 bits"
    if not products.in_8_bits("attention"):
        return "this processor has no units for products in 8 bits (AVX-512 VNNI or AMX)"
    return f"{SWITCH}=0 turns it off" if switch == "0" else None


def _in_8_bits(q: Tensor, k: Tensor, settings: OpSettings) -> bool:
    """Whether the kernels multiply in 8 bits, which forward and backward decide alike."""
    if settings.products != "int8":
        return False
    reason = why_exact(settings, q.device, q.dtype, dim=q.shape[3], n_queries=q.shape[2], n_keys=k.shape[2])
    if reason is not None:
        _tell(reason)
    return reason is None


@functools.cache
def _tell(reason: str) -> None:
    logger.info("attention is exact in spite of products='int8': %s", reason)


def _has_kernels(x: Tensor, settings: OpSettings) -> bool:
    """Whether compiled kernels exist for tensors like `x`."""
    has_library = _has_library(torch.device("cpu") if x.is_meta else x.device, settings)
    # torch refuses these matrix products if oneDNN is switched off.
    return has_library and x.dtype in DTYPES and bool(torch.backends.mkldnn.enabled)


@torch.compiler.assume_constant_result
def _has_library(device: torch.device, settings: OpSettings) -> bool:
    return resolve("attention", device, settings).module == "cpu.native_attention"


def _autocast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.is_floating_point() and x.dtype != torch.float64 else x


def _kernels_for(x: Tensor, settings: OpSettings) -> ModuleType:
    """Return the module that computes attention of `x`, with the functions of `fastln_kernels.reference_attention`."""
    return native_attention if _has_kernels(x, settings) else reference_attention


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, arguments: _Arguments
) -> tuple[Tensor, Tensor]:
    scale, causal, dropout, settings, reader = arguments
    request = AttentionForward(q, k, v, scale, causal, mask, dropout, seed, _in_8_bits(q, k, settings))
    kernels = _kernels_for(q, settings)
    rounds = for_reader(reader, kernels, rows_of(q, v.shape[-1]))
    out, lse = kernels.attention_forward(request, *rounds.told)
    return rounds.of(out), lse


def _backward(request: AttentionBackward, arguments: _Arguments, ctx: Any = None) -> AttentionGradients:
    forward, settings = request.forward, arguments.settings
    request = request._replace(forward=forward._replace(int8=_in_8_bits(forward.q, forward.k, settings)))
    kernels = _kernels_for(forward.q, settings)
    needed = (request.need_dq, request.need_dk, request.need_dv)
    rounds = [
        # A layer's result has heads side by side in a row, and so have the gradients in memory.
        for_successor(ctx if need and has_rows(x) else None, index, kernels, rows_of(x), laid_out=True)
        for index, (x, need) in enumerate(zip(forward[:3], needed, strict=True))
    ]
    names = ("round_dq", "round_dk", "round_dv")
    told = {name: one.told[0] for name, one in zip(names, rounds, strict=True) if one.told}
    gradients = kernels.attention_backward(request, **told)
    made = zip(rounds, gradients, strict=True)
    return AttentionGradients(*(None if gradient is None else one.of(gradient) for one, gradient in made))


def _keep(ctx: Any, tensors: tuple[Any, ...], arguments: _Arguments, out: Tensor, lse: Tensor) -> None:
    q, k, v, mask, seed = tensors
    need_scores = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    # dv needs only the shape of v, which follows from the shapes of k and dout.
    ctx.sources, (q, k, v) = sources_of((q, k, v if need_scores else None), arguments.settings.keeps.again)
    ctx.save_for_backward(q, k, v, out if need_scores else None, lse, mask, seed)
    ctx.arguments = arguments
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)


def _gradients(
    ctx: Any, dout: Tensor | None, backward: Callable[[AttentionBackward, _Arguments], AttentionGradients]
) -> AttentionGradients:
    if dout is None:
        return AttentionGradients(None, None, None)
    if torch.is_grad_enabled():
        raise FastLNError("attention is differentiable once: its backward cannot run with create_graph=True")
    q, k, v, out, lse, mask, seed = ctx.saved_tensors
    q, k, v = make((q, k, v), ctx.sources)
    assert q is not None
    assert k is not None
    if v is None:
        v = k.new_empty(()).expand(*k.shape[:3], dout.shape[-1])
    scale, causal, dropout, *_ = ctx.arguments
    forward = AttentionForward(q, k, v, scale, causal, mask, dropout, seed)
    return backward(AttentionBackward(forward, dout, out, lse, *ctx.needs_input_grad[:3]), ctx.arguments)


class _EagerAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward(*inputs)
        _keep(ctx, inputs[:5], inputs[5], out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *dout: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _gradients(ctx, dout[0], lambda request, arguments: _backward(request, arguments, ctx))
        return *gradients, None, None, None


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, arguments: _Arguments
) -> tuple[Tensor, Tensor]:
    return _like_tokens(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=arithmetic_dtype(q))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep(ctx, inputs[:5], _Arguments.of(*inputs[5:]), *output)


def _operator_gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx, dout, _backward_by_operator)
    return *gradients, None, None, *(None for _ in ctx.arguments.flat)


def _backward_by_operator(request: AttentionBackward, arguments: _Arguments) -> AttentionGradients:
    """Like `_backward`, through the operator, for compilers and tracers."""
    forward, dout, out, lse, *wanted = request
    made = iter(
        torch.ops.fastln.attention_backward(
            dout,
            forward.q,
            forward.k,
            forward.v,
            out,
            lse,
            forward.mask,
            forward.seed,
            *wanted,
            *arguments.flat,
        )
    )
    return AttentionGradients(*[next(made) if want else None for want in wanted])


def _operator_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    *wanted: Any,
) -> list[Tensor]:
    """Return the gradients that are needed; `wanted` says which, and ends with the arguments."""
    *wants, arguments = wanted
    scale, causal, dropout, *_ = arguments
    forward = AttentionForward(q, k, v, scale, causal, mask, dropout, seed)
    gradients = _backward(AttentionBackward(forward, dout, out, lse, *wants), arguments)
    return [gradient for gradient in gradients if gradient is not None]


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> list[Tensor]:
    *_, need_dq, need_dk, need_dv, _ = others
    wanted = ((q, need_dq), (k, need_dk), (v, need_dv))
    return [_like_tokens(x, x.shape[-1]) for x, need in wanted if need]


def _like_tokens(x: Tensor, dim: int) -> Tensor:
    """Allocate a result with tokens before heads in memory, as models lay out their projections."""
    n_batches, n_heads, n_tokens, _ = x.shape
    return x.new_empty(n_batches, n_tokens, n_heads, dim).transpose(1, 2)


define(
    "fastln::attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, {_Arguments.schema()}) -> (Tensor out, Tensor lse)",
    _Arguments,
    _forward,
    _fake_forward,
)
define(
    "fastln::attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, Tensor? mask, Tensor? seed, bool need_dq, "
    f"bool need_dk, bool need_dv, {_Arguments.schema()}) -> Tensor[]",
    _Arguments,
    _operator_backward,
    _fake_backward,
)
torch.library.register_autograd("fastln::attention", _operator_gradients, setup_context=_setup_context)
_WAYS = Ways(torch.ops.fastln.attention.default, _EagerAttention, _forward)
