"""Softmax attention: the operator, its fake, its autograd formula.

Decided here, and only here: which gradients are computed (those that an input asks for) and what is kept for them.

| gradients wanted     | kept for backward                                         |
|----------------------|-----------------------------------------------------------|
| none                 | nothing                                                   |
| dv alone             | q, k, one number per query and head, the mask, the seed   |
| dq or dk (+ any)     | the same, v and the output                                |

The mask is kept as it was given, and there is none of dropout: its seed, eight bytes, draws the same numbers again.

On CPU tensors fastln's compiled kernels serve. Where they cannot be had plain PyTorch serves training with dropout, in
blocks, so that nothing of the size of the scores is kept; everything else (other devices, float64, masks that want a
gradient, torch.func's transforms) goes to torch's own `scaled_dot_product_attention`.

As in `fastln.ops.norm`, the operator `fastln::attention` is called where something must see it, and in plain eager mode
the way goes past the dispatcher to the same functions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastln.errors import FastLNError
from fastln.ops.dispatch import define, is_transformed, needs_operator, wants_gradient
from fastln_kernels import reference_attention
from fastln_kernels.cpu import native_attention, products
from fastln_kernels.cpu.library import DTYPES

_FEW_QUERIES = 16


class _Settings(NamedTuple):
    """What is not a tensor: arguments of the operator, in its order."""

    scale: float
    causal: bool
    dropout: float


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention, differentiable once in q, k, v (and, by torch's own, in an additive mask).

    Under autocast q, k, v are cast to its dtype, as torch's own attention casts them.

    Args:
        q: Queries `(B, H, Sq, D)`, any floating dtype.
        k: Keys `(B, Hk, Sk, D)`, same dtype; Hk divides H (grouped queries).
        v: Values `(B, Hk, Sk, Dv)`, same dtype.
        scale: Factor on the scores, 1/sqrt(D) by default.
        causal: Query i sees keys 0..i. Not together with a mask.
        mask: Boolean (True: attend) or additive, broadcastable to `(B, H, Sq, Sk)`.
        dropout: Probability of dropping an attention weight, from 0 to below 1; 0 outside of training.

    Returns:
        `(B, H, Sq, Dv)`; on CPU laid out as `(B, Sq, H, Dv)`. A row without a key is 0, and sends no gradient back.

    Raises:
        FastLNError: If the probability does not fit, or causal meets a mask.
    """
    if not 0 <= dropout < 1:
        raise FastLNError(f"dropout is {dropout}; it must be from 0 to below 1")
    if causal and mask is not None:
        raise FastLNError("causal attention takes no mask: put what is causal into the mask")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (_autocast(x) for x in (q, k, v))
    if not has_own(q, k, v, mask=mask, dropout=dropout):
        groups = q.ndim == 4 and q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=groups)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64) if dropout else None
    settings = _Settings(q.shape[-1] ** -0.5 if scale is None else scale, causal, dropout)
    tensors = (q, k, v, mask, seed)
    if needs_operator(*tensors):
        return torch.ops.fastln.attention(*tensors, *settings)[0]
    if wants_gradient(q, k, v):
        return _EagerAttention.apply(*tensors, settings)[0]
    return _forward(*tensors, *settings)[0]


def has_own(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout: float) -> bool:
    """Whether `attention` computes this itself rather than by torch's own attention.

    A few queries in inference, a step of generation, are torch's: the kernels lay out all keys anew for them.
    """
    if not (
        q.device.type == k.device.type == v.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype
        and q.is_floating_point()
        and q.ndim == k.ndim == v.ndim == 4
        and (mask is None or mask.ndim <= 4)
        and q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1:3] == v.shape[1:3]
        and q.shape[3] == k.shape[3]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
        and (mask is None or (mask.device.type == "cpu" and not mask.requires_grad))
        and not is_transformed()
    ):
        return False
    trained = wants_gradient(q, k, v)
    if _has_kernels(q):
        return trained or dropout > 0 or q.shape[2] > _FEW_QUERIES
    return trained and dropout > 0


def _has_kernels(x: Tensor) -> bool:
    # torch refuses the products where oneDNN is switched off.
    return x.dtype in DTYPES and bool(torch.backends.mkldnn.enabled) and _are_compiled()


@torch.compiler.assume_constant_result
def _are_compiled() -> bool:
    return products.why_not("attention") is None


def _autocast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype(x.device.type)) if x.is_floating_point() and x.dtype != torch.float64 else x


def _implementation(x: Tensor) -> Any:
    return native_attention if _has_kernels(x) else reference_attention


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    chosen = _Settings(*settings)
    return tuple(_implementation(q).attention_forward(q, k, v, mask=mask, seed=seed, **chosen._asdict()))


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    need_dq: bool,
    need_dk: bool,
    need_dv: bool,
    *settings: Any,
) -> list[Tensor]:
    """Return the wanted gradients."""
    gradients = _implementation(q).attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        mask=mask,
        seed=seed,
        need_dq=need_dq,
        need_dk=need_dk,
        need_dv=need_dv,
        **_Settings(*settings)._asdict(),
    )
    return [gradient for gradient in gradients if gradient is not None]


def _keep(ctx: Any, tensors: tuple[Any, ...], settings: _Settings, out: Tensor, lse: Tensor) -> None:
    q, k, v, mask, seed = tensors
    need_scores = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    # dv alone needs nothing of v but its shape, which k's and dout's say.
    ctx.save_for_backward(q, k, v if need_scores else None, out if need_scores else None, lse, mask, seed)
    ctx.settings = settings
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)


def _gradients(ctx: Any, dout: Tensor | None, compute: Callable[..., Sequence[Tensor]]) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None
    if torch.is_grad_enabled():
        raise FastLNError("attention is differentiable once: its backward cannot run with create_graph=True")
    q, k, v, out, lse, mask, seed = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if v is None:
        v = k.new_empty(()).expand(*k.shape[:3], dout.shape[-1])
    gradients = iter(compute(dout, q, k, v, out, lse, mask, seed, *wanted, *ctx.settings))
    return tuple(next(gradients) if want else None for want in wanted)


class _EagerAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, settings = arguments
        out, lse = _forward(*tensors, *settings)
        _keep(ctx, tuple(tensors), settings, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *dout: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dout[0], _backward), None, None, None


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _like_tokens(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=wide)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    need_dq: bool,
    need_dk: bool,
    need_dv: bool,
    *settings: Any,
) -> list[Tensor]:
    wanted = ((q, need_dq), (k, need_dk), (v, need_dv))
    return [_like_tokens(x, x.shape[-1]) for x, need in wanted if need]


def _like_tokens(x: Tensor, dim: int) -> Tensor:
    """A result: tokens before heads in memory, as models lay out what they project."""
    n_batches, n_heads, n_tokens, _ = x.shape
    return x.new_empty(n_batches, n_tokens, n_heads, dim).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep(ctx, inputs[:5], _Settings(*inputs[5:]), *output)


def _operator_gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx, dout, torch.ops.fastln.attention_backward)
    return *gradients, None, None, *(None for _ in _Settings._fields)


_SETTINGS = "float scale, bool causal, float dropout"
define(
    "fastln::attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, {_SETTINGS}) -> (Tensor out, Tensor lse)",
    _forward,
    _fake_forward,
)
define(
    "fastln::attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, Tensor? mask, Tensor? seed, bool need_dq, "
    f"bool need_dk, bool need_dv, {_SETTINGS}) -> Tensor[]",
    _backward,
    _fake_backward,
)
torch.library.register_autograd("fastln::attention", _operator_gradients, setup_context=_setup_context)
