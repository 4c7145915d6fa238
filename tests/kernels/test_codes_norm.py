"""Norms that keep x_hat in 8 bits, and norms made again from what was kept: Triton's kernels, interpreted.

Bounds. A code is off by half a step; x_hat itself by what `norm_bounds` says, relative to the row's largest, which has
127 steps: so by `HALF` steps and 127 times that.
"""

import math

import pytest
import torch
from norm_bounds import (
    KINDS,
    LAYER_NORM,
    PROLOGUES,
    SEED,
    Prologue,
    arithmetic_bound,
    assert_close,
    every_other,
    fenced,
    inputs,
    storage_bound,
)

from fastln_kernels import int8, norm, reference
from fastln_kernels.reference import NormAgain, NormBackward, NormForward
from fastln_kernels.reference_codes import decode_groups, scale_shape

pytestmark = pytest.mark.usefixtures("guarded_buffers")

SHAPES = [(0, 64), (1, 1), (7, 33), (9, 384), (3, 20, "wide"), (3, 128, "wide"), (3, 200, "wide"), (3, 300, "wide")]
"""Rows, columns and whether they take the way of wide rows, where the width decides which sums are kept on the way."""


@pytest.fixture
def shape(request):
    n_rows, n_cols, *fixtures = request.param
    for name in fixtures:
        request.getfixturevalue(name)
    return n_rows, n_cols


def of_shapes(*shapes):
    return pytest.mark.parametrize("shape", shapes, indirect=True, ids=str)


def decoded(kept, dtype):
    return decode_groups(kept.normed, kept.scale, kept.normed.shape, dtype)


def forward(given, kind, prologue, **wanted):
    residual, dropout = given.residual if prologue.residual else None, prologue.dropout
    request = NormForward(given.x, given.weight, given.bias, kind, residual, dropout, SEED if dropout else None)
    return request._replace(**wanted)


@pytest.mark.slow(take=4)
@of_shapes(*SHAPES)
@pytest.mark.parametrize(
    ("kind", "prologue", "dtype"), [("layer", "none", torch.float32), ("llama", "post-norm", torch.bfloat16)]
)
def test_codes_are_of_x_hat_and_all_else_is_as_without_them(shape, kind, prologue, dtype):
    given, kind, prologue = inputs(*shape, dtype), KINDS[kind], PROLOGUES[prologue]
    request = forward(given, kind, prologue, want_codes=True)
    got, plain = norm.norm_forward(request), norm.norm_forward(request._replace(want_codes=False))
    assert torch.equal(got.y, plain.y)
    assert torch.equal(got.rstd, plain.rstd)
    assert got.normed.dtype == torch.int8
    assert got.scale.dtype == torch.float32
    assert got.scale.shape == scale_shape(given.x.shape, 8)
    exact = forward(given.double(), kind, prologue, want_normed=True)
    x_hat = reference.norm_forward(exact).normed
    # x_hat is off relative to the row's largest, a code relative to its group's.
    lost = 3 * arithmetic_bound(*shape) * (x_hat.abs().amax(1, keepdim=True) if len(x_hat) else 0)
    off = (decoded(got, torch.float64) - x_hat).abs()
    for group, (columns, exact) in enumerate(zip(off.split(64, 1), x_hat.split(64, 1), strict=True)):
        scale = got.scale[:, group].double()
        assert (columns <= (0.5 + 2**-16) * scale[:, None] + lost + 1e-30).all()
        if len(x_hat):
            torch.testing.assert_close(scale * 127, exact.abs().amax(1), rtol=1e-5, atol=1e-5)


@of_shapes((6, 200), (6, 200, "wide"))
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy meets inf - inf
def test_outliers_constant_rows_and_bad_ones(shape, kind):
    given, kind = inputs(*shape, torch.float32), KINDS[kind]
    given.x[1, 7], given.x[2], given.x[3], given.x[4, 199], given.x[5, 0] = 1e4, 3.0, 0.0, math.nan, -math.inf
    request = forward(given, kind, PROLOGUES["none"], want_codes=True)
    got, want = norm.norm_forward(request), reference.norm_forward(request)
    assert torch.equal(got.scale.isnan(), want.scale.isnan())
    assert got.scale.isnan().any(1).tolist() == [False] * 4 + [True] * 2
    assert not got.normed[3:].any()
    assert not got.scale[3].any()
    assert got.normed[1, 7] == 127
    torch.testing.assert_close(got.scale[:2], want.scale[:2])
    # One step, where both are near the middle between two codes.
    steps = (got.normed.int() - want.normed.int())[:2].abs()
    assert steps.max() <= 1
    assert (steps == 0).double().mean() > 0.98
    constant = decoded(got, torch.float32)[2:4]
    torch.testing.assert_close(constant, want.y[2:4].sub(given.bias).div(given.weight), rtol=1e-2, atol=1e-3)
    dx = norm.norm_backward(backward(given, got, kind, (True, False, False))).dx
    assert dx.isnan().all(1).tolist() == [False] * 4 + [True] * 2


def backward(given, kept, kind, subset, prologue=PROLOGUES["none"]):
    need_rows, need_dweight, need_dbias = subset
    return NormBackward(
        given.dy,
        kept.normed,
        given.weight,
        kept.rstd,
        kind,
        saved_is_normed=True,
        dropout=prologue.dropout,
        seed=SEED if prologue.dropout else None,
        need_dx=need_rows,
        need_dresidual=need_rows and prologue.residual,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
        scale=kept.scale,
    )


