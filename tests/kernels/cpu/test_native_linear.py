"""The compiled linear layer against the definition in float64.

Bounds. Errors are root-mean-square, relative to the terms' `sqrt(n_inner) |x| |weight|`. With u = 2^-24, float32's
roundoff, a sum of n terms in one chain is off by u / sqrt(3) of every partial sum, which grow as sqrt(j): together
u sqrt(n / 6). Rounding in storage is uniform within half the dtype's epsilon: epsilon / (2 sqrt(3)). Chance is allowed
four deviations of 0.45 / sqrt(n).
"""

import math

import pytest
import torch

from fastln_kernels import reference
from fastln_kernels.cpu import native_linear, products, units

pytestmark = pytest.mark.skipif(products.why_not("linear") is not None, reason=f"{products.why_not('linear')}")

U = 2.0**-24
# The dtype of the rows, and the units that multiply them.
CASES = [(torch.float32, "float32"), (torch.bfloat16, "float32")]
if products.why_not("linear") is None and torch.bfloat16 in products.usable("linear"):
    CASES.append((torch.bfloat16, "bfloat16"))
# (n_rows, n_inner, n_cols): rows that are no multiple of 16; widths that no block divides; several blocks of each kind.
SHAPES = [(1, 16, 16), (7, 48, 80), (33, 96, 208), (128, 768, 64), (300, 1168, 112), (130, 3088, 48), (1000, 32, 16)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-as-{case[1]}")
def dtype(request, monkeypatch):
    """The dtype of rows, whose units are chosen for the test."""
    dtype, unit = request.param
    monkeypatch.setenv(units.VARIABLE, unit)
    return dtype


@pytest.fixture(autouse=True)
def float32_pays(monkeypatch):
    """Take the kernel for float32 rows, whichever is faster here."""
    monkeypatch.setattr(units, "linear_rates", lambda _: {"fastln": 2e11, "torch": 1e11})


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(y, x, weight, bias, transpose):
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    want = reference.linear(x.double(), weight.double(), None if bias is None else bias.double(), transpose=transpose)
    assert y.shape == want.shape
    n_inner = x.shape[-1]
    storage = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / (2 * math.sqrt(3))
    arithmetic = U * (math.sqrt(n_inner / 6) + 1)
    size = math.sqrt(n_inner + (bias is not None))  # of a result, inputs being of deviation 1
    error = (y.double() - want).square().mean().sqrt().item()
    assert error <= (1 + 2 / math.sqrt(y.numel())) * size * (arithmetic + storage)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(shape, with_bias, transpose, dtype):
    n_rows, n_inner, n_cols = shape
    x = normal(n_rows, n_inner, dtype=dtype)
    weight = normal(*((n_cols, n_inner) if transpose else (n_inner, n_cols)), dtype=dtype, seed=1)
    bias = normal(n_cols, dtype=dtype, seed=2) if with_bias else None
    assert_close(native_linear.linear(x, weight, bias, transpose=transpose), x, weight, bias, transpose)


@pytest.mark.parametrize("unit", [unit for dtype, unit in CASES if dtype == torch.bfloat16])
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_float32_weight_is_rounded_to_bfloat16_rows(shape, transpose, unit, monkeypatch):
    monkeypatch.setenv(units.VARIABLE, unit)
    n_rows, n_inner, n_cols = shape
    x = normal(n_rows, n_inner, dtype=torch.bfloat16)
    weight = normal(*((n_cols, n_inner) if transpose else (n_inner, n_cols)), seed=1)
    bias = normal(n_cols, seed=2)
    y = native_linear.linear(x, weight, bias, transpose=transpose)
    assert_close(y, x, weight.bfloat16(), bias, transpose)
    without_bias = [native_linear.linear(x, w, transpose=transpose) for w in (weight, weight.bfloat16())]
    assert torch.equal(*without_bias)


@pytest.mark.slow
@pytest.mark.parametrize("transpose", [True, False])
def test_more_rows_than_a_thread_takes_and_wider_than_a_product(transpose, dtype):
    x = normal(4500, 6304, dtype=dtype)
    weight = normal(*((144, 6304) if transpose else (6304, 144)), dtype=dtype, seed=1)
    assert_close(native_linear.linear(x, weight, transpose=transpose), x, weight, None, transpose)


@pytest.mark.parametrize("transpose", [True, False])
def test_the_number_of_threads_changes_no_bit(transpose, dtype):
    x, weight = (
        normal(700, 3136, dtype=dtype),
        normal(*((224, 3136) if transpose else (3136, 224)), dtype=dtype, seed=1),
    )
    n_threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append(native_linear.linear(x, weight, transpose=transpose))
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("n_classes", [16, 17, 81, 1555])
@pytest.mark.parametrize("wide", [True, False])
def test_a_weight_may_have_any_number_of_rows(n_classes, wide, dtype):
    weight = normal(n_classes, 96, dtype=torch.float32 if wide else dtype, seed=1)
    rounded = weight.to(dtype)
    x, dy = normal(40, 96, dtype=dtype), normal(70, n_classes, dtype=dtype)
    bias = normal(n_classes, dtype=weight.dtype, seed=2)
    if n_classes % 16:
        takes = units.compute_dtype(dtype) != dtype
        assert native_linear.has_own(x, weight, bias) == takes
        assert native_linear.has_own(dy, weight, None, transpose=False) == takes
    assert_close(native_linear.linear(x, weight, bias), x, rounded, bias, True)
    assert_close(native_linear.linear(dy, weight, transpose=False), dy, rounded, None, False)


def test_rows_with_strides_and_rows_that_overlap(dtype):
    wide = normal(64, 192, dtype=dtype)
    weight = normal(32, 64, dtype=dtype, seed=1)
    for x in (wide[:, 64:128], wide[::3, :64], wide[:, ::3], wide[:1, :64].expand(40, 64), wide[:64, :50].t()[:, :64]):
        y = native_linear.linear(x, weight)
        assert torch.equal(y, native_linear.linear(x.contiguous(), weight))
    assert native_linear.linear(wide[:0, :64], weight).shape == (0, 32)
    x, inside = wide[:, 1:49], normal(1 + 32 * 48, dtype=dtype)[1:].view(32, 48)  # at odd addresses
    assert torch.equal(native_linear.linear(x, inside), native_linear.linear(x.contiguous(), inside.clone()))


@pytest.mark.parametrize("transpose", [True, False])
def test_reads_and_writes_nothing_beside_its_tensors(transpose, dtype):
    def guarded(*shape, seed):
        n = math.prod(shape)
        whole = torch.full((n + 256,), math.nan, dtype=dtype)
        whole[128 : 128 + n] = normal(n, dtype=dtype, seed=seed)
        return whole[128 : 128 + n].view(shape)

    n_rows, n_inner, n_cols = (37, 112, 83) if transpose else (37, 109, 80)
    x, bias = guarded(n_rows, n_inner, seed=0), guarded(n_cols, seed=2)
    weight = guarded(*((n_cols, n_inner) if transpose else (n_inner, n_cols)), seed=1)
    assert_close(native_linear.linear(x, weight, bias, transpose=transpose), x, weight, bias, transpose)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(special, dtype):
    x, weight = normal(40, 64, dtype=dtype), normal(32, 64, dtype=dtype, seed=1)
    clean = native_linear.linear(x, weight)
    x[17, 5] = special
    y = native_linear.linear(x, weight)
    assert not y[17].isfinite().any()
    others = torch.arange(40) != 17
    assert torch.equal(y[others], clean[others])


def test_bfloat16_rows_need_no_bfloat16_units(monkeypatch):
    x, weight = normal(64, 64, dtype=torch.bfloat16), normal(32, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(products, "usable", lambda name: frozenset({torch.float32}))
    monkeypatch.setenv(units.VARIABLE, "float32")
    assert native_linear.has_own(x, weight, None)
    monkeypatch.setattr(units, "compute_dtype", lambda dtype: dtype)
    assert not native_linear.has_own(x, weight, None)


def test_torch_multiplies_float32_rows_where_it_is_faster(monkeypatch):
    x, weight = normal(64, 64), normal(32, 64)
    assert native_linear.has_own(x, weight, None)
    monkeypatch.setattr(units, "linear_rates", lambda _: {"fastln": 1.05e11, "torch": 1e11})
    assert not native_linear.has_own(x, weight, None)
    assert not native_linear.has_own(normal(64, 32), weight, None, transpose=False)
    if units.compute_dtype(torch.bfloat16) in products.usable("linear"):
        assert native_linear.has_own(x.bfloat16(), weight, None)


def test_what_it_does_not_take():
    x, weight = normal(64, 64), normal(32, 64)
    assert native_linear.has_own(x, weight, normal(32))
    assert not native_linear.has_own(x.half(), weight.half(), None)
    assert not native_linear.has_own(x.double(), weight.double(), None)
    assert not native_linear.has_own(x, weight.bfloat16(), None)
    assert not native_linear.has_own(x, weight, normal(32).bfloat16())
    assert not native_linear.has_own(x, normal(33, 64), None)
    assert not native_linear.has_own(x, normal(64, 33), None, transpose=False)
    assert not native_linear.has_own(x, normal(64, 32).t(), None)
    assert not native_linear.has_own(x[:31], weight, None)
    assert not native_linear.has_own(x[:0], weight, None)
    assert native_linear.has_own(x, weight.t().contiguous(), normal(32), transpose=False)
    assert not native_linear.has_own(x, weight, None, transpose=False)
    assert not native_linear.has_own(x[:, :48], weight, None)
    assert not native_linear.has_own(x[:, :48], weight[:, :32].contiguous(), None)
    assert not native_linear.has_own(x, weight, normal(16))
    assert not native_linear.has_own(x, weight, normal(32, 1))
    assert not native_linear.has_own(x, weight[:0], None)
    assert not native_linear.has_own(x[:, :0], weight[:, :0], None)
