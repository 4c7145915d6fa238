"""Activations that keep codes of their derivatives: Triton's kernels, interpreted, against the definition in float64.

A code is that of the nearest level. A derivative in float32 is off by what `test_activation.py` says, under `OFF`, so
near the middle between two levels either of them may be it. A group's symmetric codes are off by half a step, and by
127 times the relative error of what they stand for: `STEPS` steps.
"""

import math

import pytest
import torch
from norm_bounds import LAYOUTS, fenced

from fastln_kernels import activation, int8, launch, reference_codes
from fastln_kernels import reference_activation as reference
from fastln_kernels.reference_activation import ACTIVATION_KINDS, GatedGradients
from fastln_kernels.reference_codes import GROUPS, GatedCodes, decode_groups, decode_slopes

pytestmark = pytest.mark.usefixtures("guarded_buffers")

OFF = 2e-6
STEPS = 0.5 + 127 * 1e-5
BLOCK = launch.elementwise_block(4).cols
BITS = (8, 4, 2)


def normal(*shape, dtype=torch.float32, seed=0):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def check_plain(x, dy, kind, bits):
    y, codes = activation.activation_forward(x, kind, bits=bits)
    assert torch.equal(y, activation.activation_forward(x, kind))
    wide = x.double()
    slope = reference.activation_backward(torch.ones_like(wide), wide, kind)
    shape = reference_codes.encode_slopes(slope, kind, bits).shape
    assert (codes.dtype, codes.shape) == (torch.uint8, shape)
    assert codes.is_contiguous()
    got = decode_slopes(codes, kind, bits, x.shape, torch.float64)
    table = reference_codes.slope_table(kind, bits)
    nearest = (slope[..., None] - table[~table.isnan()]).abs().amin(-1)
    assert ((got - slope).abs() <= nearest + OFF).all()
    n_cols = x.shape[-1] if x.dim() else 1
    filled = reference_codes.pack(reference_codes.unpack(codes, bits, n_cols).to(torch.uint8), bits)
    assert torch.equal(codes, filled), "bits beyond the last column are zeros"

    dx = activation.activation_backward(dy, codes, kind, bits=bits)
    assert dx.is_contiguous()
    want = reference.activation_backward(dy.double(), codes, kind, bits=bits)
    eps = torch.finfo(dy.dtype).eps
    torch.testing.assert_close(dx.double(), want, rtol=max(eps, 1e-6), atol=1e-6)


def check_gated(gate, up, dy, kind, bits):
    y, codes = activation.gated_forward(gate, up, kind, bits=bits)
    assert torch.equal(y, activation.gated_forward(gate, up, kind))
    wide, wide_up = gate.double(), up.double()
    value, slope = reference.activation_forward(wide, kind), reference.activation_backward(wide_up, wide, kind)
    n_cols = gate.shape[-1] if gate.dim() else 1
    for got, scale, right in ((codes.value, codes.value_scale, value), (codes.slope, codes.slope_scale, slope)):
        want = reference_codes.encode_groups(right, bits)
        assert (got.dtype, got.shape) == (want[0].dtype, want[0].shape)
        torch.testing.assert_close(scale, want[1], rtol=1e-5, atol=1e-35)
        decoded = decode_groups(got, scale, right.shape, torch.float64)
        steps = scale.double().repeat_interleave(GROUPS[bits], -1)[..., :n_cols].view(right.shape)
        assert ((decoded - right).abs() <= STEPS * steps + 1e-30).all()
        if bits == 4 and n_cols % 2:
            assert not (got[..., -1] >> 4).any()
    eps = max(torch.finfo(dy.dtype).eps, 1e-6)
    for need_dgate, need_dup in ((True, True), (True, False), (False, True)):
        flags = {"need_dgate": need_dgate, "need_dup": need_dup}
        got = activation.gated_backward(dy, codes, None, kind, **flags)
        want = reference.gated_backward(dy.double(), codes, None, kind, **flags)
        for gradient, right in zip(got, want, strict=True):
            assert (gradient is None) == (right is None)
            if right is not None:
                torch.testing.assert_close(gradient.double(), right, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_every_kind_and_width_of_codes(kind):
    for dtype in (torch.float32, torch.bfloat16):
        x, up, dy = (normal(5, 72, dtype=dtype, seed=seed) for seed in range(3))
        for bits in BITS:
            check_plain(x, dy, kind, bits)
        for bits in GROUPS:
            check_gated(x, up, dy, kind, bits)


@pytest.mark.slow(take=6)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 0), (0, 5), (1,), (1, 1), (3, 1), (7,), (2, 3, 5), (3, 66), (2, 64), (2, BLOCK + 4)],
    ids=str,
)
def test_shapes(shape, bits):
    x, up, dy = (normal(*shape, seed=seed) for seed in range(3))
    check_plain(x, dy, "gelu_tanh", bits)
    if bits in GROUPS:
        check_gated(x, up, dy, "silu", bits)


