"""The compiled kernels of 8-bit linear layers: the bits of the definition, at any size and on any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_size_stride_and_offset(data):
    n_rows, n_inner, n_cols = (data.draw(st.integers(1, most)) for most in (40, 150, 150))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    wide = torch.randn(n_rows, n_inner + data.draw(st.integers(0, 5)), generator=generator)
    x = wide[:, :n_inner] if data.draw(st.booleans()) else torch.randn(n_inner, n_rows, generator=generator).t()
    made = native.quantise_weight(torch.randn(n_cols, n_inner, generator=generator))
    rows = native.quantise(x)
    check_rows(rows, reference.quantise(x))
    torch.testing.assert_close(
        native.linear(rows, made, None, torch.float32),
        reference.linear(reference.quantise(x), made, None, torch.float32),
        rtol=0,
        atol=0,
    )


def test_the_largest_sums():
    """All numbers at their ends: sums that 16 bits, or 32 with a sign too few, would not hold."""
    for sign in (1.0, -1.0):
        x, weight = torch.full((17, 4096), sign), torch.full((33, 4096), -1.0)
        made, rows = native.quantise_weight(weight), native.quantise(x)
        y = native.linear(rows, made, None, torch.float32)
        torch.testing.assert_close(y, torch.full((17, 33), -sign * 4096), rtol=1e-6, atol=0)
        dx = native.linear_backward(native.quantise(y, made.scale), made, torch.float32)
        torch.testing.assert_close(dx, torch.full((17, 4096), sign * 4096 * 33), rtol=1e-6, atol=0)


def test_threads_change_no_bit():
    torch.manual_seed(0)
    x, dy = torch.randn(300, 320).bfloat16(), torch.randn(300, 450).bfloat16()
    found = []
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            made = native.quantise_weight(torch.ones(450, 320).tril_(), turned=True)
            rows = native.quantise(x, turned=True)
            y = native.linear(rows, made, None, torch.bfloat16)
            found.append((y, native.linear_backward(native.quantise(dy, made.scale), made, torch.bfloat16)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


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
