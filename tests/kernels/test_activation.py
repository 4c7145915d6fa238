"""The activation kernels, interpreted, against the definition in float64; and the definition against torch.

Bounds. Errors are root-mean-square. `norm_bounds` derives what storage and chance allow and u, float32's roundoff, the
unit of what the arithmetic does. An element passes a chain of about 10 roundings (the argument of the exponential, the
exponential, the quotient, the products): sqrt(10 / 3) u, under 4 u. They are errors of what multiplies `x`, from 0 to
1, and so relative to the terms, not to what is left of them: `|x|` (times `|up|`), and for dx `|dy| (1 + |x| bell)`.
"""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norm_bounds import DTYPES, LAYOUTS, ROUNDOFF, fenced, storage_bound

from fastln_kernels import activation, launch
from fastln_kernels import reference_activation as reference
from fastln_kernels.reference_activation import ACTIVATION_KINDS, GatedGradients

pytestmark = pytest.mark.usefixtures("guarded_buffers")

SUBSETS = [(True, True), (True, False), (False, True)]
BLOCK = launch.elementwise_block(4).cols
STOCK = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
}


def normal(*shape, dtype=torch.float32, seed=0):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_close(got, want, dtype, terms):
    """Hold the error against what storage in `dtype` costs and what the arithmetic does to the terms."""

    def size(t):
        return t.double().square().mean().sqrt().item()

    assert got.dtype == dtype
    assert got.shape == want.shape
    if got.numel():
        chance = 1 + 2 / math.sqrt(got.flatten()[:4096].unique().numel())
        assert size(got.double() - want) <= chance * (4 * ROUNDOFF * size(terms) + storage_bound(dtype) * size(want))


def check_plain(x, dy, kind):
    dtype, exact, exact_dy = x.dtype, x.double(), dy.double()
    y = activation.activation_forward(x, kind)
    assert y.is_contiguous()
    assert_close(y, reference.activation_forward(exact, kind), dtype, exact)
    want = reference.activation_backward(exact_dy, exact, kind)
    for saved in (x, y) if kind == "relu" else (x,):
        dx = activation.activation_backward(dy, saved, kind)
        assert dx.is_contiguous()
        assert_close(dx, want, dtype, exact_dy * (1 + exact.abs() * torch.exp(-exact.square() / 2)))


def check_gated(gate, up, dy, kind, subsets=SUBSETS):
    dtype, exact, exact_up, exact_dy = gate.dtype, gate.double(), up.double(), dy.double()
    y = activation.gated_forward(gate, up, kind)
    assert y.is_contiguous()
    assert_close(y, reference.gated_forward(exact, exact_up, kind), dtype, exact * exact_up)
    terms = exact_dy * exact_up * (1 + exact.abs() * torch.exp(-exact.square() / 2)), exact_dy * exact
    for need_dgate, need_dup in subsets:
        flags = {"need_dgate": need_dgate, "need_dup": need_dup}
        got = activation.gated_backward(dy, gate, up if need_dgate else None, kind, **flags)
        want = reference.gated_backward(exact_dy, exact, exact_up, kind, **flags)
        for gradient, right, of, need in zip(got, want, terms, (need_dgate, need_dup), strict=True):
            assert (gradient is not None) == need
            if gradient is not None:
                assert_close(gradient, right, dtype, of)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_every_kind_matches_the_definition(kind, dtype):
    x, up, dy = (normal(7, 384, dtype=dtype, seed=seed) for seed in range(3))
    check_plain(x, dy, kind)
    check_gated(x, up, dy, kind)


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 0), (0, 5), (1,), (1, 1), (3, 1), (7,), (2, 3, 5), (BLOCK - 1,), (BLOCK,), (2, BLOCK + 4)],
    ids=str,
)
def test_shapes(shape):
    x, up, dy = (normal(*shape, seed=seed) for seed in range(3))
    check_plain(x, dy, "silu")
    check_gated(x, up, dy, "gelu")


@pytest.mark.parametrize("layouts", [*zip(LAYOUTS, LAYOUTS, strict=True), ("contiguous", "row stride")], ids=str)
@pytest.mark.parametrize("n_cols", [5, 32])
def test_layouts(n_cols, layouts):
    one, other = (LAYOUTS[name] for name in layouts)
    for dtype in (torch.float32, torch.bfloat16):
        x, up, dy = (normal(6, n_cols, dtype=dtype, seed=seed) for seed in range(3))
        check_plain(one(x), other(dy), "silu")
        check_gated(one(x), other(up), one(dy), "silu")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_rows=st.integers(0, 9),
    n_cols=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(ACTIVATION_KINDS),
    layouts=st.tuples(*(st.sampled_from(["row stride", "contiguous", "transposed"]) for _ in range(3))),
    seed=st.integers(0, 99),
)
def test_any_shape_layout_and_kind(n_rows, n_cols, dtype, kind, layouts, seed):
    tensors = (normal(n_rows, n_cols, dtype=dtype, seed=seed + i) for i in range(3))
    x, up, dy = (LAYOUTS[name](t) for name, t in zip(layouts, tensors, strict=True))
    check_plain(x, dy, kind)
    check_gated(x, up, dy, kind)


@pytest.mark.parametrize("kernels", [activation, reference], ids=["triton", "reference"])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 7), (1, 9)], ids=str)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_gradients_written_to_the_halves_of_one_tensor(shape, subset, kernels):
    n_cols = shape[-1]
    gate, up = normal(*shape[:-1], 2 * n_cols).chunk(2, -1)
    dy = normal(*shape, seed=1)
    joined = torch.full((*shape[:-1], 2 * n_cols), math.nan)
    flags = {"need_dgate": subset[0], "need_dup": subset[1]}
    out = GatedGradients(*joined.chunk(2, -1))
    kernels.gated_backward(dy, gate, up, "gelu_tanh", out=out, **flags)
    want = reference.gated_backward(dy, gate, up, "gelu_tanh", **flags)
    for gradient, right in zip(out, want, strict=True):
        if right is None:
            assert gradient.isnan().all()
        else:
            torch.testing.assert_close(gradient, right)


