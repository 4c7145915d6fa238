"""Attention for CPU tensors: torch's flash forward, and a backward made of batched matrix products.

With P = exp(scale q k^T + mask - lse), the row-wise softmax that the forward pass summarised in ``lse``:

    dv = P^T dout        dS = P * (dout v^T - delta),  delta = rowsum(dout * out)
    dq = scale dS k      dk = scale dS^T q

PyTorch's own CPU flash backward computes the same with many small products and runs far below the speed of the
machine's matrix units. Here each product is one batched ``bmm`` over a block of heads, and a block is small enough for
its scores to stay in the cache: S x S scores exist for one block at a time.

Two choices carry the precision. The exponent is computed in float32 whatever the inputs' type (a bf16 score of 4 is
off by 1%, and so would be its probability); P and dS are then rounded to the inputs' type for the products, as flash
attention does. And both subtractions happen inside the products, before anything is rounded, by one more column:
``[scale q, -lse] [k, 1]^T`` is log P and ``[dout, -delta] [v, 1]^T`` is dP - delta.
"""

import math

import torch
from torch import Tensor

# Scores of one block: 2 MiB in float32, which the second-level caches of two cores hold with P and dS beside it.
BLOCK_SCORES = 1 << 19

# A row whose largest masked score lies below this is masked everywhere: additive masks use the type's lowest number
# where they mean -inf.
DEAD_ROW = -1e30


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with what its backward needs.

    Args:
        q: Queries (B, H, Sq, D), any floating type, last dimension contiguous, not empty.
        k: Keys (B, H, Sk, D), same type.
        v: Values (B, H, Sk, D), same type.
        scale: Factor on the scores.
        causal: Query i sees keys 0..i. Not together with a mask.
        mask: Boolean (True: attend) or additive of q's type, broadcastable to (B, H, Sq, Sk).

    Returns:
        out (B, H, Sq, D) in q's type and memory layout, and lse (B, H, Sq), the log of each row's sum of exponentials,
        in float32 (float64 for float64 inputs). A row with every key masked has output 0 and lse +inf or 0.
    """
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        if mask.dim() < 4:
            mask = mask.expand(1, 1, q.shape[2], k.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    if mask is not None:
        dead = lse < DEAD_ROW
        lse.masked_fill_(dead, torch.inf)
        out.masked_fill_(dead.unsqueeze(-1), 0)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    need_dq: bool,
    need_dk: bool,
    need_dv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `attention_forward`; only those asked for are computed.

    Args:
        dout: Gradient of out (B, H, Sq, D), any strides.
        q: As given to the forward pass.
        k: As given to the forward pass.
        v: As given to the forward pass.
        out: From the forward pass.
        lse: From the forward pass.
        scale: As given to the forward pass.
        causal: As given to the forward pass.
        mask: As given to the forward pass.
        need_dq: Whether to compute dq.
        need_dk: Whether to compute dk.
        need_dv: Whether to compute dv.

    Returns:
        dq, dk, dv in the types and memory layouts of q, k, v; None where not asked for.
    """
    (n_batches, n_heads, n_queries, _), n_keys = q.shape, k.shape[2]
    dq = torch.empty_like(q) if need_dq else None
    dk = torch.empty_like(k) if need_dk else None
    dv = torch.empty_like(v) if need_dv else None
    if mask is not None:
        mask = mask.expand(n_batches, n_heads, n_queries, n_keys)
    batches, heads, rows = _block_shape(n_batches, n_heads, n_queries, n_keys)
    work = _Workspace(q)
    for b in range(0, n_batches, batches):
        for h in range(0, n_heads, heads):
            block = (slice(b, b + batches), slice(h, h + heads))
            _backward_block(
                dout[block],
                q[block],
                k[block],
                v[block],
                out[block],
                lse[block],
                scale=scale,
                causal=causal,
                mask=None if mask is None else mask[block],
                dq=None if dq is None else dq[block],
                dk=None if dk is None else dk[block],
                dv=None if dv is None else dv[block],
                rows=rows,
                work=work,
            )
    return dq, dk, dv


