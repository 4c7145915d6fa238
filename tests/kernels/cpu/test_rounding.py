"""Rows in 8 bits from the kernels that make the rows: the same bits as from a pass of their own."""

import pytest
import torch

from fastln_kernels import reference_int8
from fastln_kernels.cpu import library, native_activation, native_int8, native_norm, products
from fastln_kernels.reference import NormBackward, NormForward, NormKind

WHY_NOT = products.why_not("int8") or library.why_not("activation") or library.why_not("norm")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N_ROWS = 7
WIDTHS = [1, 3, 17, 64, 65, 127, 192, 1000]


def rows_of(n_cols, dtype, seed=0):
    """Rows of any numbers, of zeros, of large and of tiny ones, with NaN and with Inf."""
    x = torch.randn(N_ROWS, n_cols, generator=torch.Generator().manual_seed(seed))
    x[1] = 0
    x[2, n_cols // 2] = torch.nan
    x[3, 0] = -torch.inf
    x[4] *= 1e-4
    x[5, -1] = 1e4
    return x.to(dtype)


def weights(n_cols):
    return torch.rand(n_cols, generator=torch.Generator().manual_seed(9)) + 0.5


def into(n_cols, factors=None, turned=False):
    rows, rounding = native_int8.rounding(torch.empty(N_ROWS, n_cols), factors, turned=turned)
    rows.values.fill_(99)
    rows.scale.fill_(99)
    return rows, rounding


def assert_rounded(rows, x, factors=None, turned=False):
    alone = native_int8.quantise(x, factors, turned=turned)
    assert torch.equal(rows.values[:N_ROWS], alone.values[:N_ROWS])
    torch.testing.assert_close(rows.scale, alone.scale, rtol=0, atol=0, equal_nan=True)


def turnings(n_cols):
    return (False, True) if n_cols % reference_int8.TURNED == 0 else (False,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_write_the_rows_that_a_pass_over_their_results_would(dtype):
    for n_cols in WIDTHS:
        x, up, dy, factors = *(rows_of(n_cols, dtype, seed) for seed in range(3)), weights(n_cols)
        for turned in turnings(n_cols):
            rows, rounding = into(n_cols, turned=turned)
            y = native_activation.activation_forward(x, "gelu", rounding)
            assert_rounded(rows, y, turned=turned)
            assert_same(y, native_activation.activation_forward(x, "gelu"))
            rows, rounding = into(n_cols, turned=turned)
            assert_rounded(rows, native_activation.gated_forward(x, up, "silu", rounding), turned=turned)
        rows, rounding = into(n_cols, factors)
        dx = native_activation.activation_backward(dy, x, "gelu_tanh", rounding)
        assert_rounded(rows, dx, factors)
        assert_same(dx, native_activation.activation_backward(dy, x, "gelu_tanh"))
        (dgate_rows, first), (dup_rows, second) = into(n_cols, factors), into(n_cols, 2 * factors)
        dgate, dup = native_activation.gated_backward(
            dy, x, up, "silu", need_dgate=True, need_dup=True, round_dgate=first, round_dup=second
        )
        assert_rounded(dgate_rows, dgate, factors)
        assert_rounded(dup_rows, dup, 2 * factors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", [NormKind(1e-5), NormKind(1e-6, centre=False, round_normed=True)], ids=["layer", "rms"]
)
def test_norms_write_the_rows_that_a_pass_over_their_results_would(dtype, kind):
    seed = torch.tensor([5])
    for n_cols in WIDTHS:
        x, residual, dy, weight = *(rows_of(n_cols, dtype, seed) for seed in range(3)), weights(n_cols)
        for others, dropout in ((None, 0.0), (residual, 0.1)):
            request = NormForward(x, weight, None, kind, others, dropout, seed if dropout else None)
            for turned in turnings(n_cols):
                rows, rounding = into(n_cols, turned=turned)
                made = native_norm.norm_forward(request, rounding)
                assert_rounded(rows, made.y, turned=turned)
                assert_same(made.y, native_norm.norm_forward(request).y)
            back = NormBackward(dy, x, weight, made.rstd, kind, False, None, dropout, request.seed, need_dx=True)
            rows, rounding = into(n_cols, weight)
            dx = native_norm.norm_backward(back, rounding).dx
            assert_rounded(rows, dx, weight)
            assert_same(dx, native_norm.norm_backward(back).dx)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
