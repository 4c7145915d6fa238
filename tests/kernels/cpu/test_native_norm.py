"""The compiled norm kernels against the definition in float64.

Bounds. Errors are root-mean-square, relative to that of the terms which the result is made of. With u = 2^-24, the
roundoff of float32, an element passes about 8 roundings that are independent of each other: sqrt(8 / 3) u, under 4 u;
so does a sum over rows, whose terms have random signs. Rounding to nearest in storage is uniform within half the
dtype's epsilon at mantissa 1: epsilon / (2 sqrt(3)). Results that are rounded twice may be off by both. Chance: the
root mean square of n errors has a deviation of 0.45 / sqrt(n) of itself; four of them are allowed, 1 + 2 / sqrt(n).
"""

import dataclasses
import itertools
import math

import pytest
import torch

from fastln_kernels import reference
from fastln_kernels.cpu import library, native_norm
from fastln_kernels.reference import NormBackward, NormForward, NormKind

pytestmark = pytest.mark.skipif(library.why_not("norm") is not None, reason=f"{library.why_not('norm')}")

U = 2.0**-24
SEED = torch.tensor([0x123456789ABCDEF])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER_NORM = NormKind(1e-5)
KINDS = {
    "layer": LAYER_NORM,
    "rms": NormKind(1e-6, centre=False),
    "gemma": NormKind(1e-6, centre=False, offset=1.0),
    "llama": NormKind(1e-6, centre=False, round_normed=True),
}
# residual, dropout, what is kept
PROLOGUES = {
    "none": (False, 0.0, "x"),
    "normed": (False, 0.0, "normed"),
    "pre-norm": (True, 0.1, "stream"),
    "post-norm": (True, 0.1, "normed"),
    "no dropout": (True, 0.0, "stream"),
    "no residual": (False, 0.5, "normed"),
    "nothing but a copy": (False, 0.0, "stream"),
}
NEEDS = ("need_dx", "need_dresidual", "need_dweight", "need_dbias")
SUBSETS = [dict(zip(NEEDS, wanted, strict=True)) for wanted in itertools.product((False, True), repeat=4)]
EVERYTHING = SUBSETS[-1]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fenced(t):
    """The same values with NaN between the rows: what is read beyond them shows."""
    around = torch.full((t.shape[0], t.shape[1] + 3), math.nan, dtype=t.dtype)
    around[:, : t.shape[1]] = t
    return around[:, : t.shape[1]]


def rows(n_rows, n_cols, dtype):
    return [fenced(normal(n_rows, n_cols, dtype=dtype, seed=seed)) for seed in range(4)]


def storage(dtype):
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / (2 * math.sqrt(3))


def assert_close(got, want, bound, scale):
    def size(t):
        return t.double().square().mean().sqrt().item()

    assert got.shape == want.shape
    assert got.is_contiguous()
    if got.numel():
        assert size(got.double() - want) <= bound * (1 + 2 / math.sqrt(got.numel())) * size(scale)


def double(t):
    return None if t is None else t.double()


