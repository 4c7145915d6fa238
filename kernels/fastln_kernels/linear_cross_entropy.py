"""The loss of a language-model head and its gradients, computed chunk by chunk so that all logits never exist at once.

For one row, with u = W h + b, logits z = s u, p = softmax(z), v classes, label y and smoothing e:

    loss = -(1 - e) log p[y] - e mean(log p)          dz = p - (1 - e) onehot(y) - e / v          du = s dz
    dh = W^T du          dW = du h^T          db = du          (dW and db summed over the rows)

With a soft cap c, z = c t with t = tanh(s u / c), and du = s (1 - t^2) dz.

The gradient of a row's loss depends only on that row, so it is computed while the row's logits exist. Products use the
tensors' dtype; where a CPU multiplies bfloat16 faster as float32, the kernel of linear layers does that. Everything
between them, and the sums over chunks, is float32 (float64 for float64).

With a weight in 8 bits, hidden states are rounded to 8 bits, row by row. The gradient of the logits has one large
entry, at the label, and thousands of small ones, so it needs more: it is the sum of two rows in 8 bits, of which the
second is what the first leaves over. That is three products in place of two.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastln_kernels.cpu import native_int8, native_linear, products, units
from fastln_kernels.reference_int8 import Weight8

CHUNK_BYTES = 32 << 20
"""Size of one chunk's float32 (or float64) logits.

Two such tensors exist at a time (four with a soft cap), and one in the tensors' dtype. Every product reads the whole
weight, so small chunks are slow.
"""


class HeadRequest(NamedTuple):
    """What `linear_cross_entropy` computes from.

    Attributes:
        hidden: `(n_rows, d)`, any strides, of a floating dtype.
        weight: `(n_classes, d)`, likewise.
        bias: `(n_classes,)`, likewise, or None for zeros.
        labels: `(n_rows,)`, int64, from 0 to below `n_classes`.
        scale: What the logits are multiplied by.
        softcap: What their size then stays below, softly; None for no bound.
        label_smoothing: The share of the target that is spread over all classes.
        dy: `(n_rows,)`, what each row's loss is multiplied by in the sum whose gradients are wanted; None for ones.
        need_dhidden: Whether the gradient of `hidden` is wanted.
        need_dweight: Whether the gradient of `weight` is wanted.
        need_dbias: Whether the gradient of `bias` is wanted.
        rounded: The weight in 8 bits, which then multiplies in its place; None for exact products. It takes CPU tensors
            and no gradient of the weight.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    dy: Tensor | None = None
    need_dhidden: bool = False
    need_dweight: bool = False
    need_dbias: bool = False
    rounded: Weight8 | None = None


class HeadGradients(NamedTuple):
    """The results of `linear_cross_entropy`; None for those that were not requested.

    Attributes:
        losses: `(n_rows,)`, float32 (float64 for float64).
        dhidden: `(n_rows, d)`, in the dtype of `hidden`.
        dweight: `(n_classes, d)`, in the dtype of `weight`.
        dbias: `(n_classes,)`, in the dtype of `bias`.
    """

    losses: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def linear_cross_entropy(request: HeadRequest) -> HeadGradients:
    """Compute the loss of every row and the wanted gradients of their sum."""
    hidden, weight, bias, labels, scale, softcap, label_smoothing, dy, *wanted, rounded = request
    need_dhidden, need_dweight, need_dbias = wanted
    n_rows, n_classes = hidden.shape[0], weight.shape[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = hidden.new_empty(n_rows, dtype=wide)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_dhidden else None
    dweight = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format) if need_dweight else None
    dbias = hidden.new_zeros(n_classes, dtype=wide) if need_dbias else None
    step = max(1, CHUNK_BYTES // (n_classes * wide.itemsize))
    for rows in (slice(start, start + step) for start in range(0, n_rows, step)):
        own = rounded is None and _is_own(hidden[rows], weight, bias)
        if rounded is not None:
            logits = native_int8.linear(
                native_int8.quantise(hidden[rows], turned=rounded.turned), rounded, bias, hidden.dtype
            )
        else:
            logits = (native_linear.linear if own else F.linear)(hidden[rows], weight, bias)
        shaped = logits
        slope: float | Tensor | None = None  # derivative of the shaped logits
        if softcap is not None:
            squashed = (logits.to(wide) * (scale / softcap)).tanh_()
            shaped, slope = squashed * softcap, squashed.square_().neg_().add_(1).mul_(scale)
        elif scale != 1:
            shaped, slope = logits.to(wide) * scale, scale
        log_p = F.log_softmax(shaped, -1, dtype=wide)
        target = labels[rows, None]
        loss = log_p.gather(1, target)[:, 0].mul_(label_smoothing - 1)
        if label_smoothing:
            loss -= label_smoothing * log_p.mean(-1)
        losses[rows] = loss
        if dhidden is None and dweight is None and dbias is None:
            continue
        dz = log_p.exp_()
        if label_smoothing:
            dz -= label_smoothing / n_classes
        dz.scatter_add_(1, target, torch.full_like(target, label_smoothing - 1, dtype=wide))
        if dy is not None:
            dz *= dy[rows, None]
        if slope is not None:
            dz *= slope
        if dbias is not None:
            dbias += dz.sum(0)
        if rounded is not None:
            if dhidden is not None:
                parts = native_int8.quantise_twice(dz, rounded.scale)
                first, rest = (native_int8.linear_backward(part, rounded, torch.float32) for part in parts)
                dhidden[rows] = first.add_(rest)
            continue
        narrow = logits.copy_(dz)
        if dhidden is not None:
            if own:
                dhidden[rows] = native_linear.linear(narrow, weight, transpose=False)
            else:
                torch.mm(narrow, weight, out=dhidden[rows])
        if dweight is not None:
            dweight += narrow.T @ hidden[rows]
    return HeadGradients(
        losses,
        dhidden,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _is_own(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled kernel multiplies these tensors, and in a faster dtype than torch."""
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.bfloat16
        and products.why_not("linear") is None
        and units.compute_dtype(x.dtype) != x.dtype
        and native_linear.has_own(x, weight, bias)
    )
