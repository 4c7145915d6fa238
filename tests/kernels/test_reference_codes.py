"""The definition of codes against exact arithmetic. docs/kernels/codes.md derives the bounds."""

import math

import pytest
import torch

from fastln_kernels import reference, reference_activation, reference_codes, reference_int8
from fastln_kernels.reference import NormAgain, NormBackward, NormForward, NormKind
from fastln_kernels.reference_activation import ACTIVATION_KINDS
from fastln_kernels.reference_codes import GROUPS, LARGEST, LEVELS, N_LEVELS, NAN_CODES, SLOPE_STEPS

HALF = 0.5 + 2**-15
"""Half a step, and float32's rounding of a number of at most 127 steps: at most 127 * 3 * 2^-24 steps."""


def awkward_rows(n_cols: int) -> torch.Tensor:
    """Rows with an outlier, constant rows, small and large ones."""
    x = torch.randn(7, n_cols, generator=torch.Generator().manual_seed(n_cols))
    x[1, 0], x[2], x[3], x[4], x[5] = 1e4, 3.0, 0.0, x[4] * 1e-20, x[5] * 1e20
    return x


@pytest.mark.parametrize("n_cols", [1, 63, 64])
def test_a_group_of_8_bits_is_rounded_like_a_row(n_cols):
    x = awkward_rows(n_cols)
    codes, scale = reference_codes.encode_groups(x, 8)
    for got, want in zip((codes, scale[:, 0]), reference_int8.quantise(x), strict=True):
        assert torch.equal(got, want)  # one definition of numbers in 8 bits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_group_with_a_number_that_is_none_decodes_to_nan(value):
    x = torch.randn(3, 70)
    x[1, 69] = value
    for bits, group in GROUPS.items():
        decoded = reference_codes.decode_groups(*reference_codes.encode_groups(x, bits), x.shape, torch.float32)
        nan = decoded.isnan()
        assert not nan[[0, 2]].any()
        first = 69 // group * group
        assert nan[1, first:].all()
        assert not nan[1, :first].any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n_cols", [1, 31, 64, 65, 768])