def _block_shape(n_batches: int, n_heads: int, n_queries: int, n_keys: int) -> tuple[int, int, int]:
    """How many batch items, heads and query rows one block takes so that it has at most BLOCK_SCORES scores."""
    per_head = n_queries * n_keys
    if per_head > BLOCK_SCORES:
        return 1, 1, min(n_queries, max(32, BLOCK_SCORES // n_keys // 32 * 32))
    heads = min(n_heads, BLOCK_SCORES // per_head)
    batches = min(n_batches, BLOCK_SCORES // (per_head * heads)) if heads == n_heads else 1
    return batches, heads, n_queries


class _Workspace:
    """Buffers by name, allocated at the first (largest) request and used again by every later block."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor, which shares its memory with all others of that name."""
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = self.like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)


def _backward_block(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    rows: int,
    work: _Workspace,
) -> None:
    """Write the gradients of one block of heads into dq, dk, dv (views of the results, None where not asked for)."""
    (n_batches, n_heads, n_queries, dim), n_keys, dim_v = q.shape, k.shape[2], v.shape[3]
    n, dtype, wide = n_batches * n_heads, q.dtype, lse.dtype
    heads = (n_batches, n_heads)
    # A low-precision delta takes two columns: its rounded value and what that leaves.
    dim_dv = dim_v + (1 if dtype == wide else 2)
    need_ds = dq is not None or dk is not None

    k_wide = work.get("k_wide", (*heads, n_keys, dim + 1), wide)
    k_wide[..., :dim].copy_(k)
    k_wide[..., dim:].fill_(1)
    k_near = work.get("k", (*heads, n_keys, dim), dtype).copy_(k)
    v_near = work.get("v", (*heads, n_keys, dim_dv), dtype)
    v_near[..., :dim_v].copy_(v)
    v_near[..., dim_v:].fill_(1)
    k_wide, k_near, v_near = k_wide.flatten(0, 1), k_near.flatten(0, 1), v_near.flatten(0, 1)
    # Sums over several blocks of rows are kept in the wide type.
    one_pass = rows >= n_queries
    sums = dtype if one_pass else wide
    dk_sum = work.get("dk", (n, n_keys, dim), sums)
    dv_sum = work.get("dv", (n, n_keys, dim_v), sums)
    if not one_pass:
        dk_sum.zero_()
        dv_sum.zero_()

    for start in range(0, n_queries, rows):
        stop = min(start + rows, n_queries)
        r = stop - start
        seen = min(stop, n_keys) if causal and not one_pass else n_keys
        q_rows, dout_rows = q[:, :, start:stop], dout[:, :, start:stop]

        q_wide = work.get("q_wide", (*heads, r, dim + 1), wide)
        q_wide[..., :dim].copy_(q_rows)
        q_wide[..., :dim].mul_(scale)
        torch.neg(lse[:, :, start:stop], out=q_wide[..., dim])
        scores = torch.bmm(q_wide.flatten(0, 1), k_wide[:, :seen].mT, out=work.get("scores", (n, r, seen), wide))
        if mask is not None:
            _apply_mask(scores.view(*heads, r, seen), mask[:, :, start:stop, :seen])
        if causal:
            _hide_future(scores, start)
        p = scores.exp_()
        if dtype != wide:
            p = work.get("p", (n, r, seen), dtype).copy_(p)

        dout_near = work.get("dout", (*heads, r, dim_dv), dtype)
        dout_near[..., :dim_v].copy_(dout_rows)
        if dv is not None:
            _add_product(dv_sum[:, :seen], p.mT, dout_near[..., :dim_v].flatten(0, 1), one_pass)
        if not need_ds:
            continue
        product = work.get("product", (*heads, r, dim_v), wide).copy_(dout_rows)
        delta = product.mul_(out[:, :, start:stop]).sum(-1).neg_()
        dout_near[..., dim_v].copy_(delta)
        if dtype != wide:
            dout_near[..., dim_v + 1].copy_(delta - dout_near[..., dim_v])
        ds = torch.bmm(dout_near.flatten(0, 1), v_near[:, :seen].mT, out=work.get("ds", (n, r, seen), dtype)).mul_(p)
        if dq is not None:
            dq_rows = work.get("dq", (n, r, dim), dtype)
            torch.baddbmm(dq_rows, ds, k_near[:, :seen], beta=0, alpha=scale, out=dq_rows)
            dq[:, :, start:stop].copy_(dq_rows.view(*heads, r, dim))
        if dk is not None:
            q_near = work.get("q", (*heads, r, dim), dtype).copy_(q_rows).flatten(0, 1)
            _add_product(dk_sum[:, :seen], ds.mT, q_near, one_pass, alpha=scale)
    if dk is not None:
        dk.copy_(dk_sum.view(*heads, n_keys, dim))
    if dv is not None:
        dv.copy_(dv_sum.view(*heads, n_keys, dim_v))


def _apply_mask(scores: Tensor, mask: Tensor) -> None:
    """Hide in place what the mask hides (boolean: where False) or add it (additive)."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)


def _hide_future(scores: Tensor, start: int) -> None:
    """Hide in place the keys after each query, for rows that begin at query `start`."""
    r, seen = scores.shape[1:]
    future = torch.ones(r, seen, dtype=torch.bool, device=scores.device).triu_(start + 1)
    scores.masked_fill_(future, -torch.inf)


def _add_product(total: Tensor, a: Tensor, b: Tensor, one_pass: bool, alpha: float = 1.0) -> None:
    """total = alpha a b where this is the only block of rows, total += alpha a b where it is one of several."""
    if one_pass:
        torch.baddbmm(total, a, b, beta=0, alpha=alpha, out=total)
    else:
        total.add_(torch.bmm(a, b), alpha=alpha)
