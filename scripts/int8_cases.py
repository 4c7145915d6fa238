"""The operations in 8 bits in both reports: rows rounded to 8 bits, alone or by a norm, and products with a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from norm_cases import LAYER_NORM, LLAMA_RMS_NORM
from torch import Tensor

from fastln_kernels import activation_rows, int8, norm
from fastln_kernels.reference import NormForward, NormKind
from fastln_kernels.reference_activation import ActivationKind
from fastln_kernels.reference_int8 import Rows8, Weight8

WIDTHS = (768, 4096, 65536)
MLP_WIDTHS = (4096,)
PRODUCT_WIDTHS = (4096,)
"""Widths of the products. Their code does not depend on the width, only the choice of their tile does."""

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Case8:
    """An operation in 8 bits.

    Attributes:
        name: Its name on the command line and in the rows.
        prepare: A function from `n_rows`, `n_cols`, the dtype of rows that are not in 8 bits and `draw`, which makes a
            tensor of a given shape and dtype, to the function that is compiled or timed.
        elements: How many elements of such rows any implementation must move, per element of a row.
        rows8: How many elements of 8-bit rows, likewise.
        writes_rows: Whether rows are written that are not in 8 bits.
        product: Whether it is a product, with a weight `(n_cols, n_cols)`.
        widths: The widths at which it is compiled.
    """

    name: str
    prepare: Callable[[int, int, torch.dtype, Draw], Callable[[], object]]
    elements: int
    rows8: int
    writes_rows: bool = False
    product: bool = False
    widths: tuple[int, ...] = WIDTHS

    def useful_bytes(self, n_rows: int, n_cols: int, itemsize: int) -> int:
        """Return the bytes that any implementation must move, the weight of a product among them."""
        weight = n_cols * n_cols if self.product else 0
        return n_rows * n_cols * (self.elements * itemsize + self.rows8) + weight

    def operations(self, n_rows: int, n_cols: int) -> int:
        """Return the multiplications and additions of a product."""
        return 2 * n_rows * n_cols * n_cols if self.product else 0


def _quantise(name: str, *, turned: bool = False, factors: bool = False) -> Case8:
    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        x, by = draw((n_rows, n_cols), dtype), draw((n_cols,), torch.float32) if factors else None
        return lambda: int8.quantise(x, by, turned=turned)

    return Case8(name, prepare, elements=1, rows8=1)


def _norm(name: str, kind: NormKind, *, turned: bool) -> Case8:
    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        weight = draw((n_cols,), torch.float32)
        bias = draw((n_cols,), torch.float32) if kind.centre else None
        request = NormForward(draw((n_rows, n_cols), dtype), weight, bias, kind, want_rows8=True, turned=turned)
        return lambda: norm.norm_forward(request)

    return Case8(name, prepare, elements=2, rows8=1, writes_rows=True)


def _activation(name: str, kind: ActivationKind, *, gated: bool, backward: bool) -> Case8:
    """Return an activation. Forward, its result is turned; backward, its gradients have factors."""

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        dy, x, up = (draw((n_rows, n_cols), dtype) for _ in range(3))
        by, up_by = (draw((n_cols,), torch.float32) for _ in range(2))
        if backward:
            return lambda: activation_rows.backward(dy, x, up if gated else None, kind, by, up_by if gated else None)
        return lambda: activation_rows.forward(x, up if gated else None, kind, turned=True)

    return Case8(name, prepare, elements=1 + gated + backward, rows8=1 + (gated and backward), widths=MLP_WIDTHS)


def _product(name: str, *, backward: bool, turned: bool = False) -> Case8:
    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        rows, weight = product_inputs(n_rows, n_cols, draw, turned=turned)
        if backward:
            return lambda: int8.linear_backward(rows, weight, dtype)
        bias = draw((n_cols,), dtype)
        return lambda: int8.linear(rows, weight, bias, dtype)

    return Case8(name, prepare, elements=1, rows8=1, writes_rows=True, product=True, widths=PRODUCT_WIDTHS)


def product_inputs(n_rows: int, n_cols: int, draw: Draw, *, turned: bool) -> tuple[Rows8, Weight8]:
    """Return 8-bit rows and a weight, both of `n_cols` columns."""
    rows = Rows8(draw((n_rows, n_cols), torch.int8), draw((n_rows,), torch.float32))
    return rows, Weight8.of(draw((n_cols, n_cols), torch.int8), draw((n_cols,), torch.float32), turned)


CASES8 = {
    case.name: case
    for case in (
        _quantise("int8-quantise"),
        _quantise("int8-quantise-turned", turned=True),
        _quantise("int8-quantise-factors", factors=True),
        _norm("int8-layer_norm-forward", LAYER_NORM, turned=False),
        _norm("int8-layer_norm-forward-turned", LAYER_NORM, turned=True),
        _norm("int8-llama_rms_norm-forward-turned", LLAMA_RMS_NORM, turned=True),
        _activation("int8-gelu-forward-turned", "gelu", gated=False, backward=False),
        _activation("int8-gelu-backward", "gelu", gated=False, backward=True),
        _activation("int8-swiglu-forward-turned", "silu", gated=True, backward=False),
        _activation("int8-swiglu-backward", "silu", gated=True, backward=True),
        _product("int8-linear", backward=False),
        _product("int8-linear-dx", backward=True),
        _product("int8-linear-dx-turned", backward=True, turned=True),
    )
}
