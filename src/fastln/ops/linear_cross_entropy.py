"""A language-model head and its cross-entropy in one: the operation and its autograd formula.

Rows without a label are dropped before anything is computed. The forward also computes the gradient, while it holds a
chunk's logits (`fastln_kernels.linear_cross_entropy`), and the backward scales it by `dy`. This is kept for backward,
only for the rows with a label:

| gradients wanted       | kept                                                                     |
|------------------------|--------------------------------------------------------------------------|
| of hidden              | that gradient `(n_labels, d)`, and which rows they are                   |
| of weight, bias        | that gradient                                                            |
| the same, "none"       | instead: rows `(n_labels, d)`, labels, weight, bias; computed in backward|

With reduction "none" each row has its own `dy`. It scales one row of the gradient of hidden. But the gradients of
weight and bias are sums over rows, and `dy` would have to scale the terms inside these sums.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastln.errors import FastLNError
from fastln.ops.dispatch import wants_gradient
from fastln_kernels import linear_cross_entropy as kernels
from fastln_kernels.cpu.library import DTYPES
from fastln_kernels.reference_int8 import Weight8

IGNORE_INDEX = -100
"""The label of a position without one: PyTorch's cross-entropy ignores it, and transformers' datasets write it."""

_REDUCTIONS = ("mean", "sum", "none")


class _Loss(NamedTuple):
    """The options of `linear_cross_entropy`."""

    scale: float
    softcap: float | None
    ignore_index: int
    label_smoothing: float
    reduction: str


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    rounded: Weight8 | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against labels, without holding those logits; differentiable once.

    Value and gradients equal those of `F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ...)`, up to
    rounding, with the logits scaled and capped in between; `torch.compile` runs that code. Under autocast, the matrix
    product has the autocast dtype.

    Args:
        hidden: `(..., d)`, of a floating dtype.
        weight: `(n_classes, d)`, of the same dtype.
        bias: `(n_classes,)`, likewise, or None for zeros.
        labels: `(...)`, int64.
        scale: Factor on the logits.
        softcap: Bound on their size after scaling: `softcap * tanh(logits / softcap)`; None for no bound.
        ignore_index: Positions with this label are ignored.
        label_smoothing: The share of the target that is spread over all classes, from 0 to 1.
        rounded: The weight in 8 bits, which multiplies in its place on a CPU; None for exact products. It is used only
            if neither weight nor bias need a gradient.
        reduction: "mean" over the positions with a label (NaN where there is none), "sum" or "none".

    Returns:
        float32 (float64 for float64): a scalar; with "none", shaped like `labels`, 0 where a label is ignored.

    Raises:
        FastLNError: If shapes, dtypes or arguments are not valid, or a label is neither a class nor `ignore_index`.
    """
    loss = _Loss(scale, softcap, ignore_index, label_smoothing, reduction)
    _check(hidden, weight, bias, labels, loss)
    row_labels = labels.reshape(-1)
    if torch.compiler.is_compiling() or type(hidden) is not Tensor or hidden.is_meta:
        logits = F.linear(hidden, weight, bias).reshape(-1, len(weight))
        logits = shaped_logits(logits if logits.dtype == torch.float64 else logits.float(), scale, softcap)
        losses = F.cross_entropy(
            logits, row_labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )
    else:
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if rounded is not None and (wants_gradient(weight, bias) or rows.dtype not in DTYPES or not rows.is_cpu):
            rounded = None
        losses = _LinearCrossEntropy.apply(rows, weight, bias, row_labels, loss, rounded)
    return losses.view(labels.shape) if reduction == "none" else losses


