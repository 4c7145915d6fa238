"""The compiled kernels of 8-bit linear layers: the bits of the definition, at any size and on any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fastln_kernels import reference_int8 as reference
from fastln_kernels.cpu import native_int8 as native
from fastln_kernels.cpu import products

WHY_NOT = products.why_not("int8")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(0, 64, 5), (1, 1, 1), (3, 192, 32), (5, 7, 9), (16, 20, 64), (130, 64, 100), (140, 4160, 70), (257, 130, 65)]


def stored(rows):
    """The rows of the compiled kernels in the form of the definition."""
    values = rows.values[: len(rows.scale), : rows.n_cols]
    return reference.Rows8((values ^ 128).view(torch.int8), rows.scale)


def check_rows(got, want):
    torch.testing.assert_close(stored(got), want, rtol=0, atol=0, equal_nan=True)


def odd_rows(n_rows, n_cols, dtype):
    x = torch.randn(n_rows, n_cols).to(dtype)
    for row, value in enumerate((0.0, 1e4, float("inf"), float("nan"), 1e-31)):
        if row < n_rows - 1:
            x[row, :] = 0 if value == 0 else x[row]
            x[row, -1] = value
    if n_rows > 6:
        x[5] = 1e-32  # counts as zero in float32
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_of_the_definition(size, dtype):
    n_rows, n_inner, n_cols = size
    torch.manual_seed(0)
    x, dy = odd_rows(n_rows, n_inner, dtype), odd_rows(n_rows, n_cols, dtype)
    for turned in {False, n_inner % 64 == 0}:
        weight = torch.randn(n_cols, n_inner)
        made = native.quantise_weight(weight, turned=turned)
        torch.testing.assert_close(tuple(made), tuple(reference.quantise_weight(weight, turned=turned)), rtol=0, atol=0)
        rows, want = native.quantise(x, turned=turned), reference.quantise(x, turned=turned)
        check_rows(rows, want)
        for bias in (None, torch.randn(n_cols).to(dtype)):
            torch.testing.assert_close(
                native.linear(rows, made, bias, dtype),
                reference.linear(want, made, bias, dtype),
                rtol=torch.finfo(dtype).eps,  # the last product and the bias may be one instruction
                atol=0 if bias is None else 1e-6,
                equal_nan=True,
            )
        rows, want = native.quantise(dy, made.scale), reference.quantise(dy, made.scale)
        check_rows(rows, want)
        torch.testing.assert_close(
            native.linear_backward(rows, made, dtype),
            reference.linear_backward(want, made, dtype),
            rtol=0,
            atol=0,
            equal_nan=True,
        )


@st.composite
def rows_of(draw, n_rows, n_cols, dtype):
    """Rows of any layout in memory, some of them odd: zeros, Inf, NaN, an outlier, all at their ends, subnormal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    wide = torch.randn(n_rows, n_cols, generator=generator)
    for row, kind in enumerate(draw(st.lists(st.sampled_from(ODD), max_size=n_rows))):
        at = (row, draw(st.integers(0, n_cols - 1)))
        match kind:
            case "zeros" | "ends":
                wide[row] = wide[row].sign() * (kind == "ends")
            case "subnormal":
                wide[row] *= 1e-39
            case float():
                wide[at] = kind
    wide = wide.to(dtype)
    match draw(st.sampled_from(["plain", "cut", "every other", "turned over", "apart"])):
        case "cut":
            left, right = draw(st.integers(0, 3)), draw(st.integers(0, 5))
            return functional.pad(wide, (left, right), value=7.0)[:, left : left + n_cols]
        case "every other":
            return torch.stack((wide, wide + 1), 1)[:, 0]
        case "turned over":
            return wide.t().contiguous().t()
        case "apart":
            return torch.stack((wide, wide + 1), 2)[..., 0]
    return wide


