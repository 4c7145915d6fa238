"""The LayerNorm kernels, interpreted, against the definition in float64; and the definition against torch.

Bounds. Errors are root-mean-square, relative to the root mean square of the result; where the result is what is left of
terms that cancel, of the terms: for dx `rstd * dy * weight`; for a sum over rows what it would be were the terms' signs
random (the root of the sum of their squares), on top of its own size. With u = 2^-24, the roundoff of float32:

- arithmetic: an element passes a chain of about 8 roundings (the differences, three products, the sum, the row's own
  statistics), each uniform within u and independent of the others: sqrt(8 / 3) u, under 4 u;
- a sum over R rows in sequence: after k rows the running sum has grown to sqrt(k) terms and is rounded within u of
  that; the R errors together are sqrt(R / 2) u of the final sum for terms of random sign. 4 u for the terms themselves;
- storage: rounding to nearest is uniform within half the dtype's epsilon at mantissa 1: epsilon / (2 sqrt(3)). Triton's
  interpreter truncates to bfloat16 (the compiled code does not: `test_compiled.py`), which is uniform within the whole
  epsilon on one side: epsilon / sqrt(3).
"""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastln_kernels import launch, norm, reference

SUBSETS = [subset for subset in itertools.product((True, False), repeat=3) if any(subset)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = 2.0**-24
EPS = 1e-5
GUARD = 64


def storage_bound(dtype: torch.dtype) -> float:
    """What rounding a result to `dtype` costs at most."""
    if dtype == torch.float32:
        return 0.0
    return torch.finfo(dtype).eps / (math.sqrt(3) if dtype == torch.bfloat16 else 2 * math.sqrt(3))


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float, scale: torch.Tensor | None = None) -> None:
    def size(t: torch.Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    assert got.shape == want.shape
    if got.numel():
        assert size(got.double() - want) <= bound * size(want if scale is None else scale) + 1e-30


def fenced(t: torch.Tensor, gap: int = 16) -> torch.Tensor:
    """The same values with NaN before, after and between the rows: whatever is read beyond them shows."""
    n_rows, n_cols = t.shape
    around = torch.full((n_rows + 2, n_cols + gap), math.nan, dtype=t.dtype)
    inner = around[1:-1, :n_cols]
    inner.copy_(t)
    return inner


@pytest.fixture(autouse=True)
def _guarded_empty(monkeypatch):
    """Every tensor the launching functions allocate starts as NaN and lies between NaN bands that must survive."""
    with guarded_empty(monkeypatch):
        yield


@contextlib.contextmanager
def guarded_empty(monkeypatch):
    bands = []

    def empty(*shape, dtype, device):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        n = math.prod(shape)
        around = torch.full((n + 2 * GUARD,), math.nan, dtype=dtype, device=device)
        bands.extend((around[:GUARD], around[GUARD + n :]))
        return around[GUARD : GUARD + n].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(norm.torch, "empty", empty)
        yield
    assert all(band.isnan().all() for band in bands), "written outside of a buffer"


def inputs(n_rows, n_cols, dtype, parameter_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, dy = (fenced(normal(n_rows, n_cols).to(dtype)) for _ in range(2))
    weight, bias = (normal(n_cols).to(parameter_dtype) for _ in range(2))
    return x, dy, weight, bias


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check(x, dy, weight, bias, subsets, grad_dtype=torch.float32, eps=EPS):
    """Forward and the backwards of the wanted subsets against the definition in float64."""
    n_rows = x.shape[0]
    y, stats = norm.layer_norm_forward(x, weight, bias, eps)
    want_y, want_stats = reference.layer_norm_forward(*double(x, weight, bias), eps)
    assert y.dtype == x.dtype
    assert_close(y, want_y, 4 * ROUNDOFF + storage_bound(x.dtype))
    for subset in subsets:
        flags = dict(zip(("need_dx", "need_dweight", "need_dbias"), subset, strict=True))
        need_x = subset[0] or subset[1]
        got = norm.layer_norm_backward(
            dy,
            x if need_x else None,
            weight if subset[0] else None,
            stats if need_x else None,
            grad_dtype=grad_dtype,
            **flags,
        )
        want = reference.layer_norm_backward(*double(dy, x, weight), want_stats, grad_dtype=torch.float64, **flags)
        assert [grad is not None for grad in got] == list(subset)
        dx, dweight, dbias = got
        if dx is not None:
            assert dx.dtype == x.dtype
            terms = want_stats[2] * dy.double() * (1.0 if weight is None else weight.double())
            assert_close(dx, want[0], 4 * ROUNDOFF + storage_bound(x.dtype), scale=terms)
        sum_bound = (4 + math.sqrt(n_rows / 2)) * ROUNDOFF + storage_bound(grad_dtype)
        mean, residual, rstd = want_stats
        normed = (x.double() - mean - residual) * rstd
        for got_sum, want_sum, terms in ((dweight, want[1], dy.double() * normed), (dbias, want[2], dy.double())):
            if got_sum is not None:
                assert got_sum.dtype == grad_dtype
                assert_close(got_sum, want_sum, sum_bound, scale=terms.norm(dim=0) + want_sum.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_every_subset_matches_the_definition(subset, dtype):
    check(*inputs(7, 384, dtype), [subset])


@pytest.mark.parametrize(
    ("n_rows", "n_cols"),
    [(1, 1), (300, 1), (7, 2), (300, 3), (300, 17), (7, 64), (0, 768), (7, 768), (1, 1000), (7, 1152), (1, 4096)],
)
def test_shapes(n_rows, n_cols):
    check(*inputs(n_rows, n_cols, torch.float32), [(True, True, True), (False, True, True)])


@pytest.mark.parametrize("subset", [(True, True, True), (False, True, False)], ids=str)
def test_rows_too_wide_for_the_registers(subset):
    check(*inputs(3, launch.MAX_ROW_TILE + 808, torch.bfloat16), [subset])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [0, 1, 7, 300])
@pytest.mark.parametrize("n_cols", [1, 2, 3, 17, 64, 384, 768, 1000, 1152, 4096])
def test_every_shape_and_subset(n_cols, n_rows, dtype):
    check(*inputs(n_rows, n_cols, dtype), SUBSETS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_width_65536(dtype):
    check(*inputs(3, 65536, dtype), SUBSETS)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_weight_or_bias_and_in_the_dtype_of_x(has_weight, has_bias, parameter_dtype):
    x, dy, weight, bias = inputs(5, 96, torch.bfloat16, parameter_dtype)
    subset = (True, has_weight, has_bias)
    check(x, dy, weight if has_weight else None, bias if has_bias else None, [subset], grad_dtype=parameter_dtype)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_rows=st.integers(0, 40),
    n_cols=st.integers(2, 300),
    dtype=st.sampled_from(DTYPES),
    subset=st.sampled_from(SUBSETS),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_stride_and_subset(n_rows, n_cols, dtype, subset, transposed, seed):
    x, dy, weight, bias = inputs(n_rows, n_cols, dtype, seed=seed)
    if transposed:
        x = x.T.contiguous().T
    check(x, dy, weight, bias, [subset])


def test_expanded_rows():
    x, dy, weight, bias = inputs(6, 64, torch.float32)
    check(x[:1].expand(6, 64), dy[:1, :1].expand(6, 64), weight, bias, [(True, True, True)])


@pytest.mark.parametrize("n_cols", [64, launch.MAX_ROW_TILE + 8])
@pytest.mark.parametrize("strided", ["weight", "bias"])
def test_strided_weight_and_bias(strided, n_cols):
    x, dy, weight, bias = inputs(3, n_cols, torch.float32)
    views = {"weight": weight, "bias": bias}
    views[strided] = torch.stack((views[strided], torch.full((n_cols,), math.nan)), dim=1)[:, 0]
    check(x, dy, views["weight"], views["bias"], [(True, True, True)])


@pytest.mark.parametrize("n_cols", [768, launch.MAX_ROW_TILE + 1000])
@pytest.mark.parametrize("kernels", [norm, reference], ids=["triton", "reference"])
def test_mean_1e4_with_deviation_1_is_right_to_1e_minus_5(kernels, n_cols):
    x, dy, weight, bias = inputs(3, n_cols, torch.float32)
    x += 1e4
    y, stats = kernels.layer_norm_forward(x, weight, bias, EPS)
    want_y, want_stats = reference.layer_norm_forward(*double(x, weight, bias), EPS)
    assert_close(y, want_y, 1e-5)
    flags = {"need_dx": True, "need_dweight": True, "need_dbias": True}
    got = kernels.layer_norm_backward(dy, x, weight, stats, grad_dtype=torch.float32, **flags)
    want = reference.layer_norm_backward(*double(dy, x, weight), want_stats, grad_dtype=torch.float64, **flags)
    for got_grad, want_grad in zip(got, want, strict=True):
        assert_close(got_grad, want_grad, 1e-5)


def test_first_block_of_a_wide_row_far_from_the_rest():
    x, _, weight, bias = inputs(2, launch.MAX_ROW_TILE + 1000, torch.float32)
    x[:, : launch.row_tile(x.shape[1], 4, backward=False).cols] -= 1e4
    want, _ = reference.layer_norm_forward(*double(x, weight, bias), EPS)
    y, _ = norm.layer_norm_forward(x, weight, bias, EPS)
    assert_close(y, want, 1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, 3e-40])
def test_constant_rows(value):
    x = torch.full((3, 100), value)
    dy = torch.randn(3, 100)
    weight, bias = torch.randn(100), torch.randn(100)
    y, stats = norm.layer_norm_forward(x, weight, bias, 1e-12)
    torch.testing.assert_close(y, bias.expand(3, 100))
    dx, _, _ = norm.layer_norm_backward(
        dy, x, weight, stats, need_dx=True, need_dweight=False, need_dbias=False, grad_dtype=torch.float32
    )
    assert dx.isfinite().all()


def test_weight_zero():
    x, dy, weight, bias = inputs(7, 100, torch.float32)
    weight.zero_()
    check(x, dy, weight, bias, [(False, True, True)])
    y, stats = norm.layer_norm_forward(x, weight, bias, EPS)
    dx, _, _ = norm.layer_norm_backward(
        dy, x, weight, stats, need_dx=True, need_dweight=False, need_dbias=False, grad_dtype=torch.float32
    )
    assert torch.equal(y, bias.expand_as(y))
    assert torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy meets inf - inf
@pytest.mark.parametrize("n_cols", [100, launch.MAX_ROW_TILE + 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_shows_and_does_not_leak(bad, n_cols):
    x, dy, weight, bias = inputs(5, n_cols, torch.float32)
    clean, clean_stats = norm.layer_norm_forward(x, weight, bias, EPS)
    flags = {"need_dx": True, "need_dweight": False, "need_dbias": False, "grad_dtype": torch.float32}
    clean_dx, _, _ = norm.layer_norm_backward(dy, x, weight, clean_stats, **flags)
    x[2, 1] = bad
    y, stats = norm.layer_norm_forward(x, weight, bias, EPS)
    dx, _, _ = norm.layer_norm_backward(dy, x, weight, stats, **flags)
    others = [0, 1, 3, 4]
    assert y[2].isnan().any()
    assert dx[2].isnan().any()
    assert torch.equal(y[others], clean[others])
    assert torch.equal(dx[others], clean_dx[others])


@pytest.mark.parametrize("need_dx", [True, False])
def test_two_runs_give_the_same_bits(need_dx):
    x, dy, weight, bias = inputs(300, 48, torch.float32)
    _, stats = norm.layer_norm_forward(x, weight, bias, EPS)
    runs = [
        norm.layer_norm_backward(
            dy, x, weight, stats, need_dx=need_dx, need_dweight=True, need_dbias=True, grad_dtype=torch.float32
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert first is second is None or torch.equal(first, second)


def test_rows_beyond_the_reach_of_32_bits(tmp_path):
    stride, n_cols = 2**30, 16
    x, dy, weight, bias = inputs(4, n_cols, torch.bfloat16)
    # A sparse file: 8 GB of addresses, a few pages of disk.
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + n_cols, dtype=torch.bfloat16)
    far = flat.as_strided((4, n_cols), (stride, 1))
    far.copy_(x)
    check(far, dy, weight, bias, [(True, True, True), (False, True, True)])


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_definition_is_torchs_in_float64(has_weight, has_bias):
    x, dy, weight, bias = double(*inputs(7, 33, torch.float32))
    weight, bias = weight if has_weight else None, bias if has_bias else None
    leaves = [t.requires_grad_() for t in (x.clone(), weight, bias) if t is not None]
    want_y = torch.nn.functional.layer_norm(leaves[0], (33,), weight, bias, EPS)
    want = torch.autograd.grad(want_y, leaves, dy)
    with torch.no_grad():
        y, stats = reference.layer_norm_forward(x, weight, bias, EPS)
        flags = {"need_dx": True, "need_dweight": has_weight, "need_dbias": has_bias}
        got = reference.layer_norm_backward(dy, x, weight, stats, grad_dtype=torch.float64, **flags)
    torch.testing.assert_close(y, want_y.detach())
    for got_grad, want_grad in zip([g for g in got if g is not None], want, strict=True):
        torch.testing.assert_close(got_grad, want_grad)