def shaped_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return `logits` scaled and capped, op by op."""
    if softcap is not None:
        return torch.tanh(logits * (scale / softcap)) * softcap
    return logits if scale == 1 else logits * scale


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, loss: _Loss) -> None:
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise FastLNError(
            f"hidden must be (..., d) and weight (n_classes, d), of one class or more; "
            f"they are {(*hidden.shape,)} and {(*weight.shape,)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise FastLNError(f"the bias must be ({weight.shape[0]},), one for each class; it is {(*bias.shape,)}")
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:-1]:
        raise FastLNError(
            f"labels must be int64 and {(*hidden.shape[:-1],)}, one for each row of hidden; "
            f"they are {labels.dtype} and {(*labels.shape,)}"
        )
    if loss.softcap is not None and not loss.softcap > 0:
        raise FastLNError(f"softcap is {loss.softcap}; it must be above 0")
    if not 0 <= loss.label_smoothing <= 1:
        raise FastLNError(f"label_smoothing is {loss.label_smoothing}; it must be from 0 to 1")
    if loss.reduction not in _REDUCTIONS:
        raise FastLNError(f"unknown reduction {loss.reduction!r}; valid: {', '.join(_REDUCTIONS)}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss: _Loss,
        rounded: Weight8 | None,
    ) -> Tensor:
        n_rows, n_classes = len(labels), len(weight)
        rows = (labels != loss.ignore_index).nonzero()[:, 0]
        n_labels = len(rows)
        if n_labels < n_rows:
            hidden, labels = hidden[rows], labels[rows]
        if n_labels and not 0 <= (lowest := int(labels.min())) <= (highest := int(labels.max())) < n_classes:
            wrong = lowest if lowest < 0 else highest
            raise FastLNError(
                f"label {wrong} is neither one of {n_classes} classes nor ignore_index, {loss.ignore_index}"
            )
        need_dhidden, *need_parameters = ctx.needs_input_grad[:3]
        each_its_own = loss.reduction == "none" and any(need_parameters)
        request = kernels.HeadRequest(
            hidden,
            weight,
            bias,
            labels,
            loss.scale,
            loss.softcap,
            loss.label_smoothing,
            need_dhidden=need_dhidden,
            need_dweight=need_parameters[0] and not each_its_own,
            need_dbias=need_parameters[1] and not each_its_own,
            rounded=rounded,
        )
        losses, *gradients = kernels.linear_cross_entropy(request)
        inputs = (hidden, weight, bias, labels) if each_its_own else (None,) * 4
        ctx.save_for_backward(rows if n_labels < n_rows else None, *gradients, *inputs)
        ctx.n_rows, ctx.n_labels, ctx.loss = n_rows, n_labels, loss
        if loss.reduction == "none":
            return losses if n_labels == n_rows else losses.new_zeros(n_rows).index_copy_(0, rows, losses)
        return losses.sum() / n_labels if loss.reduction == "mean" else losses.sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise FastLNError("linear_cross_entropy is differentiable once: no backward with create_graph=True")
        rows, dhidden, dweight, dbias, *inputs = ctx.saved_tensors
        loss: _Loss = ctx.loss
        if loss.reduction == "none":
            dy = dy if rows is None else dy[rows]
            if inputs[0] is not None:
                hidden, weight, bias, labels = inputs
                request = kernels.HeadRequest(
                    hidden,
                    weight,
                    bias,
                    labels,
                    loss.scale,
                    loss.softcap,
                    loss.label_smoothing,
                    dy,
                    need_dweight=ctx.needs_input_grad[1],
                    need_dbias=ctx.needs_input_grad[2],
                )
                _, _, dweight, dbias = kernels.linear_cross_entropy(request)
        else:
            dy = dy / max(ctx.n_labels, 1) if loss.reduction == "mean" else dy
            dweight, dbias = (None if gradient is None else gradient * dy for gradient in (dweight, dbias))
        if dhidden is not None:
            dhidden = (dhidden * (dy[:, None] if loss.reduction == "none" else dy)).to(dhidden.dtype)
            if rows is not None:
                dhidden = dhidden.new_zeros(ctx.n_rows, dhidden.shape[1]).index_copy_(0, rows, dhidden)
        return dhidden, dweight, dbias, None, None, None
