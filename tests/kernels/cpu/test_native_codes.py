"""The compiled kernels that write and read codes against the definition.

Bounds. Results other than codes have the bits of the kernels without codes. A code may be another than the definition's
where the derivative is nearly half way between two levels. In float32 the kernels' derivatives are off by less than
1e-6, in the 16-bit dtypes by less than 2e-4, since their functions have 4 digits. So the decoded derivative is at most
that much further from the exact one than the nearest level is. The factors of gated gradients are off by half a step of
their group and by the same share of `1 + |gate| + |up|`.
"""

import itertools
import math

import pytest
import torch

from fastln_kernels import reference_activation as reference
from fastln_kernels import reference_codes
from fastln_kernels.cpu import library, native_activation
from fastln_kernels.reference_activation import ACTIVATION_KINDS, GatedGradients
from fastln_kernels.reference_codes import GROUPS, GatedCodes

WHY_NOT = library.why_not("activation_codes")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = 0.5 + 2**-15
WIDTHS = [0, 1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 127, 1000, 1025, 20001]


def normal(*shape, dtype=torch.float32, seed=0):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def near(dtype):
    return 1e-6 if dtype == torch.float32 else 2e-4


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def check_derivatives(x, dy, kind, bits):
    y, codes = native_activation.activation_forward(x, kind, bits=bits)
    assert_same(y, native_activation.activation_forward(x, kind))
    assert y.is_contiguous()
    assert codes.is_contiguous()
    assert codes.dtype == torch.uint8
    assert codes.shape == reference_codes.code_shape(x.shape, bits)
    exact = x.double()
    slopes = reference.activation_backward(torch.ones_like(exact), exact, kind)
    decoded = reference_codes.decode_slopes(codes, kind, bits, x.shape, torch.float64)
    table = reference_codes.slope_table(kind, bits)
    nearest = (slopes[..., None] - table[~table.isnan()]).abs().amin(-1)
    off = (decoded - slopes).abs()
    assert (off <= nearest + near(x.dtype))[~slopes.isnan()].all()
    assert decoded[slopes.isnan()].isnan().all() or bits == 2
    # The bits that fill up a row are zero.
    assert_same(
        codes, reference_codes.pack(reference_codes.unpack(codes, bits, (*x.shape, 1)[x.ndim - 1]).byte(), bits)
    )

    dx = native_activation.activation_backward(dy, codes, kind, bits=bits)
    assert dx.is_contiguous()
    want = reference.activation_backward(dy, codes, kind, bits=bits)
    # The level is a float32 number after two roundings; the product is rounded to float32 and to the dtype.
    torch.testing.assert_close(dx, want, rtol=torch.finfo(dy.dtype).eps + 2**-22, atol=0, equal_nan=True)
    return y, codes, dx


