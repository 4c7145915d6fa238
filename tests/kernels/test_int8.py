"""The 8-bit Triton kernels, interpreted, against the definition: bit for bit, since sums of whole numbers are exact.

Except bfloat16 results, which the interpreter truncates, and what a norm's own arithmetic leaves to differ.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norm_bounds import DTYPES, LAYOUTS

from fastln_kernels import activation, int8, launch, norm
from fastln_kernels import reference_int8 as reference
from fastln_kernels.reference import NormBackward, NormForward, NormKind
from fastln_kernels.reference_int8 import LARGEST, Rows8, Weight8

pytestmark = pytest.mark.usefixtures("guarded_buffers")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def awkward(n_rows, n_cols, dtype=torch.float32, seed=0):
    """Return rows with an outlier, of zeros, of tiny numbers, with NaN and with Inf, as far as there are rows."""
    x = normal(n_rows, n_cols, dtype=dtype, seed=seed)
    at = n_cols // 2
    for row, value in zip(x, (1.0, 1e4, 0.0, 1e-31, math.nan, -math.inf), strict=False):
        if value == 1e4 or not math.isfinite(value):
            row[at : at + 1] = value
        else:
            row *= value
    return x


def assert_same(got: Rows8, want: Rows8):
    assert got.values.dtype == torch.int8
    assert got.scale.dtype == torch.float32
    torch.testing.assert_close(got.scale, want.scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.values, want.values)


def check_quantise(x, factors=None):
    for turned in (False, True) if x.shape[1] % 64 == 0 else (False,):
        got, want = (module.quantise(x, factors, turned=turned) for module in (int8, reference))
        assert_same(got, want)


def check_products(n_rows, n_inner, n_cols, turned, bias, seed=0):
    weight = reference.quantise_weight(normal(n_cols, n_inner, seed=seed), turned=turned)
    rows = reference.quantise(awkward(n_rows, n_inner, seed=seed + 1), turned=turned)
    gradient = reference.quantise(awkward(n_rows, n_cols, seed=seed + 2), weight.scale)
    for dtype in (torch.float32, torch.float16):
        check_product(rows, weight, gradient, bias, dtype)


def check_product(rows, weight, gradient, bias, dtype):
    tolerance = {"rtol": 2e-7, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-3}
    for name, arguments in (("linear", (rows, weight, bias, dtype)), ("linear_backward", (gradient, weight, dtype))):
        got, want = (getattr(module, name)(*arguments) for module in (int8, reference))
        assert got.is_contiguous()
        torch.testing.assert_close(got, want, equal_nan=True, **tolerance)


@pytest.mark.slow(take=5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (6, 5), (7, 64), (3, 320), (3, 0)], ids=str)
def test_rows_are_those_of_the_definition(shape, dtype):
    x = awkward(*shape, dtype)
    check_quantise(x)
    check_quantise(x, normal(shape[1], seed=1).abs())
    got, want = (module.quantise_weight(x, turned=shape[1] == 64) for module in (int8, reference))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n_cols", [1, 64, 2112])  # blocks have 2,048 columns, or 4,096
def test_rows_too_wide_for_the_registers_are_read_twice(n_cols, monkeypatch):
    monkeypatch.setattr(launch, "quantise_tile", lambda *_, **__: None)
    check_quantise(awkward(6, n_cols), normal(n_cols, seed=1))
    check_quantise(awkward(3, n_cols + 4, torch.bfloat16))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_rows_of_any_layout(layout):
    check_quantise(LAYOUTS[layout](normal(5, 64)))


def test_rows_that_cannot_be_turned_are_refused():
    with pytest.raises(ValueError, match="100 columns"):
        int8.quantise(normal(2, 100), turned=True)


def test_a_tie_goes_to_the_even_number_and_nothing_beyond_127():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]])
    assert int8.quantise(x).values.tolist() == [[127, 0, 2, 2, 0, -2, -127, 126]]


@pytest.mark.slow(take=4)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(0, 64, 3), (1, 64, 1), (3, 128, 64), (7, 64, 100), (70, 192, 130)], ids=str)
def test_products(shape, turned):
    check_products(*shape, turned, normal(shape[2], dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (6, 100, 66), (3, 2, 300)], ids=str)
def test_products_whose_widths_fit_no_tile(shape):
    check_products(*shape, False, None)


@pytest.mark.parametrize("tile", [launch.ProductTile(64, 64, 64, 2, 4, 2), launch.ProductTile(32, 128, 32, 2, 4, 2)])
def test_programs_share_the_tiles_of_a_product(tile, monkeypatch):
    monkeypatch.setattr(launch, "product_tile", lambda *_, **__: tile)
    check_products(100, 128, 130, True, normal(130))


def test_saturated_sums_are_exact():
    n = 600
    ones = torch.full((3, n), LARGEST, dtype=torch.int8)
    weight = Weight8.of(ones[:2].contiguous(), torch.ones(2), False)
    y = int8.linear(Rows8(ones, torch.ones(3)), weight, None, torch.float32)
    assert torch.equal(y, torch.full((3, 2), float(n * LARGEST**2)))
    weight = Weight8.of(ones.t().contiguous(), torch.ones(n), False)
    dx = int8.linear_backward(Rows8(-ones, torch.ones(3)), weight, torch.float32)
    assert torch.equal(dx, torch.full((3, 3), -float(n * LARGEST**2)))


def test_sums_that_32_bits_may_not_hold_are_refused():
    assert int8.MOST_INNER * LARGEST**2 < 2**31
    n = int8.MOST_INNER + 1
    rows = Rows8(torch.zeros(1, n, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="131,073 products"):
        int8.linear(rows, Weight8.of(torch.zeros(1, n, dtype=torch.int8), torch.ones(1), False), None, torch.float32)


def test_rows_beyond_the_reach_of_32_bits(tmp_path):
    stride, n_cols = 2**30, 16
    # A sparse file: 8 GB of addresses, a few pages of disk.
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + n_cols, dtype=torch.bfloat16)
    far = flat.as_strided((4, n_cols), (stride, 1))
    far.copy_(normal(4, n_cols))
    check_quantise(far)


def into(like, factors=None, turned=False):
    rows, rounding = int8.rounding(like, factors, turned=turned)
    assert rows is rounding.rows
    return rows, rounding


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # Inf - Inf, in the interpreter's numpy
@pytest.mark.slow(take=3)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("n_cols", "turned"), [(64, True), (100, False), (1, False)])
@pytest.mark.parametrize("kind", [NormKind(1e-5), NormKind(1e-6, centre=False, round_normed=True)])
def test_a_norm_also_writes_its_rounded_result_in_8_bits(kind, n_cols, turned, wide, monkeypatch):
    if wide:
        monkeypatch.setattr(launch, "forward_tile", lambda *_, **__: None)
    for n_rows, dtype, weight in ((0, torch.float32, None), (5, torch.bfloat16, normal(n_cols, seed=1))):
        x = awkward(n_rows, n_cols, dtype)
        request = NormForward(x, weight, weight, kind, residual=x, want_stream=True)
        rows, rounding = into(x, turned=turned)
        got = norm.norm_forward(request, rounding)
        torch.testing.assert_close(got, norm.norm_forward(request), rtol=0, atol=0, equal_nan=True)
        assert_same(rows, reference.quantise(got.y, turned=turned))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.slow(take=3)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("need", [(False, False), (True, False), (True, True)], ids=["dx", "dx dweight", "all"])
@pytest.mark.parametrize(("dropout", "normed"), [(0.0, False), (0.0, True), (0.25, True)])
def test_a_norm_also_writes_the_gradient_of_its_input_in_8_bits(dropout, normed, need, wide, monkeypatch):
    if wide:
        monkeypatch.setattr(launch, "backward_tile", lambda *_, **__: None)
    for n_rows, n_cols, dtype in ((0, 8, torch.float32), (9, 100, torch.float16), (1, 1, torch.float32)):
        dy, saved, weight = awkward(n_rows, n_cols, dtype), normal(n_rows, n_cols, dtype=dtype), normal(n_cols, seed=1)
        need_dresidual = dropout > 0
        request = NormBackward(
            *(dy, saved, weight, normal(n_rows).abs(), NormKind(1e-5), normed, None, dropout, torch.tensor([5])),
            *(True, need_dresidual, *need),
        )
        rows, rounding = into(dy, weight)
        got = norm.norm_backward(request, rounding)
        torch.testing.assert_close(got, norm.norm_backward(request), rtol=0, atol=0, equal_nan=True)
        assert_same(rows, reference.quantise(got.dx, weight))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in float16, in the interpreter's numpy
@pytest.mark.slow(take=2)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("shape", "kind"), [((0, 5), "gelu"), ((1, 1), "silu"), ((4, 100), "gelu"), ((3, 64), "silu")])
def test_activations_also_write_their_results_in_8_bits(shape, kind, wide, monkeypatch):
    if wide:
        monkeypatch.setattr(launch, "activation_tile", lambda *_, **__: None)
    x, up, dy = (awkward(*shape, torch.float16, seed)[:4] for seed in range(3))
    factors, turned = normal(shape[1], seed=3).abs(), shape[1] == 64
    for function, tensors in ((activation.activation_forward, (x,)), (activation.gated_forward, (x, up))):
        rows, rounding = into(x, turned=turned)
        y = function(*tensors, kind, rounding)
        torch.testing.assert_close(y, function(*tensors, kind), rtol=0, atol=0)
        assert_same(rows, reference.quantise(y, turned=turned))
    rows, rounding = into(x, factors)
    dx = activation.activation_backward(dy, x, kind, rounding)
    torch.testing.assert_close(dx, activation.activation_backward(dy, x, kind), rtol=0, atol=0)
    assert_same(rows, reference.quantise(dx, factors))


@pytest.mark.parametrize("rounds", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_of_a_gated_activation_are_each_written_in_8_bits_or_not(need, rounds):
    dy, gate, up = (awkward(4, 100, seed=seed) for seed in range(3))
    wants = [wanted and rounded for wanted, rounded in zip(need, rounds, strict=True)]
    made = [into(dy, normal(100, seed=3 + i).abs()) if want else (None, None) for i, want in enumerate(wants)]
    tensors = (dy, gate, up if need[0] else None)
    options = {"need_dgate": need[0], "need_dup": need[1]}
    exact = activation.gated_backward(*tensors, "silu", **options)
    got = activation.gated_backward(*tensors, "silu", **options, round_dgate=made[0][1], round_dup=made[1][1])
    torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)
    for gradient, (rows, rounding) in zip(got, made, strict=True):
        if rows is not None:
            assert_same(rows, reference.quantise(gradient, rounding.factors))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_rows=st.integers(0, 9),
    n_inner=st.integers(1, 300),
    n_cols=st.integers(1, 300),
    blocks=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["row stride", "contiguous", "transposed"]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_layout(n_rows, n_inner, n_cols, blocks, dtype, layout, seed):
    n_inner = 64 * blocks or n_inner
    x = LAYOUTS[layout](awkward(n_rows, n_inner, dtype, seed))
    check_quantise(x)
    check_quantise(x, normal(n_inner, seed=seed).abs())
    check_products(n_rows, n_inner, n_cols, blocks > 0, normal(n_cols), seed)
