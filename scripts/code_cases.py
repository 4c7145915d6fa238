"""Operations of compressed storage: norms and activations whose kernels write codes forward and read them backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from int8_cases import MLP_WIDTHS, Case8, Draw
from norm_cases import DROPOUT, LAYER_NORM, LLAMA_RMS_NORM

from fastln_kernels import activation, int8, norm
from fastln_kernels.reference import NormAgain, NormBackward, NormForward, NormKind
from fastln_kernels.reference_activation import ActivationKind
from fastln_kernels.reference_codes import GROUPS, Bits, GatedBits, GatedCodes, scale_shape

WIDTHS_OF_CODES: tuple[Bits, ...] = (8, 4, 2)


def _forward(name: str, kind: NormKind, *, post: bool = False, rounds: bool = False) -> Case8:
    """Return a norm's forward; `post`: after dropout and a residual; `rounds`: with y in 8 bits, turned, too."""

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        x, residual = (draw((n_rows, n_cols), dtype) for _ in range(2))
        bias = draw((n_cols,), torch.float32) if kind.centre else None
        request = NormForward(x, draw((n_cols,), torch.float32), bias, kind, want_codes=True)
        if post:
            request = request._replace(residual=residual, dropout=DROPOUT, seed=draw((1,), torch.int64))
        return lambda: norm.norm_forward(request, int8.rounding(x, turned=True)[1] if rounds else None)

    return Case8(name, prepare, elements=2 + post, rows8=1 + rounds, writes_rows=True)


def _backward(
    name: str, kind: NormKind, results: tuple[str, ...], *, dropout: float = 0.0, rounds: bool = False
) -> Case8:
    """Return a norm's backward from codes; `rounds`: with dx in 8 bits, times factors, too."""
    rows = len({"dx", "dresidual"} & set(results))

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        dy, codes = draw((n_rows, n_cols), dtype), draw((n_rows, n_cols), torch.int8)
        weight, factors = (draw((n_cols,), torch.float32) for _ in range(2))
        request = NormBackward(
            *(dy, codes, weight if rows else None, draw((n_rows,), torch.float32), kind),
            saved_is_normed=True,
            scale=draw(scale_shape((n_rows, n_cols), 8), torch.float32),
            dropout=dropout,
            seed=draw((1,), torch.int64) if dropout else None,
            need_dx="dx" in results,
            need_dresidual="dresidual" in results,
            need_dweight="dweight" in results,
            need_dbias="dbias" in results,
        )
        return lambda: norm.norm_backward(request, int8.rounding(dy, factors)[1] if rounds else None)

    return Case8(name, prepare, elements=1 + rows, rows8=1 + rounds, writes_rows=rows > 0)


def _again(name: str, kind: NormKind, *, codes: bool) -> Case8:
    """Return a norm's result made again, from codes or from x_hat in full."""

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        saved = draw((n_rows, n_cols), torch.int8 if codes else dtype)
        weight, bias = (draw((n_cols,), torch.float32) for _ in range(2))
        rstd, scale = draw((n_rows,), torch.float32), draw(scale_shape((n_rows, n_cols), 8), torch.float32)
        request = NormAgain(
            *(saved, weight, bias if kind.centre else None, rstd, kind),
            saved_is_normed=True,
            scale=scale if codes else None,
            dtype=dtype,
        )
        return lambda: norm.norm_again(request)

    return Case8(name, prepare, elements=1 + (not codes), rows8=int(codes), writes_rows=True)


