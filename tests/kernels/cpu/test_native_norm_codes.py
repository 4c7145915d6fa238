"""The compiled norms that keep x_hat in 8 bits against the definition.

Bounds. Results other than codes have the bits of the kernels without codes. A decoded number is off by half a step of
its group, and by float32's error of x_hat, which `test_native_norm` bounds: a few units of the row's largest magnitude,
before the mean was subtracted. Gradients from codes are those of the decoded rows, within the bounds of that file.
"""

import itertools
import math

import pytest
import torch

from fastln_kernels import reference
from fastln_kernels.cpu import library, native_norm
from fastln_kernels.reference import NormAgain, NormBackward, NormForward, NormKind

pytestmark = pytest.mark.skipif(library.why_not("norm") is not None, reason=f"{library.why_not('norm')}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = 0.5 + 2**-15
U = 2.0**-24
SEED = torch.tensor([0x123456789ABCDEF])
KINDS = {
    "layer": NormKind(1e-5),
    "rms": NormKind(1e-6, centre=False),
    "gemma": NormKind(1e-6, centre=False, offset=1.0),
    "llama": NormKind(1e-6, centre=False, round_normed=True),
}
NEEDS = ("need_dx", "need_dresidual", "need_dweight", "need_dbias")
SUBSETS = [dict(zip(NEEDS, wanted, strict=True)) for wanted in itertools.product((False, True), repeat=4)]
EVERYTHING = SUBSETS[-1]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def storage(dtype):
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / (2 * math.sqrt(3))


def assert_close(got, want, bound, scale):
    def size(t):
        return t.double().square().mean().sqrt().item()

    assert got.shape == want.shape
    assert got.is_contiguous()
    assert size(got.double() - want) <= bound * (1 + 2 / math.sqrt(got.numel())) * size(scale)


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def awkward(n_rows, n_cols, dtype, seed=0):
    """Rows of which some have an outlier, are constant, zero, or far from zero."""
    x = normal(n_rows, n_cols, seed=seed)
    if n_rows > 4:
        x[1, 0], x[2], x[3] = 1e4, 3.0, 0.0
        x[4] += 100
    # NaN between the rows: what is read beyond them shows.
    return torch.cat((x, torch.full((n_rows, 3), math.nan)), 1).to(dtype)[:, :n_cols]


def steps(made):
    """Return the step of each code, `(n_rows, n_cols)`."""
    return made.scale.double().repeat_interleave(64, 1)[:, : made.normed.shape[1]]


def decoded(made):
    return made.normed.double() * steps(made)


def check_forward(request):
    """Return the results with codes, after a look at each."""
    plain = native_norm.norm_forward(request)
    made = native_norm.norm_forward(request._replace(want_codes=True))
    assert made.normed.dtype == torch.int8
    assert made.normed.is_contiguous()
    n_rows, n_cols = request.x.shape
    assert made.scale.shape == (n_rows, -(-n_cols // 64))
    for name in ("y", "stream", "rstd"):
        if getattr(plain, name) is not None:
            assert_same(getattr(made, name), getattr(plain, name))
    stream = request.x.double() if made.stream is None else made.stream.double()
    want = reference.norm_forward(NormForward(stream, None, None, request.kind, want_normed=True))
    lost = 8 * U * ((stream.abs().amax(1) if stream.shape[1] else 0) * want.rstd + 1)
    step = steps(made)
    if made.stream is not None or not (request.dropout or request.residual is not None):
        assert ((decoded(made) - want.normed).abs() <= step * HALF + lost[:, None]).all()
        # A code differs from the definition's only where x_hat is nearly half way between two.
        codes, _ = reference.encode_groups(want.normed, 8)
        differs = (made.normed != codes) & (step > 0)
        where = want.normed / step
        assert (((where - where.floor() - 0.5).abs() <= lost[:, None] / step + 2**-15)[differs]).all()
    assert (made.normed.int().abs() <= 127).all()
    for group, codes in enumerate(made.normed.int().split(64, 1)):
        assert ((codes.abs().amax(1) == 127) | (made.scale[:, group] == 0)).all()
    return made


def check_backward(made, dy, weight, kind, subset, dtype, **others):
    rows = decoded(made)
    needed = subset["need_dx"] or subset["need_dresidual"] or subset["need_dweight"]
    given = NormBackward(
        dy, made.normed if needed else None, weight, made.rstd if needed else None, kind, True, **others, **subset
    )
    got = native_norm.norm_backward(given._replace(scale=made.scale if needed else None))
    exact = {name: value.double() for name, value in others.items() if name == "dstream" and value is not None}
    want = reference.norm_backward(
        given._replace(
            dy=dy.double(),
            saved=rows,
            weight=None if weight is None else weight.double(),
            rstd=made.rstd.double(),
            grad_dtype=torch.float64,
            **exact,
        )
    )
    gain = torch.ones(rows.shape[1]) if weight is None else weight.double() + kind.offset
    terms = made.rstd.double()[:, None] * (dy.double() * gain).abs() * (1 + rows.abs())
    terms = terms + exact.get("dstream", torch.zeros(1)).abs()
    size = math.sqrt(max(len(rows), 2))
    scales = {
        "dx": 2 * terms,
        "dresidual": terms,
        "dweight": (dy.double() * rows).square().sum(0).sqrt() * size,
        "dbias": dy.double().square().sum(0).sqrt() * size,
    }
    for name, scale in scales.items():
        gradient = getattr(got, name)
        assert (gradient is None) == (getattr(want, name) is None)
        if gradient is not None:
            bound = 4 * U + (storage(dtype) if name in ("dx", "dresidual") else kind.round_normed * storage(dtype))
            assert_close(gradient, getattr(want, name), bound, scale)


def check_again(request, made, weight, bias, kind, dtype):
    given = NormAgain(made.normed, weight, bias, None, kind, True, made.scale, dtype)
    got = native_norm.norm_again(given)
    assert got.dtype == dtype
    # Twice rounded if kinds round x_hat, and a code times its scale is rounded before.
    eps = torch.finfo(dtype).eps
    rows = decoded(made).float()
    gain = torch.ones(rows.shape[1]) if weight is None else (weight.float() + kind.offset).abs()
    reach = (2 * eps + 4 * U) * (rows.abs() * gain + (0 if bias is None else bias.float().abs())) + 1e-7
    assert ((got.float() - reference.norm_again(given).float()).abs() <= reach).all()
    stream = request.x if made.stream is None else made.stream
    if made.stream is not None or (request.residual is None and not request.dropout):
        again = NormAgain(stream, weight, bias, made.rstd, kind, False, None, dtype)
        assert_same(native_norm.norm_again(again), made.y)
    kept = native_norm.norm_forward(request._replace(want_codes=False, want_normed=True)).normed
    again = NormAgain(kept, weight, bias, None, kind, True, None, dtype)
    assert ((native_norm.norm_again(again).float() - reference.norm_again(again).float()).abs() <= reach * 2).all()
    if kind.round_normed:
        assert_same(native_norm.norm_again(again), made.y)


def check(n_rows, n_cols, dtype, kind, prologue=(False, 0.0, False), subsets=(EVERYTHING,), parameters=None):
    x, residual, dy, dstream = (awkward(n_rows, n_cols, dtype, seed) for seed in range(4))
    weight, bias = parameters or (normal(n_cols, seed=5), normal(n_cols, seed=6))
    has_residual, dropout, want_stream = prologue
    flags = {"dropout": dropout, "seed": SEED}
    residual = residual if has_residual else None
    request = NormForward(x, weight, bias, kind, residual, want_stream=want_stream, **flags)
    made = check_forward(request)
    check_again(request, made, weight, bias, kind, dtype)
    for subset in subsets:
        check_backward(made, dy, weight, kind, subset, dtype, dstream=dstream if want_stream else None, **flags)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_matches_the_definition(kind, dtype):
    for prologue in ((False, 0.0, False), (True, 0.1, True), (True, 0.0, False)):
        check(33, 200, dtype, KINDS[kind], prologue)


def test_any_subset_of_gradients():
    check(9, 100, torch.bfloat16, KINDS["layer"], (True, 0.1, True), SUBSETS)
    check(9, 100, torch.float32, KINDS["rms"], subsets=SUBSETS, parameters=(None, None))


@pytest.mark.parametrize("n_cols", [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 768, 2049, 65536])
def test_widths(n_cols):
    for dtype, kind in ((torch.float32, "layer"), (torch.bfloat16, "llama")):
        check(5, n_cols, dtype, KINDS[kind], parameters=(normal(n_cols, seed=5), None))


def test_no_rows():
    x = torch.randn(0, 5)
    made = native_norm.norm_forward(NormForward(x, None, None, KINDS["layer"], want_codes=True))
    assert (made.normed.shape, made.scale.shape) == ((0, 5), (0, 1))
    given = NormBackward(x, made.normed, None, made.rstd, KINDS["layer"], True, scale=made.scale, **EVERYTHING)
    got = native_norm.norm_backward(given)
    assert got.dx.shape == (0, 5)
    assert not got.dweight.any()
    again = NormAgain(made.normed, None, None, None, KINDS["layer"], True, made.scale, torch.float32)
    assert native_norm.norm_again(again).shape == (0, 5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_row_with_a_number_that_is_none_stays_alone(value, kind):
    x = normal(6, 70)
    x[2, 69] = value
    kind, dy = KINDS[kind], normal(6, 70, seed=1)
    made = native_norm.norm_forward(NormForward(x, None, None, kind, want_codes=True))
    others = [0, 1, 3, 4, 5]
    # With a mean, or a NaN, all x_hat of the row are NaN; an Inf without a mean leaves 0 where it is not itself.
    bad = slice(64, 70) if not kind.centre and value == math.inf else slice(0, 70)
    assert made.scale[2, bad.start // 64 :].isnan().all()
    assert not made.scale[others].isnan().any()
    assert not made.normed[2].any()
    given = NormBackward(
        dy, made.normed, None, made.rstd, kind, True, scale=made.scale, need_dx=True, need_dweight=True
    )
    got = native_norm.norm_backward(given)
    assert got.dx[2].isnan().all()
    assert got.dweight.isnan().equal(torch.arange(70) >= bad.start)
    assert got.dx[others].isfinite().all()
    y = native_norm.norm_again(NormAgain(made.normed, None, None, None, kind, True, made.scale, x.dtype))
    assert y[2].isnan().equal(torch.arange(70) >= bad.start)
    assert y[others].isfinite().all()


def test_any_strides():
    x, kind = normal(7, 65), KINDS["layer"]
    made = native_norm.norm_forward(NormForward(x.t().contiguous().t(), None, None, kind, want_codes=True))
    want = native_norm.norm_forward(NormForward(x, None, None, kind, want_codes=True))
    assert_same(made.normed, want.normed)
    around = torch.full((7, 80), 99, dtype=torch.int8)
    around[:, :65] = made.normed
    for codes in (around[:, :65], made.normed.t().contiguous().t()):
        given = NormBackward(x, codes, None, made.rstd, kind, True, scale=made.scale, need_dx=True)
        assert_same(
            native_norm.norm_backward(given).dx, native_norm.norm_backward(given._replace(saved=made.normed)).dx
        )
        again = NormAgain(codes, None, None, None, kind, True, made.scale, x.dtype)
        assert_same(native_norm.norm_again(again), native_norm.norm_again(again._replace(saved=made.normed)))


def test_threads_and_repetitions_give_the_same_bits():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found = []
            for dtype, n_cols in itertools.product((torch.float32, torch.bfloat16), (70, 1025)):
                x, weight = normal(301, n_cols, dtype=dtype), normal(n_cols, seed=5)
                made = native_norm.norm_forward(NormForward(x, weight, None, KINDS["layer"], want_codes=True))
                given = NormBackward(x, made.normed, weight, made.rstd, KINDS["layer"], True, scale=made.scale)
                given = given._replace(need_dx=True, need_dweight=True, need_dbias=True)
                again = NormAgain(made.normed, weight, None, None, KINDS["layer"], True, made.scale, dtype)
                found += [t for t in (*made, *native_norm.norm_backward(given)) if t is not None]
                found.append(native_norm.norm_again(again))
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same(got, want)
