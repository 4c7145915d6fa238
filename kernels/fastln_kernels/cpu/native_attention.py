"""Attention for CPU tensors, computed by the compiled kernels of `attention.cpp`; `reference_attention` defines it.

The kernels take float32, bfloat16 and float16 and sum in float32. bfloat16 is multiplied in the unit that is faster on
this machine (`units`), float16 as float32, and products of rows with rows also in 8 bits. Each thread holds the scores
of 64 queries and at most 320 keys, for any sequence length. It also holds one head in the memory layouts that products
need. Results do not depend on the number of threads.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from fastln_kernels.cpu import native_int8, products, units
from fastln_kernels.cpu.heads import Rows
from fastln_kernels.cpu.library import DTYPES, KernelsUnavailableError
from fastln_kernels.cpu.native_int8 import Rounding
from fastln_kernels.reference import dropout_threshold
from fastln_kernels.reference_attention import (
    AttentionBackward,
    AttentionForward,
    AttentionGradients,
    AttentionOutputs,
)

_BOOLEAN_MASK = 3

ROUNDED_BY = native_int8
"""The module whose `rounding` these functions take."""


class _Arguments(ctypes.Structure):
    """The struct `Arguments` in `attention.cpp`."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "compute_dtype", "int8", "n_threads", "batches", "heads")),
        *((name, c_int64) for name in ("kv_heads", "queries", "keys", "dim", "v_dim")),
        *((name, c_int64) for name in ("causal", "mask_dtype", "threshold")),
        ("seed", c_void_p),
        ("scale", c_double),
        *((name, Rows) for name in ("q", "k", "v", "mask", "out", "dout", "dq", "dk", "dv")),
        ("lse", c_void_p),
        *((f"{name}_rounding", ctypes.POINTER(Rounding)) for name in ("out", "dq", "dk", "dv")),
    )


def attention_forward(request: AttentionForward, rounding: Rounding | None = None) -> AttentionOutputs:
    """Compute softmax attention and what its backward needs.

    Arguments and results are those of `fastln_kernels.reference_attention.attention_forward`, for float32, bfloat16 and
    float16. `rounding` says where the result is written in 8 bits too, if anywhere: as rows `(B Sq, H Dv)`.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels, or no products in 8 bits that were asked for.
    """
    q, k, v = request.q, request.k, request.v
    (n_batches, n_heads, n_queries, _), v_dim = q.shape, v.shape[-1]
    out = q.new_empty(n_batches, n_queries, n_heads, v_dim).transpose(1, 2)
    lse = q.new_empty(n_batches, n_heads, n_queries, dtype=torch.float32)
    if not (k.shape[2] and v_dim and q.shape[-1]):
        _zero(out, rounding)
        return AttentionOutputs(out, lse.zero_())
    _call("fastln_attention_forward", request, {"out": out}, lse, {"out": rounding})
    return AttentionOutputs(out, lse)


def attention_backward(
    request: AttentionBackward,
    *,
    round_dq: Rounding | None = None,
    round_dk: Rounding | None = None,
    round_dv: Rounding | None = None,
) -> AttentionGradients:
    """Compute only the requested gradients, and only the products that they need.

    Arguments and results are those of `fastln_kernels.reference_attention.attention_backward`. `round_dq`, `round_dk`
    and `round_dv` say where requested gradients are written in 8 bits too, if anywhere: as rows `(B S, H D)`.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels, or no products in 8 bits that were asked for.
    """
    q, k, v = request.forward[:3]
    wanted = {"dq": (q, request.need_dq), "dk": (k, request.need_dk), "dv": (v, request.need_dv)}
    # The memory layout that models use: tokens before heads.
    made = {
        name: x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        for name, (x, need) in wanted.items()
        if need
    }
    gradients = AttentionGradients(*(made.get(name) for name in wanted))
    roundings = {"dq": round_dq, "dk": round_dk, "dv": round_dv}
    if not (k.shape[2] and q.shape[2] and v.shape[-1] and q.shape[-1]):
        for name, gradient in made.items():
            _zero(gradient, roundings[name])
        return gradients
    tensors = {"dout": request.dout, **made} | ({} if request.out is None else {"out": request.out})
    _call("fastln_attention_backward", request.forward, tensors, request.lse, roundings)
    return gradients


def _zero(result: Tensor, rounding: Rounding | None) -> None:
    """Set a result to 0, where there is nothing to compute, and its rows in 8 bits."""
    result.zero_()
    if rounding is not None and result.numel():
        native_int8.quantise_into(rounding, result.transpose(1, 2).flatten(0, 1).flatten(1))


def _call(
    symbol: str,
    request: AttentionForward,
    more: dict[str, Tensor],
    lse: Tensor,
    roundings: dict[str, Rounding | None],
) -> None:
    """Call a kernel with the tensors in `request` and `more`, with `lse`, and with the roundings of its results."""
    if request.int8 and not products.in_8_bits("attention"):
        raise KernelsUnavailableError("this processor has no units for products in 8 bits")
    # Copies must live until the kernel has run.
    tensors = {
        name: x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        for name, x in {"q": request.q, "k": request.k, "v": request.v, **more}.items()
    }
    lse = lse.contiguous()
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    arguments = _Arguments(
        dtype=DTYPES[q.dtype],
        compute_dtype=DTYPES[units.compute_dtype(q.dtype)],
        int8=request.int8,
        n_threads=torch.get_num_threads(),
        batches=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        queries=q.shape[2],
        keys=k.shape[2],
        dim=q.shape[3],
        v_dim=v.shape[3],
        causal=request.causal,
        threshold=dropout_threshold(request.dropout),
        seed=None if request.seed is None else request.seed.data_ptr(),
        scale=request.scale,
        lse=lse.data_ptr(),
        **{name: Rows.of(x) for name, x in tensors.items()},
        **{f"{name}_rounding": ctypes.pointer(one) for name, one in roundings.items() if one is not None},
    )
    if request.mask is not None:
        mask = _mask(request.mask, q, k)
        arguments.mask = Rows.of(mask)
        arguments.mask_dtype = _BOOLEAN_MASK if mask.dtype == torch.bool else DTYPES[mask.dtype]
    _kernel(symbol)(ctypes.byref(arguments))


def _mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return the mask as (B, H, Sq, Sk). All dimensions but the last may be expanded."""
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        mask = mask.to(torch.float32)
    n_keys = k.shape[2]
    if mask.shape[-1] != n_keys or (mask.stride(-1) != 1 and n_keys > 1):
        mask = mask.expand(*mask.shape[:-1], n_keys).contiguous()
    return mask.expand(*q.shape[:3], n_keys)


@functools.cache
def _kernel(symbol: str) -> Callable[..., None]:
    return products.function("attention", symbol, (ctypes.POINTER(_Arguments),))