def test_rows_beyond_the_reach_of_32_bits(tmp_path):
    stride, n_cols = 2**30, 16
    # A sparse file: 8 GB of addresses, a few pages of disk.
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + n_cols, dtype=torch.bfloat16)
    far = flat.as_strided((4, n_cols), (stride, 1))
    near, dy = normal(4, n_cols, dtype=torch.bfloat16), normal(4, n_cols, dtype=torch.bfloat16, seed=1)
    far.copy_(near)
    check_plain(far, dy, "silu")
    check_gated(fenced(near), far, dy, "silu")


@pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value encountered"
)  # the interpreter's numpy
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_extremes_are_the_limits_and_what_is_bad_shows(kind):
    finite = [1e-45, 1e-40, 1.0, 6.0, 20.0, 90.0, 1e4, 1e13, 1e20, 3e38]
    x = torch.tensor([0.0, *finite, *(-value for value in finite), math.inf, -math.inf, math.nan])
    ones = torch.ones_like(x)
    y, dx = activation.activation_forward(x, kind), activation.activation_backward(ones, x, kind)
    want = reference.activation_forward(x.double(), kind), reference.activation_backward(ones, x.double(), kind)
    for got, right in zip((y, dx), want, strict=True):
        # exp(z) is off by |z| u of itself while |z| < 88, then 0, where x exp(z) < 1e-36; gelu's fit adds 2.8e-4.
        tail = 3e-4 if kind == "gelu" else 1e-5
        torch.testing.assert_close(got, right.float(), rtol=tail, atol=1e-36, equal_nan=True)
    denormal = torch.tensor([1e-40, -1e-40])
    torch.testing.assert_close(
        activation.activation_forward(denormal, kind), reference.activation_forward(denormal, kind), rtol=1e-4, atol=0
    )
    assert y[-1].isnan()
    assert dx[-1].isnan() or kind == "relu"
    assert y[-3] == math.inf


def test_a_nan_or_an_infinite_gradient_passes_relu_where_the_slope_is_one():
    x, dy = torch.tensor([-1.0, 0.0, 1.0, math.nan]), torch.full((4,), math.inf)
    for kernels in (activation, reference):
        assert kernels.activation_backward(dy, x, "relu").tolist() == [0, 0, math.inf, math.inf]


def test_the_normal_distribution_function_is_fitted_as_it_says():
    def shares(x):
        got = activation.activation_forward(x, "gelu") / x
        return got.double(), 0.5 * torch.erfc(x.double() / -math.sqrt(2))

    # The means of many neighbours, in which roundings (2 u each) are lost, show the fit.
    neighbours = 200
    got, right = shares(torch.linspace(-4, 4, 100 * neighbours))
    error = (got - right).view(-1, neighbours).mean(1)
    assert error.abs().max() < 2.8e-8 + 4 * 2 * ROUNDOFF / math.sqrt(neighbours)
    x = torch.linspace(-12.5, -1, 5000)
    got, right = shares(x)
    assert ((got - right).abs() <= right * (2.8e-4 + (1 + x.double().square() / 2) * 4 * ROUNDOFF)).all()


@pytest.mark.parametrize(("numel", "vector"), [(64, 4), (63, 1), (65536 + 4, 4), (2, 1)])
def test_the_mask_is_said_to_be_the_same_for_a_vector_only_where_it_is(numel, vector, monkeypatch):
    noted = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: noted.append(options["VECTOR"])

    monkeypatch.setattr(activation, "forward_kernel", Kernel())
    activation.activation_forward(torch.zeros(numel), "relu")
    # What counts where rows are strided is the width.
    activation.activation_forward(fenced(torch.zeros(4, numel)), "relu")
    assert noted == [vector, vector]


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_the_definition_is_what_autograd_makes_of_torchs_activations(kind):
    gate, up, dy = (normal(7, 33, seed=seed).double() for seed in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    y = STOCK[kind](gate)
    (dx,) = torch.autograd.grad(y, gate, dy, retain_graph=True)
    dgate, dup = torch.autograd.grad(y * up, (gate, up), dy)
    torch.testing.assert_close(reference.activation_forward(gate.detach(), kind), y.detach())
    torch.testing.assert_close(reference.activation_backward(dy, gate.detach(), kind), dx)
    torch.testing.assert_close(reference.gated_forward(gate.detach(), up.detach(), kind), (y * up).detach())
    flags = {"need_dgate": True, "need_dup": True}
    got = reference.gated_backward(dy, gate.detach(), up.detach(), kind, **flags)
    torch.testing.assert_close(tuple(got), (dgate, dup))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
@pytest.mark.parametrize("n_cols", [1, 2, 3, 17, 64, 1000, 1152, 3072, 11008])
def test_every_kind_shape_and_layout(n_cols, kind, dtype):
    layouts = ("row stride", "contiguous", "transposed")
    pairs = list(itertools.product(layouts, repeat=2))
    if n_cols > 64:  # interpreted, wide rows take long: each layout of the one with another of the other
        pairs = list(zip(layouts, layouts[1:] + layouts[:1], strict=True))
    for n_rows in (0, 1, 7):
        for one, other in pairs:
            x, up, dy = (normal(n_rows, n_cols, dtype=dtype, seed=seed) for seed in range(3))
            check_plain(LAYOUTS[one](x), LAYOUTS[other](dy), kind)
            check_gated(LAYOUTS[one](x), LAYOUTS[other](up), dy, kind)