@pytest.mark.parametrize("layouts", [*zip(LAYOUTS, LAYOUTS, strict=True), ("contiguous", "row stride")], ids=str)
@pytest.mark.parametrize("n_cols", [5, 64])
def test_layouts(n_cols, layouts):
    one, other = (LAYOUTS[name] for name in layouts)
    x, up, dy = (normal(6, n_cols, seed=seed) for seed in range(3))
    check_plain(one(x), other(dy), "quick_gelu", 2)
    check_gated(one(x), other(up), one(dy), "gelu", 4)


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_the_extremes_and_what_is_bad(kind):
    """The derivative's extremes are among the levels' reach; NaN has a code of its own, but with 2 bits."""
    x = torch.cat((torch.linspace(-6, 6, 997), torch.tensor([0.0, -1e4, 1e4, -1e30, 1e30, math.nan])))
    dy = torch.randn(len(x))
    for bits in BITS:
        check_plain(x[:-1], dy[:-1], kind, bits)
        y, codes = activation.activation_forward(x, kind, bits=bits)
        dx = activation.activation_backward(dy, codes, kind, bits=bits)
        want = reference.activation_backward(dy, reference.activation_forward(x, kind, bits=bits)[1], kind, bits=bits)
        assert y[-1].isnan()
        assert torch.equal(dx.isnan(), want.isnan())
        assert dx[-1].isnan() == (bits > 2 and kind != "relu")
    # 0 times infinity is 0 where ReLU's derivative is 0.
    _, codes = activation.activation_forward(torch.tensor([-1.0, 0.0, 1.0]), "relu", bits=4)
    infinite = torch.full((3,), math.inf)
    assert activation.activation_backward(infinite, codes, "relu", bits=4).tolist() == [0, 0, math.inf]


@pytest.mark.parametrize("bits", GROUPS)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_bad_group_shows_and_does_not_leak(bits):
    group = GROUPS[bits]
    gate, up = normal(3, 2 * group + 3), normal(3, 2 * group + 3, seed=1)
    gate[0, 5], up[1, group], up[2, -1] = math.nan, math.inf, 1e4
    _, codes = activation.gated_forward(gate, up, "silu", bits=bits)
    _, want = reference.gated_forward(gate, up, "silu", bits=bits)
    assert codes.slope_scale.isnan().tolist() == [[True, False, False], [False, True, False], [False] * 3]
    assert torch.equal(codes.value_scale.isnan(), want.value_scale.isnan())
    for got, right in zip(codes[:2], want[:2], strict=True):
        assert ((got == right).double().mean()) > 0.99
    flags = {"need_dgate": True, "need_dup": True}
    got, right = (each.gated_backward(up, want, None, "silu", **flags) for each in (activation, reference))
    torch.testing.assert_close(tuple(got), tuple(right), equal_nan=True)


@pytest.mark.parametrize("bits", GROUPS)
@pytest.mark.parametrize("shape", [(5, 128), (3, 70)], ids=str)
def test_gradients_written_to_the_halves_of_one_tensor(shape, bits):
    gate, up = normal(*shape[:-1], 2 * shape[-1]).chunk(2, -1)
    dy = fenced(normal(*shape, seed=1))
    _, codes = activation.gated_forward(gate, up, "gelu", bits=bits)
    joined = torch.full((shape[0], 2 * shape[1]), math.nan)
    flags = {"need_dgate": True, "need_dup": True}
    out = activation.gated_backward(dy, codes, None, "gelu", out=GatedGradients(*joined.chunk(2, -1)), **flags)
    want = reference.gated_backward(dy, GatedCodes(*codes), None, "gelu", **flags)
    torch.testing.assert_close(tuple(out), tuple(want))
    assert not joined.isnan().any()


@pytest.mark.parametrize("n_cols", [64, 5])
def test_results_are_rounded_to_8_bits_beside_codes(n_cols):
    x, up, dy = (normal(6, n_cols, seed=seed) for seed in range(3))
    factors, turned = torch.rand(n_cols), n_cols % 64 == 0

    def same(rows, result, by=None, turn=False):
        for part, right in zip(rows, int8.quantise(result, by, turned=turn), strict=True):
            assert torch.equal(part, right)

    for bits in BITS:
        rows, rounding = int8.rounding(x, turned=turned)
        y, codes = activation.activation_forward(x, "gelu", rounding, bits=bits)
        assert torch.equal(codes, activation.activation_forward(x, "gelu", bits=bits)[1])
        same(rows, y, turn=turned)
        rows, rounding = int8.rounding(dy, factors)
        dx = activation.activation_backward(dy, codes, "gelu", rounding, bits=bits)
        same(rows, dx, factors)
    for bits in GROUPS:
        rows, rounding = int8.rounding(x, turned=turned)
        y, codes = activation.gated_forward(x, up, "silu", rounding, bits=bits)
        for got, right in zip(codes, activation.gated_forward(x, up, "silu", bits=bits)[1], strict=True):
            assert torch.equal(got, right)
        same(rows, y, turn=turned)
        (of_gate, round_dgate), (of_up, round_dup) = (int8.rounding(dy, factors) for _ in range(2))
        gradients = activation.gated_backward(
            *(dy, codes, None, "silu"),
            need_dgate=True,
            need_dup=True,
            round_dgate=round_dgate,
            round_dup=round_dup,
        )
        same(of_gate, gradients.dgate, factors)
        same(of_up, gradients.dup, factors)
