"""Softmax attention in plain PyTorch: the definition for testing the other implementations.

Arithmetic is float32, or float64 for float64 inputs. With P = softmax(scale q k^T + mask) along the keys, and D the
dropout factor of each element (0 or dropout's scale):

    out = (D P) v        delta = rowsum(dout out)        dS = P (D (dout v^T) - delta)
    dv = (D P)^T dout    dq = scale dS k                 dk = scale dS^T q

*In 8 bits.* With `int8` the products of rows with rows, q k^T and dout v^T, are products of whole numbers. Each row is
rounded with a scale of its own (`reference_int8.quantise`). The means over the keys are taken off first:

    q ≈ q_hat    k - k_mean ≈ k_hat    dout ≈ dout_hat    v - v_mean ≈ v_hat

So a column in which all keys are large does not make the steps of the others coarse. q k_mean^T is the same for all
keys, which does not change the softmax. And dq does not depend on k_mean, because the rows of dS sum to 0. With

    scores = scale q_hat k_hat^T + mask
    dout v^T ≈ dout_hat v_hat^T + dout_hat v_mean^T        delta = rowsum(dout_hat out)

and k - k_mean in place of k in dq, the rest is as above. delta takes dout_hat, because then the rounding of dout moves
both terms of dS alike and nearly cancels.

It processes blocks of queries, so that at most `BLOCK_SCORES` scores, or one row of them, exist at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastln_kernels.reference import arithmetic_dtype, dropout_keep, dropout_scale
from fastln_kernels.reference_int8 import Rows8, Weight8, linear, quantise

BLOCK_SCORES = 1 << 20
"""How many scores exist at a time."""

_HIDDEN = -1e30  # lower scores come from a mask that added the lowest number of its dtype
_DEAD = 2.0**100


class AttentionForward(NamedTuple):
    """The inputs of `attention_forward`.

    Attributes:
        q: Queries `(B, H, Sq, D)`, any floating dtype.
        k: Keys `(B, Hk, Sk, D)`, same dtype; Hk divides H (grouped queries).
        v: Values `(B, Hk, Sk, Dv)`, same dtype.
        scale: Factor on the scores.
        causal: Whether query i sees only keys 0..i.
        mask: Boolean (True: attend) or additive, broadcastable to `(B, H, Sq, Sk)`.
        dropout: Probability of dropping an attention weight.
        seed: `(1,)`, int64. The weight of query i and key j in head h of sequence b is dropped if
            `reference.dropout_keep` drops row `(b H + h) Sq + i`, column j.
        int8: Whether q k^T and do v^T are products of whole numbers in 8 bits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool = False
    mask: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    int8: bool = False


class AttentionOutputs(NamedTuple):
    """The results of the forward.

    Attributes:
        out: `(B, H, Sq, Dv)`, with the memory layout `(B, Sq, H, Dv)`.
        lse: `(B, H, Sq)`, the log of each row's sum of exponentials, in the dtype of the arithmetic. Only the backward
            uses it. It is 0 for a row without visible keys. If the mask adds its dtype's lowest number to every key of
            a row, it is the number of keys times 2^100, because a float32 cannot hold both the score and the count.
    """

    out: Tensor
    lse: Tensor


class AttentionBackward(NamedTuple):
    """The inputs of `attention_backward`.

    Attributes:
        forward: The inputs of the forward.
        dout: Gradient of out `(B, H, Sq, Dv)`.
        out: From the forward; may be None if only dv is requested.
        lse: From the forward.
        need_dq: Whether to compute the gradient of q.
        need_dk: Whether to compute the gradient of k.
        need_dv: Whether to compute the gradient of v.
    """

    forward: AttentionForward
    dout: Tensor
    out: Tensor | None
    lse: Tensor
    need_dq: bool = False
    need_dk: bool = False
    need_dv: bool = False