@pytest.mark.slow(take=8)
@of_shapes(*SHAPES)
@pytest.mark.parametrize(
    ("subset", "kind", "prologue", "dtype"),
    [
        ((True, True, True), "layer", "post-norm", torch.float32),
        ((True, True, False), "llama", "none", torch.bfloat16),
        ((False, True, True), "gemma", "none", torch.float32),
        ((True, False, False), "rms", "none", torch.float16),
    ],
)
def test_gradients_from_codes(shape, subset, kind, prologue, dtype):
    given, kind, prologue = inputs(*shape, dtype), KINDS[kind], PROLOGUES[prologue]
    kept = reference.norm_forward(forward(given, kind, prologue, want_codes=True))
    got = norm.norm_backward(backward(given, kept, kind, subset, prologue))
    exact = given.double()
    of_exact = kept._replace(rstd=kept.rstd.double(), scale=kept.scale.double())
    request = backward(exact, of_exact, kind, subset, prologue)._replace(grad_dtype=torch.float64)
    want = reference.norm_backward(request)
    arithmetic, storage = arithmetic_bound(*shape), storage_bound(dtype)
    terms = kept.rstd.double()[:, None] * exact.dy * (exact.weight + kind.offset)
    scaled = terms * reference.dropout_scale(prologue.dropout)
    for name, scale in (("dx", scaled), ("dresidual", terms)):
        if getattr(want, name) is not None:
            assert getattr(got, name).dtype == dtype
            assert_close(getattr(got, name), getattr(want, name), arithmetic + storage, scale)
    normed = decoded(kept, torch.float64)
    sums = math.sqrt(shape[0] / 2) * 2**-24 + arithmetic
    rounded = storage if kind.round_normed else 0.0
    for name, summands, extra in (("dweight", exact.dy * normed, rounded), ("dbias", exact.dy, 0.0)):
        if getattr(want, name) is not None:
            size = summands.norm(dim=0) + getattr(want, name).abs()
            assert_close(getattr(got, name), getattr(want, name), sums + extra, size)


@pytest.mark.slow(take=4)
@of_shapes((0, 5), (1, 1), (7, 33), (70, 200), (3, 1000))
@pytest.mark.parametrize(
    ("kind", "dtype"), [("layer", torch.float32), ("gemma", torch.bfloat16), ("llama", torch.float16)]
)
def test_results_made_again(shape, kind, dtype):
    given, kind = inputs(*shape, dtype), KINDS[kind]
    request = forward(given, kind, PROLOGUES["none"])
    codes = norm.norm_forward(request._replace(want_codes=True))
    normed = norm.norm_forward(request._replace(want_normed=True))
    of_input = NormAgain(given.x, given.weight, given.bias, codes.rstd, kind, False, None, dtype)
    assert torch.equal(norm.norm_again(of_input), codes.y)
    exact = given.double()
    for kept, scale in ((codes.normed, codes.scale), (fenced(normed.normed), None)):
        again = of_input._replace(saved=kept, saved_is_normed=True, scale=scale)
        got = norm.norm_again(again)
        assert got.is_contiguous()
        assert got.dtype == dtype
        wide = again._replace(weight=exact.weight, bias=exact.bias, dtype=torch.float64)
        want = reference.norm_again(wide if scale is not None else wide._replace(saved=kept.double()))
        storage = storage_bound(dtype) * (1 + kind.round_normed)
        assert_close(got, want, 4 * 2**-24 + storage, want.abs() + exact.bias.abs())


@of_shapes((4, 40), (4, 100))
def test_without_weight_and_bias_or_with_strided_ones(shape):
    given = inputs(*shape, torch.float32)
    kept = norm.norm_forward(NormForward(every_other(given.x), None, None, LAYER_NORM, want_codes=True))
    again = NormAgain(kept.normed, None, None, kept.rstd, LAYER_NORM, True, kept.scale, torch.float32)
    torch.testing.assert_close(norm.norm_again(again), decoded(kept, torch.float32))
    weight, bias = every_other(given.weight), every_other(given.bias)
    got = norm.norm_again(again._replace(weight=weight, bias=bias))
    torch.testing.assert_close(got, reference.norm_again(again._replace(weight=given.weight, bias=given.bias)))


@of_shapes((5, 64), (5, 192), (3, 192, "wide"))
def test_results_are_rounded_to_8_bits_beside_codes(shape):
    given, factors = inputs(*shape, torch.float32), torch.rand(shape[1])
    rows, rounding = int8.rounding(given.x, turned=True)
    got = norm.norm_forward(forward(given, LAYER_NORM, PROLOGUES["none"], want_codes=True), rounding)
    for part, right in zip(rows, int8.quantise(got.y, turned=True), strict=True):
        assert torch.equal(part, right)
    rows, rounding = int8.rounding(given.dy, factors)
    dx = norm.norm_backward(backward(given, got, LAYER_NORM, (True, True, True)), rounding).dx
    for part, right in zip(rows, int8.quantise(dx, factors), strict=True):
        assert torch.equal(part, right)


def test_two_runs_give_the_same_bits():
    given, prologue = inputs(300, 48, torch.float32), Prologue()
    kept = norm.norm_forward(forward(given, LAYER_NORM, prologue, want_codes=True))
    first, second = (norm.norm_backward(backward(given, kept, LAYER_NORM, (True, True, True))) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one is other is None or torch.equal(one, other)