def _activation(name: str, kind: ActivationKind, bits: Bits, *, backward: bool, rounds: bool = False) -> Case8:
    """Return an activation; `rounds`: with its result in 8 bits, turned, or its gradient, times factors, too."""

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        x, codes = draw((n_rows, n_cols), dtype), draw((n_rows, n_cols * bits // 8), torch.uint8)
        by = draw((n_cols,), torch.float32) if backward else None
        rounding = int8.rounding(x, by, turned=not backward)[1] if rounds else None
        if backward:
            return lambda: activation.activation_backward(x, codes, kind, rounding, bits=bits)
        return lambda: activation.activation_forward(x, kind, rounding, bits=bits)

    return Case8(name, prepare, elements=2, rows8=bits / 8 + rounds, writes_rows=True, widths=MLP_WIDTHS)


def _gated(name: str, kind: ActivationKind, bits: GatedBits, *, backward: bool, rounds: bool = False) -> Case8:
    """Return a gated activation; `rounds` as above, for both gradients."""

    def prepare(n_rows: int, n_cols: int, dtype: torch.dtype, draw: Draw) -> Callable[[], object]:
        x, up = (draw((n_rows, n_cols), dtype) for _ in range(2))
        if not backward:
            rounding = int8.rounding(x, turned=True)[1] if rounds else None
            return lambda: activation.gated_forward(x, up, kind, rounding, bits=bits)
        of_codes = torch.int8 if bits == 8 else torch.uint8
        value, slope = (draw((n_rows, n_cols * bits // 8), of_codes) for _ in range(2))
        scales = [draw((n_rows, n_cols // GROUPS[bits]), torch.float32) for _ in range(2)]
        factors = [draw((n_cols,), torch.float32) for _ in range(2)]
        round_dgate, round_dup = (int8.rounding(x, by)[1] if rounds else None for by in factors)
        return lambda: activation.gated_backward(
            *(x, GatedCodes(value, slope, *scales), None, kind),
            need_dgate=True,
            need_dup=True,
            round_dgate=round_dgate,
            round_dup=round_dup,
        )

    rows8 = 2 * bits / 8 + rounds * (1 + backward)
    return Case8(name, prepare, elements=3, rows8=rows8, writes_rows=True, widths=MLP_WIDTHS)


CODE_CASES = {
    case.name: case
    for case in (
        _forward("codes-layer_norm-forward", LAYER_NORM),
        _forward("codes-llama_rms_norm-forward", LLAMA_RMS_NORM),
        _forward("codes-dropout_add_layer_norm_post-forward", LAYER_NORM, post=True),
        _forward("codes-int8-layer_norm-forward-turned", LAYER_NORM, rounds=True),
        _backward("codes-layer_norm-dx", LAYER_NORM, ("dx",)),
        _backward("codes-layer_norm-dweight-dbias", LAYER_NORM, ("dweight", "dbias")),
        _backward("codes-layer_norm-dx-dweight-dbias", LAYER_NORM, ("dx", "dweight", "dbias")),
        _backward("codes-llama_rms_norm-dx-dweight", LLAMA_RMS_NORM, ("dx", "dweight")),
        _backward(
            *("codes-dropout_add_layer_norm_post-backward", LAYER_NORM, ("dx", "dresidual", "dweight", "dbias")),
            dropout=DROPOUT,
        ),
        _backward("codes-int8-layer_norm-dx-dweight-dbias", LAYER_NORM, ("dx", "dweight", "dbias"), rounds=True),
        _again("codes-layer_norm-again", LAYER_NORM, codes=True),
        _again("codes-llama_rms_norm-again", LLAMA_RMS_NORM, codes=True),
        _again("layer_norm-again", LAYER_NORM, codes=False),
        *(
            _activation(f"codes{bits}-gelu-{'backward' if backward else 'forward'}", "gelu", bits, backward=backward)
            for bits in WIDTHS_OF_CODES
            for backward in (False, True)
        ),
        *(
            _gated(f"codes{bits}-swiglu-{'backward' if backward else 'forward'}", "silu", bits, backward=backward)
            for bits in WIDTHS_OF_CODES
            if bits != 2
            for backward in (False, True)
        ),
        _activation("codes8-int8-gelu-forward-turned", "gelu", 8, backward=False, rounds=True),
        _activation("codes2-int8-gelu-forward-turned", "gelu", 2, backward=False, rounds=True),
        _activation("codes8-int8-gelu-backward", "gelu", 8, backward=True, rounds=True),
        _activation("codes2-int8-gelu-backward", "gelu", 2, backward=True, rounds=True),
        _gated("codes8-int8-swiglu-forward-turned", "silu", 8, backward=False, rounds=True),
        _gated("codes4-int8-swiglu-forward-turned", "silu", 4, backward=False, rounds=True),
        _gated("codes8-int8-swiglu-backward", "silu", 8, backward=True, rounds=True),
        _gated("codes4-int8-swiglu-backward", "silu", 4, backward=True, rounds=True),
    )
}
