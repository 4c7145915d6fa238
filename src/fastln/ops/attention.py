"""Attention whose bf16 backward on CPU runs as batched matrix products.

The blocked backward serves where it is faster, by measurement: 16-bit CPU tensors that need a gradient, up to about a
thousand tokens (seven hundred causal ones, of which torch skips half). Everything else (float32 and float64,
accelerators, dropout, longer sequences, no gradient wanted) goes to torch's own `scaled_dot_product_attention`, whose
forward pass the blocked path uses too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastln_kernels.cpu.attention import BLOCK_SCORES, attention_backward, attention_forward


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
    """Softmax attention, differentiable in q, k, v (and in an additive mask).

    Saved for backward: q, k, v, the output, one float32 per query row, and the mask as it was given.

    Args:
        q: Queries (B, H, Sq, D).
        k: Keys (B, Hk, Sk, D); Hk divides H (grouped queries).
        v: Values (B, Hk, Sk, Dv).
        scale: Factor on the scores, 1/sqrt(D) by default.
        causal: Query i sees keys 0..i. Not together with a mask.
        mask: Boolean (True: attend) or additive, broadcastable to (B, H, Sq, Sk).
        dropout: Probability to drop an attention weight; not 0: torch's own attention serves.

    Returns:
        (B, H, Sq, Dv). A row with every key masked is 0, and sends no gradient back.
    """
    if not uses_blocked(q, k, v, causal=causal, mask=mask, dropout=dropout):
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return torch.ops.fastln.attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale, causal)[0]


def uses_blocked(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, dropout: float) -> bool:
    """Whether `attention` takes the blocked path for these arguments rather than torch's own attention."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.device.type == "cpu"
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
        and dropout == 0.0
        and (mask is None or not mask.requires_grad)
        and q.dim() == 4
        and q.shape[-1] == v.shape[-1]
        and 0 < q.shape[2] * k.shape[2] <= (BLOCK_SCORES // 2 if causal else BLOCK_SCORES)
        and q.shape[0] * q.shape[-1] > 0
    )


@torch.library.custom_op("fastln::attention", mutates_args=(), device_types="cpu")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return attention_forward(q, k, v, scale=scale, causal=causal, mask=mask)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h, s = q.shape[:3]
    return torch.empty_like(q), q.new_empty(b, s, h, dtype=wide).transpose(1, 2)


@torch.library.custom_op("fastln::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needed: list[bool],
) -> list[Tensor]:
    need_dq, need_dk, need_dv = needed
    grads = attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        scale=scale,
        causal=causal,
        mask=mask,
        need_dq=need_dq,
        need_dk=need_dk,
        need_dv=need_dv,
    )
    return [grad for grad in grads if grad is not None]


@_attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    needed: list[bool],
) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip((q, k, v), needed, strict=True) if need]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale, ctx.causal = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, mask, out, lse)


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    grads = iter(torch.ops.fastln.attention_backward(dout, q, k, v, out, lse, mask, ctx.scale, ctx.causal, needed))
    return *(next(grads) if need else None for need in needed), None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
