"""Operations in 8 bits: rows rounded to 8 bits, alone, by a norm or by an activation, and products with a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from norm_cases import DROPOUT, LAYER_NORM, LLAMA_RMS_NORM
from torch import Tensor

from fastln_kernels import activation, int8, norm
from fastln_kernels.reference import NormBackward, NormForward, NormKind
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
    rows8: float
    writes_rows: bool = False
    product: bool = False
    widths: tuple[int, ...] = WIDTHS

    def useful_bytes(self, n_rows: int, n_cols: int, itemsize: int) -> int:
        """Return the bytes that any implementation must move, the weight of a product among them."""
        weight = n_cols * n_cols if self.product else 0
        return int(n_rows * n_cols * (self.elements * itemsize + self.rows8)) + weight

    def operations(self, n_rows: int, n_cols: int) -> int:
        """Return the multiplications and additions of a product."""
        return 2 * n_rows * n_cols * n_cols if self.product else 0


def _quantise(name: str, *, turned: bool = False, factors: bool = False) -> Case8:
    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        x, by = draw((n_rows, n_cols), dtype), draw((n_cols,), torch.float32) if factors else None
        return lambda: int8.quantise(x, by, turned=turned)

    return Case8(name, prepare, elements=1, rows8=1)


def _norm(name: str, kind: NormKind, *, turned: bool, post: bool = False) -> Case8:
    """Return a norm's forward; `post`: after dropout and a residual, with x_hat kept."""

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        x, residual = (draw((n_rows, n_cols), dtype) for _ in range(2))
        weight = draw((n_cols,), torch.float32)
        request = NormForward(x, weight, draw((n_cols,), torch.float32) if kind.centre else None, kind)
        if post:
            seed = draw((1,), torch.int64)
            request = request._replace(residual=residual, dropout=DROPOUT, seed=seed, want_normed=True)
        return lambda: norm.norm_forward(request, int8.rounding(x, turned=turned)[1])

    return Case8(name, prepare, elements=2 + 2 * post, rows8=1, writes_rows=True)


def _norm_backward(name: str, *, post: bool, dropout: float = 0.0) -> Case8:
    """Return dx of LayerNorm. `post`: with all other gradients, after a residual and perhaps dropout."""

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        dy, saved = (draw((n_rows, n_cols), dtype) for _ in range(2))
        weight, factors = (draw((n_cols,), torch.float32) for _ in range(2))
        seed = draw((1,), torch.int64) if dropout else None
        request = NormBackward(
            *(dy, saved, weight, draw((n_rows,), torch.float32), LAYER_NORM),
            saved_is_normed=post,
            dropout=dropout,
            seed=seed,
            need_dx=True,
            need_dresidual=dropout > 0,
            need_dweight=post,
            need_dbias=post,
        )
        return lambda: norm.norm_backward(request, int8.rounding(dy, factors)[1])

    return Case8(name, prepare, elements=3 + (dropout > 0), rows8=1, writes_rows=True)


def _activation(name: str, kind: ActivationKind, *, gated: bool, backward: bool) -> Case8:
    """Return an activation. Forward, its result is turned; backward, its gradients have factors."""

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        dy, x, up = (draw((n_rows, n_cols), dtype) for _ in range(3))
        by, up_by = (draw((n_cols,), torch.float32) for _ in range(2))
        if not backward:
            if gated:
                return lambda: activation.gated_forward(x, up, kind, int8.rounding(x, turned=True)[1])
            return lambda: activation.activation_forward(x, kind, int8.rounding(x, turned=True)[1])
        if not gated:
            return lambda: activation.activation_backward(dy, x, kind, int8.rounding(x, by)[1])
        return lambda: activation.gated_backward(
            *(dy, x, up, kind),
            need_dgate=True,
            need_dup=True,
            round_dgate=int8.rounding(x, by)[1],
            round_dup=int8.rounding(x, up_by)[1],
        )

    results = 1 + (gated and backward)
    elements = 1 + gated + backward + results
    return Case8(name, prepare, elements=elements, rows8=results, writes_rows=True, widths=MLP_WIDTHS)


def _product(name: str, *, backward: bool, turned: bool = False, twice: bool = False) -> Case8:
    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        rows, weight = product_inputs(n_rows, n_cols, draw, turned=turned)
        if backward:
            return lambda: int8.linear_backward(rows, weight, dtype)
        bias = draw((n_cols,), dtype)
        if not twice:
            return lambda: int8.linear(rows, weight, bias, dtype)
        others = (weight.values, weight.scale, bias, draw((n_rows, n_cols), torch.float32))
        return lambda: int8.multiply(rows, others, n_cols, n_cols, dtype, backward=False, turned=False)

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
        _norm("int8-dropout_add_layer_norm_post-forward-turned", LAYER_NORM, turned=True, post=True),
        _norm_backward("int8-layer_norm-dx", post=False),
        _norm_backward("int8-add_layer_norm_post-backward", post=True),
        _norm_backward("int8-dropout_add_layer_norm_post-backward", post=True, dropout=DROPOUT),
        _activation("int8-gelu-forward-turned", "gelu", gated=False, backward=False),
        _activation("int8-gelu-backward", "gelu", gated=False, backward=True),
        _activation("int8-swiglu-forward-turned", "silu", gated=True, backward=False),
        _activation("int8-swiglu-backward", "silu", gated=True, backward=True),
        _product("int8-linear", backward=False),
        _product("int8-linear-twice", backward=False, twice=True),
        _product("int8-linear-dx", backward=True),
        _product("int8-linear-dx-turned", backward=True, turned=True),
    )
}