def check_gated(gate, up, dy, kind, bits):
    y, codes = native_activation.gated_forward(gate, up, kind, bits=bits)
    assert_same(y, native_activation.gated_forward(gate, up, kind))
    assert isinstance(codes, GatedCodes)
    wide_gate, wide_up = gate.double(), up.double()
    value = reference.activation_forward(wide_gate, kind)
    slope = reference.activation_backward(wide_up, wide_gate, kind)
    reach = near(gate.dtype) * (1 + wide_gate.abs() + wide_up.abs()).nan_to_num()
    for factor, packed, scale in ((value, codes.value, codes.value_scale), (slope, codes.slope, codes.slope_scale)):
        want_codes, want_scale = reference_codes.encode_groups(factor, bits)
        assert packed.dtype == want_codes.dtype
        assert packed.shape == want_codes.shape
        assert packed.is_contiguous()
        assert_same(scale.isnan(), want_scale.isnan())
        torch.testing.assert_close(scale, want_scale, rtol=2 * near(gate.dtype), atol=1e-8, equal_nan=True)
        decoded = reference_codes.decode_groups(packed, scale, gate.shape, torch.float64)
        step = (
            scale.double().repeat_interleave(GROUPS[bits], -1)[..., : (*gate.shape, 1)[gate.ndim - 1]].view(gate.shape)
        )
        finite = ~step.isnan()
        assert ((decoded - factor).abs() <= step * HALF + reach)[finite].all()
        assert decoded[~finite].isnan().all()
    for need_dgate, need_dup in ((True, True), (True, False), (False, True)):
        wanted = {"need_dgate": need_dgate, "need_dup": need_dup}
        got = native_activation.gated_backward(dy, codes, None, kind, **wanted)
        want = reference.gated_backward(dy, codes, None, kind, **wanted)
        for gradient, right in zip(got, want, strict=True):
            assert (gradient is None) == (right is None)
            if gradient is not None:
                assert_same(gradient, right)  # one product each, in the same order
    return y, codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_every_kind_matches_the_definition(kind, dtype):
    x, up, dy = (normal(7, 385, dtype=dtype, seed=seed) for seed in range(3))
    for bits in (8, 4, 2):
        check_derivatives(x, dy, kind, bits)
    for bits in (8, 4):
        check_gated(x, up, dy, kind, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(dtype):
    for shape in ((), (0,), (3, 0), (0, 5), *((3, n) for n in WIDTHS), (2, 3, 5), (2**14 + 9,), (1, 65536)):
        x, up, dy = (normal(*shape, dtype=dtype, seed=seed) for seed in range(3))
        for bits in (8, 4, 2):
            check_derivatives(x, dy, "gelu", bits)
        for bits in (8, 4):
            check_gated(x, up, dy, "silu", bits)


@pytest.mark.parametrize("layout", ["row stride", "transposed", "every other column", "one row"])
def test_any_strides(layout):
    n_cols = 67
    strided = {
        "row stride": lambda t: torch.cat((t, torch.full_like(t, math.nan)), -1)[..., :n_cols],
        "transposed": lambda t: t.T.contiguous().T,
        "every other column": lambda t: torch.stack((t, torch.full_like(t, math.nan)), -1)[..., 0],
        "one row": lambda t: t[:1].expand(3, n_cols),
    }[layout]
    x, up, dy = (normal(3, n_cols, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    for bits in (8, 4, 2):
        check_derivatives(strided(x), strided(dy), "gelu", bits)
    for bits in (8, 4):
        check_gated(strided(x), strided(up), strided(dy), "silu", bits)
    # Codes that were moved are read as they are.
    _, codes = native_activation.activation_forward(x, "gelu", bits=4)
    moved = codes.t().contiguous().t()
    assert_same(*(native_activation.activation_backward(dy, c, "gelu", bits=4) for c in (codes, moved)))


def test_halves_of_one_tensor_in_and_out():
    gate_up, dy = normal(2, 3, 134), normal(2, 3, 67, seed=1)
    dgate_up = torch.full_like(gate_up, math.nan)
    _, codes = native_activation.gated_forward(*gate_up.chunk(2, -1), "silu", bits=8)
    out = GatedGradients(*dgate_up.chunk(2, -1))
    wanted = {"need_dgate": True, "need_dup": True}
    assert native_activation.gated_backward(dy, codes, None, "silu", out=out, **wanted) is out
    assert_same(dgate_up, torch.cat(native_activation.gated_backward(dy, codes, None, "silu", **wanted), -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_extremes(kind, dtype):
    """The derivative's own extremes, numbers that are none, outliers; each beside ordinary numbers of other groups."""
    x = normal(4, 200, dtype=dtype)
    x[0, :7] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e4, -1e4])
    x[1] = torch.linspace(-2, 2, 200)  # GELU's smallest and largest derivatives are at -1.41 and 1.41
    x[2], x[3] = 1.5, 0.0
    up, dy = normal(4, 200, dtype=dtype, seed=1), normal(4, 200, dtype=dtype, seed=2)
    up[2, 199], up[3, 0] = 1e4, math.inf
    for bits in (8, 4, 2):
        check_derivatives(x, dy, kind, bits)
    for bits in (8, 4):
        _, codes = check_gated(x, up, dy, kind, bits)
        value, slope = (scale.isnan().tolist() for scale in (codes.value_scale, codes.slope_scale))
        n_groups = len(value[0])
        assert value == [[True] + [False] * (n_groups - 1)] + [[False] * n_groups] * 3
        assert slope[1:3] == [[False] * n_groups] * 2
        zero_times_infinity = kind != "relu"  # ReLU selects: it has no product there
        assert slope[3] == [zero_times_infinity] + [False] * (n_groups - 1)


def test_threads_and_repetitions_give_the_same_bits():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found = []
            for dtype, n_cols in itertools.product((torch.float32, torch.bfloat16), (769, 20001)):
                x, up, dy = (normal(50, n_cols, dtype=dtype, seed=seed) for seed in range(3))
                for bits in (8, 4, 2):
                    found += native_activation.activation_forward(x, "gelu", bits=bits)
                    found.append(native_activation.activation_backward(dy, found[-1], "gelu", bits=bits))
                for bits in (8, 4):
                    y, codes = native_activation.gated_forward(x, up, "silu", bits=bits)
                    found += [y, *codes]
                    wanted = {"need_dgate": True, "need_dup": True}
                    found += native_activation.gated_backward(dy, codes, None, "silu", **wanted)
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same(got, want)
