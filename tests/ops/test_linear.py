"""The linear layer with a frozen weight: torch's own results, and torch itself wherever there is no kernel."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import fastln
from fastln import ops
from fastln.ops import OpSettings
from fastln.standins.linear import Linear
from fastln_kernels import reference
from fastln_kernels.cpu import native_linear, products, units

WHY_NOT = products.why_not("linear")
needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran, which takes float32 rows here as if torch were slower."""
    monkeypatch.setattr(units, "linear_rates", lambda _: {"fastln": 2e11, "torch": 1e11})
    made = []
    stock = native_linear.linear
    monkeypatch.setattr(native_linear, "linear", lambda *args, **kwargs: made.append(1) or stock(*args, **kwargs))
    return made


def inputs(*shape, n_cols=48, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    return x, torch.randn(n_cols, shape[-1], dtype=dtype), torch.randn(n_cols, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("transpose", [True, False])
def test_values_and_gradients_are_torch_s(transpose, calls):
    x, weight, bias = inputs(3, 20, 64)
    stored = weight if transpose else weight.t().contiguous()
    y = ops.linear(x, stored, bias, transpose=transpose)
    want = functional.linear(x, weight, bias)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, x, dy, retain_graph=True)[0] for out in (y, want)), rtol=1e-5, atol=1e-5
    )
    assert len(calls) == 2
    y.detach().add_(1.0)  # no view of anything: may be written to