class AttentionGradients(NamedTuple):
    """The results of the backward, with the memory layout of `AttentionOutputs.out`; None if not requested."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None


class _Block(NamedTuple):
    """Some queries of one head, in the dtype of the arithmetic."""

    where: tuple[int, int, slice]  # batch, head, queries
    kv_where: tuple[int, int]
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    kept: Tensor | None  # dropout's factors


def attention_forward(request: AttentionForward) -> AttentionOutputs:
    """Compute softmax attention and what its backward needs. A row without visible keys is 0."""
    q = request.q
    n_batches, n_heads, n_queries, _ = q.shape
    wide = arithmetic_dtype(q)
    out = q.new_zeros(n_batches, n_queries, n_heads, request.v.shape[-1]).transpose(1, 2)
    lse = q.new_zeros(n_batches, n_heads, n_queries, dtype=wide)
    for block in _blocks(request):
        top = block.scores.amax(-1, keepdim=True)
        exponentials = (block.scores - top.masked_fill(top == -torch.inf, 0)).exp()
        total = exponentials.sum(-1, keepdim=True)
        p = exponentials / total.masked_fill(total == 0, 1)
        out[block.where] = ((p if block.kept is None else p * block.kept) @ block.v).to(q.dtype)
        row_lse = (top + total.log()).masked_fill(total == 0, 0)
        lse[block.where] = torch.where((top < _HIDDEN) & (total != 0), total * _DEAD, row_lse).squeeze(-1)
    return AttentionOutputs(out, lse)


def attention_backward(request: AttentionBackward) -> AttentionGradients:
    """Compute the requested gradients of `attention_forward`."""
    q, k, v, scale = request.forward[:4]
    wide = arithmetic_dtype(q)
    dq, dk, dv = (
        x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=wide).transpose(1, 2) if need else None
        for x, need in ((q, request.need_dq), (k, request.need_dk), (v, request.need_dv))
    )
    for block in _blocks(request.forward):
        row_lse = request.lse[block.where][:, None]
        dead = row_lse >= _DEAD
        scores = torch.where(dead & (block.scores > -torch.inf), 0, block.scores)
        p = (scores - torch.where(dead, (row_lse / _DEAD).log(), row_lse)).exp()
        block_dout = seen_dout = request.dout[block.where].to(wide)
        if dv is not None:
            dv[block.kv_where] += (p if block.kept is None else p * block.kept).mT @ block_dout
        if dq is None and dk is None:
            continue
        assert request.out is not None
        if request.forward.int8:
            rows, (values, mean) = quantise(block_dout), _centred(block.v)
            seen_dout = rows.values.to(wide) * rows.scale[:, None]
            dp = _dots(rows, quantise(values)).to(wide) + (seen_dout @ mean.to(wide))[:, None]
        else:
            dp = block_dout @ block.v.mT
        delta = (seen_dout * request.out[block.where]).sum(-1, keepdim=True)
        ds = p * ((dp if block.kept is None else dp * block.kept) - delta) * scale
        if dq is not None:
            dq[block.where] = ds @ (_centred(block.k)[0].to(wide) if request.forward.int8 else block.k)
        if dk is not None:
            dk[block.kv_where] += ds.mT @ block.q
    return AttentionGradients(*(None if gradient is None else gradient.to(q.dtype) for gradient in (dq, dk, dv)))


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows without their mean, and the mean, in float32. A column that holds NaN or Inf keeps its mean."""
    mean = x.to(torch.float64).mean(0).to(torch.float32)
    mean = torch.where(mean.isfinite(), mean, 0)
    return x.to(torch.float32) - mean, mean


def _dots(a: Rows8, b: Rows8) -> Tensor:
    """Multiply rows by rows; float32."""
    return linear(a, Weight8.of(*b, turned=False), None, torch.float32)


def _blocks(request: AttentionForward) -> Iterator[_Block]:
    """Yield the blocks in order. Scores of hidden keys are -infinity."""
    q, k, v, scale, causal, mask, dropout, seed, int8 = request
    n_batches, n_heads, n_queries, _ = q.shape
    n_keys, group, wide = k.shape[2], n_heads // max(k.shape[1], 1), arithmetic_dtype(q)
    if n_keys == 0:
        return
    if mask is not None:
        mask = mask.expand(n_batches, n_heads, n_queries, n_keys)
    columns = torch.arange(n_keys, device=q.device)
    size = max(1, BLOCK_SCORES // n_keys)
    for batch in range(n_batches):
        for head in range(n_heads):
            kv_where = (batch, head // group)
            wide_k, wide_v = k[kv_where].to(wide), v[kv_where].to(wide)
            for first in range(0, n_queries, size):
                rows = slice(first, min(first + size, n_queries))
                where = (batch, head, rows)
                wide_q = q[where].to(wide)
                if int8:
                    scores = _dots(quantise(wide_q), quantise(_centred(wide_k)[0])).to(wide) * scale
                else:
                    scores = wide_q @ wide_k.mT * scale
                if mask is not None and mask.dtype == torch.bool:
                    scores = scores.masked_fill(~mask[where], -torch.inf)
                elif mask is not None:
                    scores = scores + mask[where].to(wide)
                if causal:
                    hidden = columns > torch.arange(rows.start, rows.stop, device=q.device)[:, None]
                    scores = scores.masked_fill(hidden, -torch.inf)
                kept = None
                if dropout:
                    assert seed is not None
                    first_row = (batch * n_heads + head) * n_queries + rows.start
                    keep = dropout_keep(rows.stop - rows.start, n_keys, dropout, seed, first_row)
                    kept = keep.to(wide) * dropout_scale(dropout)
                yield _Block(where, kv_where, wide_q, wide_k, wide_v, scores, kept)
