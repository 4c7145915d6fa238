"""The operation of 8-bit linear layers: its gradient formula, its ways to be called, and the rows that it remembers."""

import pytest
import torch

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops import rounded as at_hand
from fastln.ops.settings import REFERENCE
from fastln_kernels import reference_int8 as reference
from fastln_kernels.cpu import native_int8, products

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ["reference", *(["cpu"] if products.why_not("int8") is None else [])]


@pytest.fixture
def rounded(monkeypatch):
    """The shapes that the CPU's kernels rounded."""
    made = []
    stock = native_int8.quantise
    monkeypatch.setattr(
        native_int8, "quantise", lambda x, *args, **more: made.append(x.shape) or stock(x, *args, **more)
    )
    return made


def inputs(dtype=torch.float32, turned=False):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 128, dtype=dtype, requires_grad=True)
    return x, reference.quantise_weight(torch.randn(70, 128), turned=turned), torch.randn(70, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_the_definition_s(dtype, turned, backend):
    x, weight, bias = inputs(dtype, turned)
    settings = ops.OpSettings(backend)
    y = ops.int8_linear(x, weight, bias, settings=settings)
    rows = reference.quantise(x.detach().view(18, 128), turned=turned)
    want = reference.linear(rows, weight, bias, dtype).view(2, 9, 70)
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    torch.testing.assert_close(y, want, rtol=eps, atol=1e-5)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    rows = reference.quantise(dy.view(18, 70), weight.scale)
    torch.testing.assert_close(dx, reference.linear_backward(rows, weight, dtype).view_as(x), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_its_dtype_and_the_gradient_that_of_the_input(backend):
    x, weight, bias = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.int8_linear(x, weight, bias, settings=ops.OpSettings(backend))
    assert y.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_biases_may_have_any_strides(backend):
    x, weight, _ = inputs()
    bias = torch.randn(140)[::2]
    apart = weight._replace(values=weight.values.t().contiguous().t())
    settings = ops.OpSettings(backend)
    want = ops.int8_linear(x, weight, bias.clone(), settings=settings)
    got = ops.int8_linear(x, apart, bias, settings=settings)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_may_have_any_floating_dtype(dtype, backend):
    """The bias's dtype; x has each of the others in turn."""
    weight = reference.quantise_weight(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)))
    bias = (torch.arange(8) / 4).to(dtype)  # exact in all of them
    for x_dtype in DTYPES if backend != "triton" else DTYPES[:1]:  # bfloat16 is wrong under the interpreter
        x = torch.randn(3, 128, dtype=x_dtype)
        y = ops.int8_linear(x, weight, bias, settings=ops.OpSettings(backend))
        want = reference.linear(reference.quantise(x), weight, bias, x_dtype)
        assert y.dtype == x_dtype
        eps = torch.finfo(torch.float32 if x_dtype == torch.float64 else x_dtype).eps
        torch.testing.assert_close(y, want, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of_bias", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_trains_has_the_sum_of_the_rows(dtype, of_bias, backend, rounded):
    x, weight, bias = inputs(dtype)
    settings, bias = ops.OpSettings(backend), bias.to(of_bias)
    y = ops.int8_linear(x, weight, bias.requires_grad_(), settings=settings)
    assert torch.equal(y, ops.int8_linear(x, weight, bias.detach(), settings=settings))
    dy = torch.randn_like(y)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert torch.equal(dx, torch.autograd.grad(ops.int8_linear(x, weight, settings=settings), x, dy)[0])
    assert dbias.dtype == of_bias
    want = dy.double().sum((0, 1))
    eps = torch.finfo(torch.float32 if of_bias == torch.float64 else of_bias).eps
    assert (dbias - want).norm() <= eps * want.norm()  # summed in float32, rounded once
    rounded.clear()
    torch.autograd.grad(ops.int8_linear(x.detach(), weight, bias, settings=settings), bias, dy)
    assert (18, 70) not in rounded  # nobody asked for dx


@pytest.mark.parametrize(
    "bias", [torch.ones(1), torch.ones(70, 1), torch.ones(70, dtype=torch.int64), torch.ones(70, device="meta")]
)
def test_a_bias_that_does_not_fit_is_refused(bias):
    x, weight, _ = inputs()
    with pytest.raises(FastLNError, match=r"^the bias must be \(70,\), of a floating dtype and on cpu, as x is; it is"):
        ops.int8_linear(x, weight, bias)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_second_term_takes_the_weight_s_error_out_of_the_result_alone(turned, backend, rounded):
    torch.manual_seed(0)
    x, settings = torch.randn(18, 128).round(decimals=1).requires_grad_(), ops.OpSettings(backend)
    with torch.no_grad():
        x.mul_(10)  # whole numbers, which a row that is not turned holds exactly
        x[:, 0] = 127
    whole = torch.randn(70, 128)
    weight = reference.quantise_weight(whole, turned=turned)
    rest = reference.quantise_weight(reference.left_over(whole, weight))._replace(turned=turned)
    plain = ops.int8_linear(x, weight, settings=settings)
    y = ops.int8_linear(x, weight, rest=rest, settings=settings)
    torch.testing.assert_close(y, plain + ops.int8_linear(x, rest, settings=settings))
    errors = [(z - x @ whole.t()).norm() for z in (y, plain)]
    assert errors[0] < errors[1] / (1.2 if turned else 100)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(z, x, dy)[0] for z in (y, plain)))
    if backend == "cpu":
        assert rounded == [(18, 128), (18, 70), (18, 70)]  # all products read one rounding of x


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_of_two_terms_is_rounded_once(backend):
    torch.manual_seed(0)
    x, whole, bias = torch.randn(18, 128, dtype=torch.bfloat16), torch.randn(70, 128), torch.randn(70)
    weight = reference.quantise_weight(whole)
    rest = reference.quantise_weight(reference.left_over(whole, weight))
    settings = ops.OpSettings(backend)
    y, wide = (ops.int8_linear(given, weight, bias, rest=rest, settings=settings) for given in (x, x.float()))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize("second", [torch.randn(71, 128), torch.randn(70, 64)])
