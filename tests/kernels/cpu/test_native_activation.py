"""The compiled activations against the definition in float64.

Bounds. Errors are root-mean-square, relative to that of the terms: `|x|` (times `|up|`), and for dx `|dy| (1 + |x|
bell)`. With u = 2^-24, float32's roundoff, an element passes about 10 roundings: sqrt(10 / 3) u, under 4 u. Rounding in
storage is uniform within half the dtype's epsilon: epsilon / (2 sqrt(3)). Chance is allowed four deviations of 0.45 /
sqrt(n).
"""

import math

import pytest
import torch

from fastln_kernels import reference_activation as reference
from fastln_kernels.cpu import library, native_activation
from fastln_kernels.reference_activation import ACTIVATION_KINDS, GatedGradients

pytestmark = pytest.mark.skipif(library.why_not("activation") is not None, reason=f"{library.why_not('activation')}")

U = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUBSETS = [(True, True), (True, False), (False, True)]


def normal(*shape, dtype=torch.float32, seed=0):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_close(got, want, dtype, terms):
    def size(t):
        return t.double().square().mean().sqrt().item()

    assert got.dtype == dtype
    assert got.shape == want.shape
    if got.numel():
        storage = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / (2 * math.sqrt(3))
        chance = 1 + 2 / math.sqrt(got.numel())
        assert size(got.double() - want) <= chance * (4 * U * size(terms) + storage * size(want))


def check(x, up, dy, kind):
    dtype, exact, exact_up, exact_dy = x.dtype, x.double(), up.double(), dy.double()
    slope_terms = exact_dy * (1 + exact.abs() * torch.exp(-exact.square() / 2))
    y = native_activation.activation_forward(x, kind)
    assert y.is_contiguous()
    assert_close(y, reference.activation_forward(exact, kind), dtype, exact)
    dx = native_activation.activation_backward(dy, y if kind == "relu" else x, kind)
    assert dx.is_contiguous()
    assert_close(dx, reference.activation_backward(exact_dy, exact, kind), dtype, slope_terms)

    y = native_activation.gated_forward(x, up, kind)
    assert y.is_contiguous()
    assert_close(y, reference.gated_forward(exact, exact_up, kind), dtype, exact * exact_up)
    for need_dgate, need_dup in SUBSETS:
        flags = {"need_dgate": need_dgate, "need_dup": need_dup}
        got = native_activation.gated_backward(dy, x, up if need_dgate else None, kind, **flags)
        want = reference.gated_backward(exact_dy, exact, exact_up, kind, **flags)
        for gradient, right, terms in zip(got, want, (slope_terms * exact_up, exact_dy * exact), strict=True):
            assert (gradient is None) == (right is None)
            if gradient is not None:
                assert_close(gradient, right, dtype, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_every_kind_matches_the_definition(kind, dtype):
    check(*(normal(7, 385, dtype=dtype, seed=seed) for seed in range(3)), kind)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(), (0,), (3, 0), (0, 5), (1,), (3, 1), (2, 3, 5), (17,), (2**14 - 1,), (2**14 + 9,), (3, 20000)], ids=str
)
def test_shapes(shape, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*(normal(*shape, dtype=dtype, seed=seed) for seed in range(3)), "silu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["row stride", "transposed", "every other column", "one row", "one number"])
@pytest.mark.parametrize("n_cols", [5, 20000])
def test_any_strides(n_cols, layout):
    strided = {
        "row stride": lambda t: torch.cat((t, torch.full_like(t, math.nan)), -1)[..., :n_cols],
        "transposed": lambda t: t.T.contiguous().T,
        "every other column": lambda t: torch.stack((t, torch.full_like(t, math.nan)), -1)[..., 0],
        "one row": lambda t: t[:1].expand(3, n_cols),
        "one number": lambda t: t[:1, :1].expand(3, n_cols),
    }[layout]
    x, up, dy = (normal(3, n_cols, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    check(strided(x), up, dy, "gelu")
    check(x, strided(up), strided(dy), "gelu")


def test_halves_of_one_tensor_in_and_out():
    gate_up, dy = normal(6, 34), normal(6, 17, seed=1)
    dgate_up = torch.full_like(gate_up, math.nan)
    out = GatedGradients(*dgate_up.chunk(2, -1))
    got = native_activation.gated_backward(dy, *gate_up.chunk(2, -1), "silu", need_dgate=True, need_dup=True, out=out)
    assert got is out
    want = reference.gated_backward(dy, *gate_up.chunk(2, -1), "silu", need_dgate=True, need_dup=True)
    torch.testing.assert_close(dgate_up, torch.cat((want.dgate, want.dup), -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_extremes_give_what_the_definition_gives(kind, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4, -1e4, 3e38, -3e38, 1e-40, -1e-40]).to(dtype)
    one = torch.ones_like(x)
    for got, want in (
        (native_activation.activation_forward(x, kind), reference.activation_forward(x, kind)),
        (native_activation.activation_backward(one, x, kind), reference.activation_backward(one, x, kind)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(("kind", "units"), [("silu", 2.5), ("quick_gelu", 7), ("gelu", 10), ("gelu_tanh", 25)])
def test_values_are_right_to_a_few_units_in_the_last_place(kind, units):
    """Also where the activation is what is left of almost nothing: the exponential's argument costs it units there."""
    numbers = torch.arange((127 - 30) << 23, (127 + 2) << 23, 997, dtype=torch.int32).view(torch.float32)
    x = torch.cat((numbers, -numbers))
    want = reference.activation_forward(x.double(), kind)
    unit = torch.exp2(want.abs().log2().floor()) * 2 * U
    assert ((native_activation.activation_forward(x, kind) - want).abs() / unit).max() <= units