def check(n_rows, n_cols, dtype, kind=LAYER_NORM, prologue=PROLOGUES["none"], subsets=SUBSETS, parameters=None):
    x, residual, dy, dstream = rows(n_rows, n_cols, dtype)
    weight, bias = parameters or (normal(n_cols, seed=5), normal(n_cols, seed=6))
    has_residual, dropout, keep = prologue
    residual = residual if has_residual else None
    flags = {"dropout": dropout, "seed": SEED, "want_stream": keep == "stream", "want_normed": keep == "normed"}
    got = native_norm.norm_forward(NormForward(x, weight, bias, kind, residual=residual, **flags))
    want = reference.norm_forward(
        NormForward(x.double(), double(weight), double(bias), kind, residual=double(residual), **flags)
    )
    gain = torch.ones(n_cols) if weight is None else weight.double() + kind.offset
    shift = torch.zeros(n_cols) if bias is None else bias.double()
    # A rounded sum is off by a share of itself, which counts against the row's deviation.
    lost = (want.stream.abs() if keep == "stream" else x.double().abs() + 3) * want.rstd[:, None]
    twice = 1 + (kind.round_normed or keep == "stream")
    bound = 4 * U + twice * storage(dtype)
    assert got.y.dtype == dtype
    assert_close(got.y, want.y, bound, want.y.abs() + lost * gain.abs() + shift.abs())
    for name in ("stream", "normed"):
        result = getattr(got, name)
        assert (result is None) == (keep != name)
        if result is not None:
            assert_close(result, getattr(want, name), 4 * U + storage(dtype), getattr(want, name).abs() + lost)

    kept = {"x": x, "stream": got.stream, "normed": got.normed}[keep]
    rstd = got.rstd.double()
    if keep != "normed":
        rstd = reference.norm_forward(NormForward(kept.double(), None, None, kind)).rstd
        assert_close(got.rstd, rstd, 4 * U, rstd)
    dstream = dstream if keep == "stream" else None
    flags = {"dropout": dropout, "seed": SEED, "saved_is_normed": keep == "normed"}
    terms = rstd[:, None] * (dy.double() * gain).abs() + (0 if dstream is None else dstream.double().abs())
    scaled = terms * reference.dropout_keep(n_rows, n_cols, dropout, SEED) * reference.dropout_scale(dropout)
    x_hat = reference.norm_forward(NormForward(kept.double(), None, None, kind, want_normed=True)).normed
    scales = {
        "dx": scaled,
        "dresidual": terms,
        "dweight": (dy.double() * x_hat).square().sum(0).sqrt() * math.sqrt(max(n_rows, 2)),
        "dbias": dy.double().square().sum(0).sqrt() * math.sqrt(max(n_rows, 2)),
    }
    for subset in subsets:
        needed = subset["need_dx"] or subset["need_dresidual"] or subset["need_dweight"]
        given = (dy, kept if needed else None, weight, got.rstd if needed else None, kind)
        exact = (dy.double(), kept.double(), double(weight), rstd, kind)
        result = native_norm.norm_backward(NormBackward(*given, dstream=dstream, **flags, **subset))
        right = reference.norm_backward(
            NormBackward(*exact, dstream=double(dstream), **flags, **subset, grad_dtype=torch.float64)
        )
        for name, scale in scales.items():
            gradient = getattr(result, name)
            assert (gradient is not None) == subset[f"need_{name}"]
            if gradient is not None:
                is_sum = name in ("dweight", "dbias")
                rounding = storage(dtype) if not is_sum or (name == "dweight" and kind.round_normed) else 0
                assert gradient.dtype == (torch.float32 if is_sum else dtype)
                assert_close(gradient, getattr(right, name), 4 * U + rounding, scale)