def test_a_second_term_that_does_not_fit_is_refused(second):
    x, weight, _ = inputs()
    with pytest.raises(FastLNError, match=r"^the second term of a weight must have the first's shape"):
        ops.int8_linear(x, weight, rest=reference.quantise_weight(second))


def test_the_operator_is_the_function():
    x, weight, bias = inputs(torch.bfloat16, turned=True)
    settings = ops.OpSettings()
    rest = reference.quantise_weight(torch.randn(70, 128) / 300)._replace(turned=True)
    want = ops.int8_linear(x, weight, bias, rest=rest, settings=settings)
    (dwant,) = torch.autograd.grad(want.sum(), x)
    compiled = torch.compile(
        lambda x, bias: ops.int8_linear(x, weight, bias, rest=rest, settings=settings),
        backend="aot_eager",
        fullgraph=True,
    )
    y = compiled(x, bias.requires_grad_())
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert torch.equal(y, want)
    assert torch.equal(dx, dwant)
    assert torch.equal(dbias, torch.full_like(bias, 18))
    bias = bias.detach()
    parts = [(given.values, given.scale, given.row_sums, given.col_sums) for given in (weight, rest)]
    arguments = (x.detach(), *parts[0], bias, *parts[1], True, torch.bfloat16, *settings.flat)
    torch.library.opcheck(
        torch.ops.fastln.int8_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_what_has_no_derivative_says_so():
    x, weight, _ = inputs()
    y = ops.int8_linear(x, weight)
    with pytest.raises(FastLNError, match="differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(FastLNError, match="no derivatives by"):
        torch.func.grad(lambda x: ops.int8_linear(x, weight).sum())(x)
    with pytest.raises(FastLNError, match=r"x must be \(..., 128\)"):
        ops.int8_linear(x[..., :64], weight)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no 8-bit products here")
def test_rows_that_several_layers_read_are_rounded_once(rounded):
    x, weight, _ = inputs()
    first = ops.int8_linear(x, weight)
    assert torch.equal(ops.int8_linear(x, weight), first)
    assert len(rounded) == 1
    with torch.no_grad():
        x.mul_(2)
    assert torch.equal(ops.int8_linear(x, weight), 2 * first)  # written to: rounded again
    ops.int8_linear(x.detach(), weight)  # another tensor
    assert len(rounded) == 3


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no 8-bit products here")
def test_rows_are_forgotten_with_their_tensor():
    x, weight, _ = inputs()
    ops.int8_linear(x * 1, weight)
    assert not at_hand._at_hand.inputs
    ops.int8_linear(x, weight)
    assert at_hand._at_hand.inputs
    del x
    assert not at_hand._at_hand.inputs


def test_no_rows_and_numbers_at_their_ends():
    """All numbers at their ends, without rows, and without a bias."""
    weight = reference.quantise_weight(torch.full((4, 128), -3.0))
    for n_rows in (0, 1):
        y = ops.int8_linear(torch.full((n_rows, 128), 2.0), weight, settings=REFERENCE)
        torch.testing.assert_close(y, torch.full((n_rows, 4), -768.0))