ODD = ("plain", "zeros", "ends", "subnormal", 1e4, -1e4, float("inf"), float("-inf"), float("nan"))
LENGTHS = st.integers(1, 150) | st.sampled_from([64, 128, 192])


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.integers(0, 40), LENGTHS, LENGTHS)
def test_any_rows_size_stride_and_dtype(data, dtype, n_rows, n_inner, n_cols):
    """Both directions, every part of them: the definition's bits, and with a bias one rounding of the product more."""
    turned = n_inner % 64 == 0 and data.draw(st.booleans())
    of_weight = data.draw(st.sampled_from(DTYPES))
    whole = data.draw(rows_of(n_cols, n_inner, of_weight))
    made = native.quantise_weight(whole, turned=turned)
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(tuple(made), tuple(reference.quantise_weight(whole, turned=turned)), **exactly)

    x = data.draw(rows_of(n_rows, n_inner, dtype))
    rows, want = native.quantise(x, turned=turned), reference.quantise(x, turned=turned)
    check_rows(rows, want)
    plain = reference.linear(want, made, None, torch.float32)
    torch.testing.assert_close(native.linear(rows, made, None, dtype), plain.to(dtype), **exactly)
    bias = torch.randn(n_cols, generator=torch.Generator().manual_seed(0)).to(data.draw(st.sampled_from(DTYPES)))
    y, with_bias = native.linear(rows, made, bias, dtype), reference.linear(want, made, bias, dtype)
    assert torch.equal(y.isfinite(), with_bias.isfinite())
    limits = torch.finfo(dtype)
    bound = torch.finfo(torch.float32).eps * plain.abs() + limits.eps * with_bias.float().abs()
    bound += limits.eps * limits.smallest_normal
    finite = y.isfinite()  # the product and the bias may be one instruction
    assert (y.float() - with_bias.float()).abs()[finite].le(bound[finite]).all()

    dy = data.draw(rows_of(n_rows, n_cols, dtype))
    rows, want = native.quantise(dy, made.scale), reference.quantise(dy, made.scale)
    check_rows(rows, want)
    dx = reference.linear_backward(want, made, dtype)
    torch.testing.assert_close(native.linear_backward(rows, made, dtype), dx, **exactly)


def test_the_largest_sums():
    """All numbers at their ends: sums that 16 bits, or 32 with a sign too few, would not hold."""
    for sign in (1.0, -1.0):
        x, weight = torch.full((17, 4096), sign), torch.full((33, 4096), -1.0)
        made, rows = native.quantise_weight(weight), native.quantise(x)
        y = native.linear(rows, made, None, torch.float32)
        torch.testing.assert_close(y, torch.full((17, 33), -sign * 4096), rtol=1e-6, atol=0)
        dx = native.linear_backward(native.quantise(y, made.scale), made, torch.float32)
        torch.testing.assert_close(dx, torch.full((17, 4096), sign * 4096 * 33), rtol=1e-6, atol=0)


# Threads share panels of 64 columns and chunks of at least 128 rows: more of them than threads, fewer, and one.
SHARED = [(300, 320, 450), (16, 128, 320), (129, 64, 64), (400, 64, 130), (700, 64, 833), (260, 4160, 200)]


@pytest.mark.parametrize("size", SHARED, ids=str)
def test_threads_change_no_bit(size):
    n_rows, n_inner, n_cols = size
    torch.manual_seed(0)
    x, dy, weight = torch.randn(n_rows, n_inner), torch.randn(n_rows, n_cols), torch.randn(n_cols, n_inner)
    made = native.quantise_weight(weight, turned=True)
    want = reference.linear(reference.quantise(x, turned=True), made, None, torch.float32)
    dx = reference.linear_backward(reference.quantise(dy, made.scale), made, torch.float32)
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3, 7):
            torch.set_num_threads(n_threads)
            rows, gradients = native.quantise(x, turned=True), native.quantise(dy, made.scale)
            assert torch.equal(native.linear(rows, made, None, torch.float32), want)
            assert torch.equal(native.linear_backward(gradients, made, torch.float32), dx)
            in_16_bits = native.linear(rows, made, None, torch.bfloat16)
            assert torch.equal(in_16_bits, want.bfloat16())
    finally:
        torch.set_num_threads(before)


def test_rows_rounded_twice_have_16_bits():
    torch.manual_seed(0)
    x, factors = torch.randn(21, 300), torch.rand(300)
    x[2], x[3, 5] = 0, float("nan")
    x[4, 7] = 3000  # as the label's entry among logits
    got = [stored(rows) for rows in native.quantise_twice(x, factors)]
    want = reference.quantise_twice(x, factors)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    both = sum(rows.values * rows.scale[:, None] for rows in got)
    off = (both - x * factors).abs().amax(1) / (x * factors).abs().amax(1)
    assert off[[0, 1, *range(4, 21)]].max() < 1 / (2 * 127 * 250)
    assert both[2].eq(0).all()
    assert both[3].isnan().all()


@pytest.mark.parametrize("twice", [False, True])
def test_rounding_a_weight_makes_no_wide_copy_of_it(twice):
    """torch sums int8 by way of a copy four times as large: of a head's weight, more than a step takes."""
    weight = torch.randn(2050, 1024, dtype=torch.bfloat16)
    made = native.quantise_weight(weight)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        if twice:
            reference.second_term(weight, made, native.quantise_weight)
        else:
            native.quantise_weight(weight)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    block = 4 * reference.BLOCK  # in 32 bits
    assert weight.numel() <= largest <= max(1.01 * weight.numel(), 1.01 * block)


def test_results_lie_on_the_cpu_whatever_the_default_device():
    x, weight = torch.randn(5, 64), torch.randn(32, 64)
    made = native.quantise_weight(weight)
    want = native.linear(native.quantise(x), made, None, torch.float32)
    with torch.device("meta"):
        got = native.linear(native.quantise(x), native.quantise_weight(weight), None, torch.float32)
    assert torch.equal(got, want)