@pytest.mark.parametrize("n_rows", [0, 1, 5])
@pytest.mark.parametrize("n_cols", [1, 17, 64, 1000, 1152, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, n_cols, n_rows):
    check(n_rows, n_cols, dtype)


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kinds_prologues_and_subsets(dtype, kind, prologue):
    check(70, 90, dtype, KINDS[kind], PROLOGUES[prologue])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_rows(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(400, 768, dtype, prologue=PROLOGUES["pre-norm"], subsets=[EVERYTHING])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("parameter_dtype", [None, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["layer", "gemma"])
def test_parameters_of_any_dtype_or_none(kind, parameter_dtype):
    parameters = (None, None) if parameter_dtype is None else (normal(50, 2, dtype=parameter_dtype)[:, 0],) * 2
    check(6, 50, torch.bfloat16, KINDS[kind], parameters=parameters)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_parameters_in_the_dtype_that_is_asked_for(grad_dtype):
    x, _, dy, _ = rows(40, 33, torch.bfloat16)
    rstd = native_norm.norm_forward(NormForward(x, None, None, LAYER_NORM)).rstd
    given = (dy, x, None, rstd, LAYER_NORM)
    wanted = {"need_dweight": True, "need_dbias": True}
    got = native_norm.norm_backward(NormBackward(*given, **wanted, grad_dtype=grad_dtype))
    want = native_norm.norm_backward(NormBackward(*given, **wanted))
    assert torch.equal(got.dweight, want.dweight.to(grad_dtype))
    assert torch.equal(got.dbias, want.dbias.to(grad_dtype))


@pytest.mark.parametrize("layout", ["transposed", "every other column", "one row", "one number"])
def test_any_strides(layout):
    x, residual, dy, _ = (t.contiguous() for t in rows(9, 40, torch.float32))
    strided = {
        "transposed": lambda t: t.T.contiguous().T,
        "every other column": lambda t: torch.stack((t, torch.full_like(t, math.nan)), -1)[..., 0],
        "one row": lambda t: t[:1].expand(9, 40),
        "one number": lambda t: t[:1, :1].expand(9, 40),
    }[layout]
    runs = []
    for values in ([strided(t) for t in (x, residual, dy)], [strided(t).contiguous() for t in (x, residual, dy)]):
        forward = native_norm.norm_forward(
            NormForward(values[0], None, None, LAYER_NORM, residual=values[1], want_stream=True)
        )
        backward = native_norm.norm_backward(
            NormBackward(values[2], values[0], None, forward.rstd, LAYER_NORM, **EVERYTHING)
        )
        runs.append((*forward, *backward))
    for one, other in zip(*runs, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (65, 1152), (500, 200), (1031, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_threads(dtype, shape):
    x, residual, dy, dstream = rows(*shape, dtype)
    runs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            flags = {"dropout": 0.1, "seed": SEED}
            forward = native_norm.norm_forward(
                NormForward(x, None, None, LAYER_NORM, residual=residual, want_stream=True, **flags)
            )
            given = (dy, forward.stream, None, forward.rstd, LAYER_NORM)
            runs.append(
                (*forward, *native_norm.norm_backward(NormBackward(*given, dstream=dstream, **flags, **EVERYTHING)))
            )
    finally:
        torch.set_num_threads(before)
    for tensors in zip(*runs, strict=True):
        assert all(t is tensors[0] is None or torch.equal(t, tensors[0]) for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", [1, 5, 64, 200])
@pytest.mark.parametrize("dropout", [2.0**-16, 0.1, 0.5, 0.99999])
def test_dropout_drops_what_the_definition_does_forward_and_backward(dropout, n_cols, dtype):
    x, seed = torch.ones(37, n_cols, dtype=dtype), torch.tensor([-(2**63) + 12345])
    keep = reference.dropout_keep(37, n_cols, dropout, seed)
    flags = {"dropout": dropout, "seed": seed}
    got = native_norm.norm_forward(NormForward(x, None, None, LAYER_NORM, want_stream=True, **flags))
    assert torch.equal(got.stream, (keep * torch.tensor(reference.dropout_scale(dropout))).to(dtype))
    given = (torch.zeros_like(x), x, None, got.rstd, LAYER_NORM)
    result = native_norm.norm_backward(NormBackward(*given, dstream=x, **flags, need_dx=True, need_dresidual=True))
    assert torch.equal(result.dx, got.stream)
    assert torch.equal(result.dresidual, x)


def check_float32_rows(x, bound):
    dy, wanted = normal(*x.shape, seed=1), {"need_dx": True, "need_dweight": True}
    got = native_norm.norm_forward(NormForward(x, None, None, LAYER_NORM))
    want = reference.norm_forward(NormForward(x.double(), None, None, LAYER_NORM))
    assert_close(got.y, want.y, bound, want.y)
    result = native_norm.norm_backward(NormBackward(dy, x, None, got.rstd, LAYER_NORM, **wanted))
    exact = (dy.double(), x.double(), None, want.rstd, LAYER_NORM)
    right = reference.norm_backward(NormBackward(*exact, **wanted, grad_dtype=torch.float64))
    assert_close(result.dx, right.dx, bound, right.dx)
    assert_close(result.dweight, right.dweight, bound, right.dweight)


def test_mean_1e4_with_deviation_1_is_right_to_1e_minus_5():
    check_float32_rows(normal(9, 768) + 1e4, 1e-5)


def test_first_columns_far_from_the_mean():
    """Sums about their mean, which is 32 deviations off, would lose three digits."""
    x = normal(2, 65536)
    x[:, :64] += 1e4
    check_float32_rows(x, 16 * U)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, 3e-40])
def test_constant_rows(value, kind):
    x, bias = torch.full((6, 100), value), normal(100)
    kind = dataclasses.replace(KINDS[kind], eps=1e-12)
    got = native_norm.norm_forward(NormForward(x, None, bias, kind))
    torch.testing.assert_close(got.y, reference.norm_forward(NormForward(x, None, bias, kind)).y)
    assert (
        native_norm.norm_backward(NormBackward(normal(6, 100), x, None, got.rstd, kind, need_dx=True))
        .dx.isfinite()
        .all()
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_shows_and_does_not_leak(dtype, kind, bad):
    x, residual, dy, _ = (t.contiguous() for t in rows(9, 70, dtype))
    others = [row for row in range(9) if row != 5]

    def run(kernels=native_norm):
        got = kernels.norm_forward(NormForward(x, None, None, KINDS[kind], residual=residual, want_stream=True))
        rstd = kernels.norm_forward(NormForward(x, None, None, KINDS[kind])).rstd
        return got.y, got.stream, kernels.norm_backward(NormBackward(dy, x, None, rstd, KINDS[kind], need_dx=True)).dx

    clean = run()
    x[5, 3] = bad
    for tensor, clean_tensor, right in zip(run(), clean, run(reference), strict=True):
        assert torch.equal(tensor[5].isnan(), right[5].isnan())
        assert not tensor[5].isfinite().all()
        assert torch.equal(tensor[others], clean_tensor[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_widens_and_rounds_as_torch_does(dtype):
    """Through the stream: x itself, then x plus the least that may matter to rounding."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)  # what units for bfloat16 take for 0
    got = native_norm.norm_forward(NormForward(x, None, None, LAYER_NORM, residual=x, want_stream=True)).stream
    assert torch.equal(got.nan_to_num(1.0), (x.float() + x.float()).to(dtype).nan_to_num(1.0))
    assert torch.equal(got.isnan(), x.isnan())
    other = x.roll(1, 0)
    got = native_norm.norm_forward(NormForward(x, None, None, LAYER_NORM, residual=other, want_stream=True)).stream
    want = (x.float() + other.float()).to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(
        torch.where(want.abs() < torch.finfo(dtype).tiny, 0, got).nan_to_num(1.0),
        torch.where(want.abs() < torch.finfo(dtype).tiny, 0, want).nan_to_num(1.0),
    )


def test_results_lie_on_the_cpu_whatever_the_default_device():
    x, weight = torch.randn(5, 64), torch.randn(64)
    forward = NormForward(x, weight, None, LAYER_NORM)
    made = native_norm.norm_forward(forward)
    backward = NormBackward(x, x, weight, made.rstd, LAYER_NORM, need_dx=True, need_dweight=True, need_dbias=True)
    want = [made.y, made.rstd, *native_norm.norm_backward(backward)]
    with torch.device("meta"):
        made = native_norm.norm_forward(forward)
        got = [made.y, made.rstd, *native_norm.norm_backward(backward)]
    for tensor, right in zip(got, want, strict=True):
        assert tensor is right is None or torch.equal(tensor, right)
