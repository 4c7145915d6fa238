"""Attention for CPU tensors: torch's flash forward, and a backward made of batched matrix products.

With P = exp(scale q k^T + mask - lse), the row-wise softmax that the forward pass summarised in ``lse``:

    dv = P^T dout        dS = P * (dout v^T - delta),  delta = rowsum(dout * out)
    dq = scale dS k      dk = scale dS^T q

PyTorch's own CPU flash backward computes the same with many small products and runs far below the speed of bf16 matrix
units. Here each product is one batched ``bmm`` over a block of heads, small enough for its scores to stay in the cache:
the scores of one block are all that exists at a time. Scores are held transposed, one row per key, because then two of
the three products with P or dS need no transposition.

``bmm`` rounds its result to the inputs' type, so both subtractions happen inside it, in its float32 sums, by some more
columns: ``[k, -1] [scale q, lse]^T`` is log P transposed and ``[v, -1] [dout, delta]^T`` is dP - delta. What is rounded
is then small where it matters: the exponents of the keys that a query attends to (see `_exponent_shift`) and the
differences that make dS. Against float64, bf16 gradients are off by 0.3 to 0.7% (relative RMSE, scores of deviation 0.3
to 5), torch's flash backward by 0.2 to 0.5%, bf16 scores as they are by 0.7 to 3%.
"""

import math

import torch
from torch import Tensor

# Scores of one block: 2 MiB in bf16, beside as much for dS.
BLOCK_SCORES = 1 << 20

# A row whose scores are all this low is masked everywhere: additive masks use large negative numbers for -inf.
DEAD_ROW = -1e3


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
        in float32 (float64 for float64 inputs). A row with every key masked has output 0 and lse 0.
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
        lse.masked_fill_(dead, 0)  # the backward's mask then sends every exponential to 0
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

    Holds two times the scores of one block, which is at least one head: Sq x Sk elements.

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
    (n_batches, n_heads, n_queries, dim), n_keys, dtype = q.shape, k.shape[2], q.dtype
    dq = torch.empty_like(q) if need_dq else None
    dk = torch.empty_like(k) if need_dk else None
    dv = torch.empty_like(v) if need_dv else None
    if mask is not None:
        mask = mask.expand(n_batches, n_heads, n_queries, n_keys).mT

    heads = min(n_heads, max(1, BLOCK_SCORES // (n_queries * n_keys)))
    batches = min(n_batches, max(1, BLOCK_SCORES // (n_queries * n_keys * heads))) if heads == n_heads else 1
    # The float32 numbers that are subtracted need three columns of a 16-bit type.
    columns = 1 if dtype == lse.dtype else 3
    size = (batches, heads)
    q_buffer, dout_buffer = q.new_empty(2, *size, n_queries, dim + columns)
    k_buffer, v_buffer = k.new_full((2, *size, n_keys, dim + columns), -1)
    dq_buffer = q.new_empty(*size, n_queries, dim)
    dk_buffer = q.new_empty(*size, n_keys, dim)
    p_buffer, ds_buffer = q.new_empty(2, *size, n_keys, n_queries)

    shift = _exponent_shift(n_keys)
    offset = (lse - shift * math.log(2)).div_(scale)
    delta = torch.empty_like(dout, dtype=lse.dtype).copy_(dout).mul_(out).sum(-1)

    for b in range(0, n_batches, batches):
        for h in range(0, n_heads, heads):
            block = (slice(b, b + batches), slice(h, h + heads))
            q_block, k_block = q[block], k[block]
            used = (slice(q_block.shape[0]), slice(q_block.shape[1]))
            flat = [x[used].flatten(0, 1) for x in (q_buffer, k_buffer, v_buffer, dout_buffer, p_buffer, ds_buffer)]
            q_wide, k_wide, v_wide, dout_wide, p, ds = flat

            q_buffer[used][..., :dim].copy_(q_block)
            _write_columns(q_buffer[used][..., dim:], offset[block])
            k_buffer[used][..., :dim].copy_(k_block)
            torch.baddbmm(p, k_wide, q_wide.mT, beta=0, alpha=scale, out=p)
            if mask is not None:
                _apply_mask(p_buffer[used], mask[block])
            p.exp_()  # 2**shift P
            if causal:
                p.triu_()

            dout_buffer[used][..., :dim].copy_(dout[block])
            if dv is not None:
                result = dk_buffer[used].flatten(0, 1)
                torch.baddbmm(result, p, dout_wide[..., :dim], beta=0, alpha=2.0**-shift, out=result)
                dv[block].copy_(dk_buffer[used])
            if dq is None and dk is None:
                continue
            _write_columns(dout_buffer[used][..., dim:], delta[block])
            v_buffer[used][..., :dim].copy_(v[block])
            torch.bmm(v_wide, dout_wide.mT, out=ds)
            ds.mul_(p)
            if dk is not None:
                result = dk_buffer[used].flatten(0, 1)
                torch.baddbmm(result, ds, q_wide[..., :dim], beta=0, alpha=scale * 2.0**-shift, out=result)
                dk[block].copy_(dk_buffer[used])
            if dq is not None:
                result = dq_buffer[used].flatten(0, 1)
                torch.baddbmm(result, ds.mT, k_wide[..., :dim], beta=0, alpha=scale * 2.0**-shift, out=result)
                dq[block].copy_(dq_buffer[used])
    return dq, dk, dv


def _exponent_shift(n_keys: int) -> int:
    """The power of two by which P is held too large, so that the exponents which matter are rounded finely.

    A 16-bit exponent x is off by up to |x| / 512, and so is exp(x). Of n keys the attended ones have P between 1 / n
    (all attended alike) and 1; centring the exponents near the first, 8 / n, gave the smallest worst error over scores
    of deviation 0.3 to 5. A power of two leaves P's own rounding as it is, and is taken out after the products.
    """
    return max(0, round(math.log2(n_keys)) - 3)


def _write_columns(columns: Tensor, values: Tensor) -> None:
    """Write values (B, H, S) into columns (B, H, S, n) of a narrower type: each column takes what is left to round."""
    for i in range(columns.shape[-1]):
        columns[..., i].copy_(values)
        values = values - columns[..., i]


def _apply_mask(scores: Tensor, mask: Tensor) -> None:
    """Hide in place what the mask hides (boolean: where False) or add it (additive)."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)
