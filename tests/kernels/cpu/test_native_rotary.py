"""The compiled rotary positions against their definition in float64.

Bounds. A number is the sum of two products. Float32 rounds both and the sum, relative to the sum of their magnitudes at
most; storage rounds once more, relative to the result.
"""

import math

import pytest
import torch

from fastln_kernels.cpu import library, native_int8, native_rotary, products
from fastln_kernels.reference_rotary import rotary

pytestmark = pytest.mark.skipif(library.why_not("rotary") is not None, reason=f"{library.why_not('rotary')}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Batches, heads, tokens, columns of a head; whether all sequences have the same positions.
SHAPES = [
    (0, 2, 3, 8, True),
    (2, 0, 3, 8, True),
    (2, 2, 0, 8, False),
    (2, 2, 3, 0, False),
    (1, 1, 1, 2, True),
    (3, 2, 7, 6, False),
    (2, 3, 5, 34, True),
    (2, 1, 129, 128, False),
    (1, 9, 1031, 64, True),
]


def tensors(shape, dtype):
    n_batches, n_heads, n_tokens, dim, shared = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_batches, n_heads, n_tokens, dim, generator=generator)
    # Angles of both halves differ, though no model's do: a kernel that takes one for the other is found out.
    angles = torch.rand(1 if shared else n_batches, n_tokens, dim, generator=generator) * 2 * math.pi
    return x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def magnitudes(x, cos, sin, backward):
    """The sum of the magnitudes of both products of each number."""
    x, cos, sin = x.abs(), cos.abs().unsqueeze(1), sin.abs().unsqueeze(1)
    turned = (x * sin).roll(x.shape[-1] // 2, -1) if backward else x.roll(x.shape[-1] // 2, -1) * sin
    return x * cos + turned


def assert_close(y, *given, backward):
    exact = [t.double() for t in given]
    want, info = rotary(*exact, backward=backward), torch.finfo(y.dtype)
    bound = 3 * 2.0**-24 * magnitudes(*exact, backward) + info.eps / 2 * want.abs() + info.smallest_normal
    assert ((y.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_definition_with_one_and_two_threads(dtype, shape, backward):
    given, made = tensors(shape, dtype), []
    before = torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        made.append(native_rotary.rotary(*given, backward=backward))
    torch.set_num_threads(before)
    assert made[0].dtype == dtype
    assert made[0].shape == given[0].shape
    assert made[0].transpose(1, 2).is_contiguous()
    assert torch.equal(*made)
    assert_close(made[0], *given, backward=backward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["tokens first", "part of a row", "columns first", "one head", "cos of one column"])
def test_any_strides(layout, dtype):
    x, cos, sin = tensors((2, 3, 5, 10, False), dtype)
    if layout == "cos of one column":
        cos, sin = (t[..., :1].expand(t.shape) for t in (cos, sin))
    strided = {
        "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "part of a row": lambda t: torch.cat((t, torch.full_like(t, math.nan)), -1)[..., :10],
        "columns first": lambda t: t.mT.contiguous().mT,
        "one head": lambda t: t[:, :1].expand(t.shape),
        "cos of one column": lambda t: t,
    }[layout](x)
    got = native_rotary.rotary(strided, cos, sin)
    assert torch.equal(got, native_rotary.rotary(strided.contiguous(), cos.contiguous(), sin.contiguous()))
    assert_close(got, strided, cos, sin, backward=False)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_passes_and_stays_in_its_pair(dtype, backward):
    x, cos, sin = tensors((1, 2, 4, 6, True), dtype)
    x[0, 0, 1, 2], x[0, 1, 3, 4] = math.nan, math.inf
    got, want = native_rotary.rotary(x, cos, sin, backward=backward), rotary(x, cos, sin, backward=backward)
    assert torch.equal(got.isfinite(), want.isfinite())
    assert (~got.isfinite()).sum() == 4
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[got.isinf()], want[want.isinf()])


def test_the_gradient_is_autograd_s():
    x, cos, sin = tensors((2, 3, 5, 6, False), torch.float64)
    x.requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64)
    (dx,) = torch.autograd.grad(rotary(x, cos, sin), x, dy)
    torch.testing.assert_close(rotary(dy, cos, sin, backward=True), dx, rtol=1e-14, atol=1e-14)


@pytest.mark.skipif(products.why_not("int8") is not None, reason=f"{products.why_not('int8')}")
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, True), (3, 2, 7, 6, False), (2, 3, 67, 64, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_writes_the_rows_that_a_pass_over_its_result_would(dtype, shape):
    x, cos, sin = tensors(shape, dtype)
    x[0, 0, 0, 0] = math.nan
    n_rows, n_cols = shape[0] * shape[2], shape[1] * shape[3]
    for factors in (None, torch.rand(n_cols, generator=torch.Generator().manual_seed(9)) + 0.5):
        rows, rounding = native_int8.rounding(torch.empty(n_rows, n_cols), factors, turned=False)
        rows.values.fill_(99)
        y = native_rotary.rotary(x, cos, sin, rounding, backward=True)
        torch.testing.assert_close(y, native_rotary.rotary(x, cos, sin, backward=True), rtol=0, atol=0, equal_nan=True)
        alone = native_int8.quantise(y.transpose(1, 2).reshape(n_rows, n_cols), factors)
        assert torch.equal(rows.values[:n_rows], alone.values[:n_rows])
        torch.testing.assert_close(rows.scale, alone.scale, rtol=0, atol=0, equal_nan=True)
