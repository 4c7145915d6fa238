"""Rows in 8 bits from the kernels that make the rows: the same bits as from a pass of their own."""

import pytest
import torch

from fastln_kernels import reference_int8
from fastln_kernels.cpu import (
    library,
    native_activation,
    native_attention,
    native_dropout,
    native_int8,
    native_norm,
    products,
)
from fastln_kernels.reference import NormAgain, NormBackward, NormForward, NormKind
from fastln_kernels.reference_attention import AttentionBackward, AttentionForward

WHY_NOT = products.why_not("int8") or next(
    filter(None, map(library.why_not, ("activation", "activation_codes", "norm", "dropout"))), None
)
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


def test_activations_that_write_codes_write_these_rows_too():
    dtype = torch.bfloat16
    for n_cols in (17, 192):
        x, up, dy, factors = *(rows_of(n_cols, dtype, seed) for seed in range(3)), weights(n_cols)
        for bits in (8, 4, 2):
            rows, rounding = into(n_cols)
            y, codes = native_activation.activation_forward(x, "gelu", rounding, bits=bits)
            assert_rounded(rows, y)
            assert_same(codes, native_activation.activation_forward(x, "gelu", bits=bits)[1])
            rows, rounding = into(n_cols, factors)
            assert_rounded(rows, native_activation.activation_backward(dy, codes, "gelu", rounding, bits=bits), factors)
        for bits in (8, 4):
            rows, rounding = into(n_cols)
            y, gated = native_activation.gated_forward(x, up, "silu", rounding, bits=bits)
            assert_rounded(rows, y)
            (dgate_rows, first), (dup_rows, second) = into(n_cols, factors), into(n_cols, 2 * factors)
            dgate, dup = native_activation.gated_backward(
                dy, gated, None, "silu", need_dgate=True, need_dup=True, round_dgate=first, round_dup=second
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
        rows, rounding = into(n_cols)
        made = native_norm.norm_forward(NormForward(x, weight, None, kind, want_codes=True), rounding)
        assert_rounded(rows, made.y)
        again = NormAgain(made.normed, weight, None, None, kind, True, made.scale, dtype)
        rows, rounding = into(n_cols)
        assert_rounded(rows, native_norm.norm_again(again, rounding))
        back = NormBackward(dy, made.normed, weight, made.rstd, kind, True, scale=made.scale, need_dx=True)
        rows, rounding = into(n_cols, weight)
        assert_rounded(rows, native_norm.norm_backward(back, rounding).dx, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_writes_the_rows_that_a_pass_over_its_result_would(dtype):
    seed = torch.tensor([5])
    for n_cols in WIDTHS:
        x, factors = rows_of(n_cols, dtype), weights(n_cols)
        rows, rounding = into(n_cols, factors)
        y = native_dropout.dropout(x, 0.3, seed, rounding)
        assert_rounded(rows, y, factors)
        assert_same(y, native_dropout.dropout(x, 0.3, seed))


# Heads, heads of keys, queries, keys, columns of a head and of its values, causal, dropout.
ATTENTIONS = {
    "one of each": (1, 1, 1, 1, 1, 1, False, 0.0),
    "self": (4, 4, 150, 150, 16, 16, False, 0.1),
    "causal, groups": (6, 2, 70, 70, 32, 32, True, 0.0),
    "cross": (2, 2, 5, 700, 33, 7, False, 0.0),  # more than one block of keys
    "no keys": (2, 2, 5, 0, 32, 32, False, 0.0),
}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def heads_of(n_batches, n_heads, n_tokens, dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_batches, n_tokens, n_heads, dim, generator=generator).to(dtype).transpose(1, 2)


def as_rows(x):
    return x.transpose(1, 2).flatten(0, 1).flatten(1)


def into_like(x_shape, factors=None, turned=False):
    n_batches, n_heads, n_tokens, dim = x_shape
    rows, rounding = native_int8.rounding(torch.empty(n_batches, n_tokens, n_heads * dim), factors, turned=turned)
    rows.values.fill_(99)
    rows.scale.fill_(99)
    return rows, rounding


def assert_heads_rounded(rows, x, factors=None, turned=False):
    alone = native_int8.quantise(as_rows(x), factors, turned=turned)
    assert torch.equal(rows.values[: len(rows.scale)], alone.values[: len(rows.scale)])
    torch.testing.assert_close(rows.scale, alone.scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_writes_the_rows_that_a_pass_over_its_results_would(case, dtype, threads):
    n_heads, kv_heads, n_queries, n_keys, dim, v_dim, causal, dropout = ATTENTIONS[case]
    n_batches = 3
    q = heads_of(n_batches, n_heads, n_queries, dim, dtype, 0)
    k = heads_of(n_batches, kv_heads, n_keys, dim, dtype, 1)
    v = heads_of(n_batches, kv_heads, n_keys, v_dim, dtype, 2)
    dout = heads_of(n_batches, n_heads, n_queries, v_dim, dtype, 3)
    if n_queries > 1:
        q[0, -1, 3] = torch.nan  # in one head: the whole row becomes NaN in 8 bits
        dout[1] = 0
    request = AttentionForward(q, k, v, dim**-0.5, causal, None, dropout, torch.tensor([7]) if dropout else None)
    width = n_heads * v_dim
    for turned in turnings(width):
        rows, rounding = into_like(dout.shape, turned=turned)
        out, lse = native_attention.attention_forward(request, rounding)
        assert_heads_rounded(rows, out, turned=turned)
        assert_same(out, native_attention.attention_forward(request).out)
    back = AttentionBackward(request, dout, out, lse, need_dq=True, need_dk=True, need_dv=True)
    factors = [weights(x.shape[1] * x.shape[3]) for x in (q, k, v)]
    made = [into_like(x.shape, by) for x, by in zip((q, k, v), factors, strict=True)]
    told = {f"round_d{name}": rounding for name, (_, rounding) in zip("qkv", made, strict=True)}
    gradients = native_attention.attention_backward(back, **told)
    for (rows, _), gradient, by in zip(made, gradients, factors, strict=True):
        assert_heads_rounded(rows, gradient, by)
    for got, want in zip(gradients, native_attention.attention_backward(back), strict=True):
        assert_same(got, want)
    rows, rounding = into_like(v.shape)  # one alone, without factors
    only = native_attention.attention_backward(back._replace(need_dq=False, need_dk=False), round_dv=rounding)
    assert_heads_rounded(rows, only.dv)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