def test_groups_are_off_by_half_a_step_of_their_own(bits, n_cols):
    x = awkward_rows(n_cols).view(1, 7, n_cols)
    codes, scale = reference_codes.encode_groups(x, bits)
    assert codes.shape == reference_codes.code_shape(x.shape, bits)
    assert scale.shape == (1, 7, -(-n_cols // GROUPS[bits]))
    assert not scale[0, 3].any()  # the row of zeros
    if bits == 8:
        assert codes.dtype == torch.int8
        assert not codes[0, 3].any()
        assert (codes.int().abs() <= LARGEST[bits]).all()
    off = (reference_codes.decode_groups(codes, scale, x.shape, torch.float64) - x).abs()
    for group, columns in enumerate(off.split(GROUPS[bits], -1)):
        assert (columns <= HALF * scale[..., group, None]).all()
        top = x.abs().split(GROUPS[bits], -1)[group].amax(-1)
        torch.testing.assert_close(scale[..., group] * LARGEST[bits], top)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_first_column_has_the_lowest_bits(bits):
    codes = torch.randint(0, 2**bits, (3, 21), dtype=torch.uint8)
    packed = reference_codes.pack(codes, bits)
    assert packed.shape == reference_codes.code_shape(codes.shape, bits)
    assert torch.equal(reference_codes.unpack(packed, bits, 21), codes.int())
    for byte, first in enumerate(range(0, 21, 8 // bits)):
        group = codes[0, first : first + 8 // bits].tolist()
        assert packed[0, byte] == sum(code << place * bits for place, code in enumerate(group))


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_uniform_levels_hold_zero_one_and_the_range(kind):
    x = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    slopes = reference_activation.activation_backward(torch.ones_like(x), x, kind)
    zero, steps = SLOPE_STEPS[kind]
    table = reference_codes.slope_table(kind, 8)
    assert table[-1].isnan()
    assert (table[zero], table[zero + steps]) == (0, 1)
    assert table[0] <= slopes.min()
    assert table[254] >= slopes.max()
    more = steps + 1  # as many steps as there is room for
    assert (
        math.floor(slopes.min() * more) < -zero
        or math.ceil(slopes.max() * more) - math.floor(slopes.min() * more) > 254
    )


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_derivatives_become_the_nearest_level(kind, bits):
    x = torch.cat((torch.linspace(-6, 6, 4001), torch.tensor([0.0, -1e4, 1e4, math.nan]))).double()
    y, codes = reference_activation.activation_forward(x, kind, bits=bits)
    assert torch.equal(y.nan_to_num(), reference_activation.activation_forward(x, kind).nan_to_num())
    assert codes.dtype == torch.uint8
    assert codes.shape == (-(-len(x) * bits // 8),)
    dy = torch.randn(len(x), dtype=torch.float64)
    dx = reference_activation.activation_backward(dy, codes, kind, bits=bits)
    want = reference_activation.activation_backward(dy, x, kind)
    table = reference_codes.slope_table(kind, bits)
    levels = table[~table.isnan()]
    slopes = reference_activation.activation_backward(torch.ones_like(x), x, kind)[:-1]
    nearest = (slopes[:, None] - levels).abs().amin(1)
    torch.testing.assert_close((dx - want)[:-1].abs(), nearest * dy[:-1].abs())
    if kind == "relu":
        assert torch.equal(dx, want)
    else:
        assert dx[-1].isnan() == (bits in NAN_CODES)


def test_levels_are_sorted_and_as_many_as_their_codes():
    for (kind, bits), levels in LEVELS.items():
        assert len(levels) == N_LEVELS[bits] == len(set(levels))
        assert list(levels) == sorted(levels), kind


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n_cols", [1, 65])
def test_gated_gradients_have_the_errors_of_their_codes(bits, n_cols):
    gate, up, dy = torch.randn(3, 2, 5, n_cols, dtype=torch.float64)
    y, codes = reference_activation.gated_forward(gate, up, "silu", bits=bits)
    assert torch.equal(y, reference_activation.gated_forward(gate, up, "silu"))
    assert codes.bits == bits
    wanted = {"need_dgate": True, "need_dup": True}
    want = reference_activation.gated_backward(dy, gate, up, "silu", **wanted)
    for out in (None, reference_activation.GatedGradients(torch.empty_like(dy), torch.empty_like(dy))):
        got = reference_activation.gated_backward(dy, codes, None, "silu", out=out, **wanted)
        for gradient, exact, scale in zip(got, want, (codes.slope_scale, codes.value_scale), strict=True):
            step = scale.repeat_interleave(GROUPS[bits], -1)[..., :n_cols]
            assert ((gradient - exact).abs() <= dy.abs() * step * HALF).all()
    only = reference_activation.gated_backward(dy, codes, None, "silu", need_dup=True)
    assert only.dgate is None
    assert torch.equal(only.dup, got.dup)


KINDS = {
    "layer": NormKind(1e-5),
    "rms": NormKind(1e-5, centre=False, offset=1.0),
    "llama": NormKind(1e-5, centre=False, round_normed=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_norm_from_codes_is_the_norm_of_rounded_rows(kind, dtype):
    kind = KINDS[kind]
    x, dy, residual = torch.randn(3, 9, 100, dtype=dtype)
    x[2, 3] = 1e4
    weight, bias = torch.randn(2, 100)
    request = NormForward(x, weight, bias, kind, residual, want_stream=True)
    exact = reference.norm_forward(request)
    made = reference.norm_forward(request._replace(want_codes=True))
    assert torch.equal(made.y, exact.y)
    assert made.normed.dtype == torch.int8
    again = NormAgain(exact.stream, weight, bias, exact.rstd, kind, False, None, dtype)
    assert torch.equal(reference.norm_again(again), exact.y)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_hat = reference.norm_forward(NormForward(exact.stream.to(wide), None, None, kind, want_normed=True)).normed
    assert made.scale.shape == (9, 2)
    step = made.scale.to(wide).repeat_interleave(64, 1)[:, :100]
    decoded = made.normed.to(wide) * step
    assert ((decoded - x_hat).abs() <= step * HALF).all()
    again = again._replace(saved=made.normed, rstd=None, saved_is_normed=True, scale=made.scale)
    factor = weight.abs() if kind.offset == 0 else (weight + kind.offset).abs()
    eps = torch.finfo(dtype).eps if kind.round_normed else 0
    rounding = eps * x_hat.abs() * factor + 2 * torch.finfo(dtype).eps * exact.y.abs() + 1e-6
    assert ((reference.norm_again(again).to(wide) - exact.y.to(wide)).abs() <= factor * step * HALF + rounding).all()

    wanted = {"need_dx": True, "need_dweight": True, "need_dbias": True}
    given = NormBackward(dy, made.normed, weight, made.rstd, kind, saved_is_normed=True, **wanted)
    got = reference.norm_backward(given._replace(scale=made.scale))
    # The same arithmetic on rows that are what the codes stand for.
    want = reference.norm_backward(given._replace(dy=dy.to(wide), saved=decoded))
    assert got.dx.dtype == dtype
    torch.testing.assert_close(got.dx.to(wide), want.dx, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    if not kind.round_normed:
        torch.testing.assert_close(got.dweight, want.dweight)
    assert torch.equal(got.dbias, want.dbias)


def test_no_rows():
    kind = KINDS["layer"]
    made = reference.norm_forward(NormForward(torch.randn(0, 5), None, None, kind, want_codes=True))
    assert made.normed.shape == (0, 5)
    assert made.scale.shape == (0, 1)
    assert reference.norm_again(
        NormAgain(made.normed, None, None, None, kind, True, made.scale, torch.float32)
    ).shape == (0, 5)
    for bits in (8, 4, 2):
        y, codes = reference_activation.activation_forward(torch.randn(0, 5), "gelu", bits=bits)
        assert reference_activation.activation_backward(y, codes, "gelu", bits=bits).shape == (0, 5)