@needs_kernels
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(
    ("dtype", "of_bias"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_a_bias_that_trains_has_the_sum_of_the_rows(dtype, of_bias, transpose, calls):
    x, weight, bias = inputs(3, 500, 64)
    stored = (weight if transpose else weight.t().contiguous()).to(of_bias)
    bias = bias.to(of_bias).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != of_bias):
        y = ops.linear(x.to(dtype), stored, bias, transpose=transpose)
    dy = torch.randn_like(y)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert dbias.dtype == of_bias
    want = dy.double().sum((0, 1))
    # Summed in float32, by halves (a rounding for each of log2 levels), and rounded once.
    bound = torch.finfo(torch.float32).eps * math.log2(1500) ** 0.5 + torch.finfo(of_bias).eps / 2
    assert (dbias - want).norm() <= bound * want.norm()
    plain = ops.linear(x.to(y.dtype), stored.to(y.dtype), transpose=transpose)
    assert torch.equal(dx, torch.autograd.grad(plain, x, dy)[0])
    assert len(calls) == 4
    alone = ops.linear(x.detach().to(dtype), stored.to(dtype), bias.to(dtype), transpose=transpose)
    assert torch.autograd.grad(alone, bias, dy)[0].norm() > 0
    assert len(calls) == 5  # nobody asked for dx


@needs_kernels
def test_second_derivatives(calls):
    x, weight, bias = inputs(40, 64)
    (dx,) = torch.autograd.grad(ops.linear(x, weight, bias).square().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(functional.linear(x, weight, bias).square().sum(), x, create_graph=True)
    assert len(calls) == 2
    torch.testing.assert_close(*(torch.autograd.grad(d.square().sum(), x)[0] for d in (dx, want)), rtol=1e-4, atol=1e-2)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [True, False])
def test_under_autocast(transpose, dtype, calls):
    x, weight, bias = inputs(40, 64)
    stored = weight if transpose else weight.t().contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        ours = ops.linear(x.to(dtype), stored, bias, transpose=transpose)
        stock = functional.linear(x.to(dtype), weight, bias)
    assert ours.dtype == torch.bfloat16
    wide = x.detach().double().requires_grad_()
    exact = functional.linear(wide, weight.double(), bias.double())
    (exact_dx,) = torch.autograd.grad(exact.square().sum(), wide)
    errors = []
    for y in (ours, stock):
        (dx,) = torch.autograd.grad(y.float().square().sum(), x)
        assert dx.dtype == torch.float32
        errors.append([(a - b).norm() / b.norm() for a, b in ((y.detach().double(), exact), (dx.double(), exact_dx))])
    for error, of_stock in zip(*errors, strict=True):
        assert error < of_stock + torch.finfo(torch.bfloat16).eps
    assert len(calls) == 2


@needs_kernels
def test_what_has_no_kernel_is_torch_s(calls):
    x, weight, bias = inputs(40, 64)
    trained = weight.clone().requires_grad_()
    ops.linear(x, trained, bias).sum().backward()
    assert trained.grad is not None
    ops.linear(x, weight, settings=OpSettings("reference"))
    ops.linear(x.double(), weight.double())
    ops.linear(x[0], weight)
    with torch.autocast("cpu", torch.float16):
        assert ops.linear(x, weight).dtype == torch.float16
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(x.bfloat16(), weight)
    torch.func.grad(lambda x: ops.linear(x, weight).sum())(x)
    torch.compile(lambda x: ops.linear(x, weight, bias), fullgraph=True, backend="aot_eager")(x)
    assert not calls
    with torch.no_grad():
        ops.linear(x, trained)
    assert len(calls) == 1


@needs_kernels
@pytest.mark.parametrize("transpose", [True, False])
def test_shapes_that_do_not_fit_are_torch_s_to_refuse(transpose, calls):
    x, weight, bias = inputs(40, 64, n_cols=64)
    stored = weight if transpose else weight.t().contiguous()
    for narrow, wide in ((48, 64), (64, 48)):  # the kernel would read beside the rows, or beside the weight
        cut = stored[:, :wide] if transpose else stored[:wide]
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            ops.linear(x[:, :narrow], cut.contiguous(), bias, transpose=transpose)
    with pytest.raises(RuntimeError, match="size"):
        ops.linear(x, stored, bias[:48], transpose=transpose)
    with pytest.raises(RuntimeError, match="at least 1D"):
        ops.linear(x[0, 0], stored, bias, transpose=transpose)
    with pytest.raises(RuntimeError, match="dtype"), torch.autocast("cpu", torch.bfloat16):
        ops.linear(torch.ones(40, 64, dtype=torch.int64), stored, bias, transpose=transpose)
    assert not calls


@needs_kernels
def test_what_else_torch_takes_is_torch_s(calls):
    x, weight, bias = inputs(40, 64)
    assert ops.linear(x, weight[:0]).shape == (40, 0)
    assert ops.linear(x, weight[:0].t(), transpose=False).shape == (40, 0)
    assert torch.equal(ops.linear(x, weight, bias[:1]), functional.linear(x, weight, bias[:1]))
    assert torch.equal(ops.linear(x, weight[0]), functional.linear(x, weight[0]))
    assert torch.equal(ops.linear(x.detach(), weight.to_sparse_csr()), functional.linear(x, weight.to_sparse_csr()))
    assert ops.linear(x.detach().to_sparse(), weight).shape == (40, 48)
    nested = torch.nested.nested_tensor([x.detach(), x[:33].detach()])
    assert torch.equal(ops.linear(nested, weight, bias)[1], functional.linear(x[:33], weight, bias))
    with torch.backends.mkldnn.flags(enabled=False):  # without oneDNN torch refuses the products
        torch.testing.assert_close(ops.linear(x, weight, bias), functional.linear(x, weight, bias))
    assert not calls


def test_gradcheck_of_the_formula(monkeypatch):
    # The kernel has no float64: the definition stands in for it.
    monkeypatch.setattr(native_linear, "linear", reference.linear)
    monkeypatch.setattr(native_linear, "has_own", lambda *args, **kwargs: True)
    x, weight, bias = inputs(5, 4, n_cols=3, dtype=torch.float64)
    for stored, transpose in ((weight, True), (weight.t().contiguous(), False)):
        torch.autograd.gradcheck(
            lambda x, bias, stored=stored, transpose=transpose: ops.linear(x, stored, bias, transpose=transpose),
            (x, bias.requires_grad_()),
        )


@needs_kernels
def test_layers_whose_bias_trains_run_as_the_plan_says(calls):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), Conv1D(96, 64), nn.Linear(96, 32))

    plan = fastln.plan(model(), "bitfit")
    assert sum(change.stand_in in ("linear", "conv1d") for change in plan.changes) == 3
    ours, stock = fastln.prepare(model(), "bitfit"), model()
    x, losses = torch.randn(33, 64), []
    for each in (ours, stock):
        losses.append(each(x).square().mean())
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    assert len(calls) == 5  # no layer but the last two has an input with a gradient
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, stock.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@needs_kernels
def test_prepare_uses_it_for_frozen_layers_only(calls):
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), Conv1D(96, 64), nn.Linear(96, 32), nn.Linear(32, 16))
    x = torch.randn(33, 64)
    want = model(x)
    fastln.prepare(model, also=["4"])
    assert [isinstance(model[i], Linear) for i in (0, 3, 4)] == [True, True, False]
    assert type(model[2]) is not Conv1D
    assert isinstance(model[2], Conv1D)  # adapters ask
    assert repr(model[2]) == "Conv1D(nf=96, nx=64)"
    y = model(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert len(calls) == 5  # the first layer is before the first trained norm: no gradient
    model[3].weight.requires_grad_()  # somebody changed their mind
    model(x).sum().backward()
    assert model[3].weight.grad is not None
    fastln.restore(model)
    assert type(model[0]) is nn.Linear
    assert type(model[2]) is Conv1D
