"""Attention on whole matrices in float64, tensors for it, and the errors that it may have."""

import math

import torch

from fastln_kernels.reference import dropout_keep, dropout_scale

SEED = torch.tensor([0x0123456789ABCDEF])
ALL = {"need_dq": True, "need_dk": True, "need_dv": True}

# Relative root-mean-square error: what a few roundings of the type make. Scores, sums and products are float32; P and
# dS are rounded once, the results once more.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float64: 1e-12}


def on_paper(q, k, v, scale, causal=False, mask=None, dropout=0.0):
    """Attention with whole matrices, differentiable; rows without a key are 0."""
    (b, h, n_queries, _), n_keys = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(h // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(n_queries, n_keys, dtype=torch.bool).triu(1), -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    if dropout:
        p = p * dropout_keep(b * h * n_queries, n_keys, dropout, SEED).view(p.shape) * dropout_scale(dropout)
    return p @ v


def make(dtype, b=2, h=3, kv_heads=None, n_queries=17, n_keys=None, dim=20, v_dim=None, seed=0):
    """q, k, v, dout as models lay them out: views of (B, S, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    n_keys, kv_heads, v_dim = n_keys or n_queries, kv_heads or h, v_dim or dim
    shapes = ((n_queries, h, dim), (n_keys, kv_heads, dim), (n_keys, kv_heads, v_dim), (n_queries, h, v_dim))
    return [torch.randn(b, *shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def relative_error(actual, expected, floor=0.0):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(floor + 1e-30)).item()
