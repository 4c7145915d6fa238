"""The floor of a step: the matrix products that no method can do without, at the rate that this machine multiplies."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastln.families.heads import find_heads
from fastln.late.rows import LazyRows
from fastln.late.tensor import METADATA
from fastln.memory import synchronize
from fastln.ops.linear_cross_entropy import IGNORE_INDEX
from fastln.plan import apply, plan
from fastln.prepare import restore


class Products(TorchFunctionMode):
    """Counts the operations of the products in a forward pass of stock code, and of their backward.

    A product of (n, k) by (k, m) has 2 n k m operations, and as many again for each of its two factors that needs a
    gradient. So a frozen linear layer counts twice, once where nothing before it trains; attention counts its two
    products and the four that their gradients take, and half of that where it is causal, but none twice, as a backward
    that finds the scores again has it. The language-model head counts at the positions that carry labels alone, and
    rows that wait (`fastln.late.rows`) where they are computed.

    Args:
        model: Its heads are told by their weights.
        labels: of the batch; those of `IGNORE_INDEX` are left out.
    """

    def __init__(self, model: nn.Module, labels: Tensor | None = None) -> None:
        super().__init__()
        self.operations = 0.0
        self._heads = {id(head.weight) for head in find_heads(model).values()}
        self._n_labels = 0 if labels is None else int((labels != IGNORE_INDEX).sum())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` and count what it multiplies."""
        if func not in METADATA and any(isinstance(arg, LazyRows) for arg in args):
            with self:  # for what is computed inside
                return LazyRows.__torch_function__(func, types, args, kwargs)
        result = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._linear(*args[:2])
        elif func is functional.conv2d:
            self._add(result.numel() * args[1][0].numel(), *args[:2])
        elif func in _MATMULS:
            self._add(result.numel() * args[0].shape[-1], *args[:2])
        elif func is torch.addmm:
            self._add(result.numel() * args[1].shape[-1], *args[1:3])
        elif func is functional.scaled_dot_product_attention:
            self._attention(args[0], args[1], args[2], causal=(kwargs or {}).get("is_causal", False))
        return result

    def _linear(self, x: Tensor, weight: Tensor) -> None:
        n_rows = x.numel() // x.shape[-1]
        if id(weight) in self._heads:
            n_rows = min(n_rows, self._n_labels)
        self._add(n_rows * weight.numel(), x, weight)

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


def count_operations(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Return the operations of one step's products, of the last block's for tokens that are read alone.

    Args:
        model: Of stock code, in training, with gradients switched on where they are wanted.
        batch: What it takes.
    """
    # Norms as operations of rows, and rows that wait; products stay torch's, which are counted.
    stock = ("attention", "linears", "late_logits", "cache", "checkpointing", "arena")
    training = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    apply(dataclasses.replace(plan(model, "full", without=stock), trained=training), model)
    try:
        with Products(model, batch.get("labels")) as products:
            model(**batch)
    finally:
        restore(model)
    return products.operations


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Return how many operations per second the machine reaches in a layer's product, into memory that exists.

    Args:
        device: Where.
        dtype: Of the factors and the product.
        repeats: The fastest of so many counts.
    """
    n_rows, n_in, n_out = 1024, 1024, 4096
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((n_rows, n_in), (n_out, n_in)))
    y = torch.empty(n_rows, n_out, device=device, dtype=dtype)
    seconds = []
    for _ in range(1 + repeats):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        torch.mm(x, weight.T, out=y)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n_rows * n_in * n_out / min(seconds[1:])
