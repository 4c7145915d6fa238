"""Lower bound on the cost of a training step: the operations of the matrix products that every method needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastln.errors import FastLNError
from fastln.families.heads import find_heads
from fastln.late.rows import LazyRows
from fastln.late.tensor import METADATA
from fastln.memory import AsOnCPU
from fastln.ops.linear_cross_entropy import IGNORE_INDEX
from fastln.plan import apply, plan
from fastln.prepare import restore


class Products(TorchFunctionMode):
    """Counts the operations of the matrix products in a forward pass of stock code, and in its backward pass.

    A product of (n, k) and (k, m) takes 2 n k m operations, and as many again for each factor that needs a gradient. So
    a frozen linear layer counts twice, or once if nothing before it trains. Attention counts its two products and the
    four of their gradients, or half of that if it is causal. Scores that a backward pass recomputes do not count again.
    The language-model head counts only the positions with a label. Late rows (`fastln.late.rows`) count when they are
    computed.

    No tensor is identified by its address, so the model may be on the meta device.

    Args:
        model: Its heads are recognised by their weights.
        labels: The batch's labels, with values; `IGNORE_INDEX` means no label.

    Attributes:
        operations: All.
        in_linears: Those of linear layers with a frozen weight, heads apart: what `products="int8"` may round.
    """

    def __init__(self, model: nn.Module, labels: Tensor | None = None) -> None:
        super().__init__()
        self.operations = self.in_linears = 0.0
        self._heads = {id(head.weight) for head in find_heads(model).values()}
        self._n_labels = 0 if labels is None else int((labels != IGNORE_INDEX).sum())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` and count its matrix products."""
        if func not in METADATA and any(isinstance(arg, LazyRows) for arg in args):
            with self:  # for the calls inside
                return LazyRows.__torch_function__(func, types, args, kwargs)
        result, before = func(*args, **(kwargs or {})), self.operations
        if func is functional.linear:
            self._linear(*args[:2])
        elif func is functional.conv2d:
            self._add(result.numel() * args[1][0].numel(), *args[:2])
        elif func in _MATMULS:
            self._add(result.numel() * args[0].shape[-1], *args[:2])
        elif func is torch.addmm:
            self._add(result.numel() * args[1].shape[-1], *args[1:3])
            self.in_linears += 0.0 if args[2].requires_grad else self.operations - before
        elif func is functional.scaled_dot_product_attention:
            self._attention(args[0], args[1], args[2], causal=(kwargs or {}).get("is_causal", False))
        return result

    def _linear(self, x: Tensor, weight: Tensor) -> None:
        n_rows = x.numel() // x.shape[-1]
        if id(weight) in self._heads:
            n_rows = min(n_rows, self._n_labels)
        before = self.operations
        self._add(n_rows * weight.numel(), x, weight)
        if id(weight) not in self._heads and not weight.requires_grad:
            self.in_linears += self.operations - before

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
        n_queries, n_keys = q.shape[-2], k.shape[-2]
        scores = q.numel() // q.shape[-1] * n_keys
        if causal:
            scores = scores // (n_queries * n_keys) * sum(min(query + 1, n_keys) for query in range(n_queries))
        self._add(scores * q.shape[-1], q, k)
        self._add(scores * v.shape[-1], q if q.requires_grad else k, v)

    def _add(self, n_multiplications: int, *factors: Tensor) -> None:
        self.operations += 2.0 * n_multiplications * (1 + sum(factor.requires_grad for factor in factors))


_MATMULS = (torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm)


class Operations(NamedTuple):
    """The operations of a training step's matrix products.

    Attributes:
        all: All.
        in_linears: Those of linear layers with a frozen weight, heads apart: what `products="int8"` may round.
    """

    all: float
    in_linears: float


def count_operations(model: nn.Module, batch: Mapping[str, Any]) -> Operations:
    """Count the operations of a training step's matrix products; the last block counts only for rows that are read.

    On the meta device no rows are late, so there the last block counts for all of its rows.

    Args:
        model: A stock model in training mode. The trained parameters are those that require a gradient. It is unchanged
            afterwards.
        batch: The model's arguments. For a model on the meta device they may be on the CPU; the labels must be.

    Raises:
        FastLNError: If the model is prepared, or the labels have no values.
    """
    labels = batch.get("labels")
    if labels is not None and labels.is_meta:
        raise FastLNError(
            "labels on the meta device have no values, and only rows with a label count; leave them on cpu"
        )
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # Norms and activations work row by row, so rows may be late. Products stay torch's own, which `Products` sees.
    stock = ("attention", "linears", "late_logits", "cache", "checkpointing", "arena")
    apply(plan(model, "full", without=stock), model)
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])
        with AsOnCPU() if is_meta else nullcontext(), Products(model, labels) as products:
            model(**(_on_meta(batch) if is_meta else batch))
    finally:
        restore(model)
    return Operations(products.operations, products.in_linears)


def _on_meta(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}
