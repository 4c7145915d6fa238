"""The layer_norm operation: values, what is kept for backward, which gradients are computed, torch's contracts."""

import importlib
import itertools
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastln import ops
from fastln.errors import FastLNError

layer_norm_module = importlib.import_module("fastln.ops.layer_norm")  # the package's attribute is the function
OPERATOR = torch.ops.fastln.layer_norm.default
BACKWARD = torch.ops.fastln.layer_norm_backward.default
SUBSETS = [subset for subset in itertools.product((True, False), repeat=3) if any(subset)]
TELLING = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
BACKENDS = ["triton", "cpu", "reference"]
N_COLS = 24


def leaves(subset=(True, True, True), dtype=torch.float32, parameter_dtype=torch.float32, shape=(2, 5, N_COLS)):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(parameter_dtype), torch.randn(shape[-1]).to(parameter_dtype)
    return [t.requires_grad_(needed) for t, needed in zip((x, weight, bias), subset, strict=True)]


def gradients(function, tensors):
    y = function(*tensors)
    dy = torch.arange(y.numel()).remainder(7).sub(2).to(y.dtype).view_as(y)  # exact in every dtype
    return y, torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)


def stock(x, weight, bias):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_dtypes(dtype, parameter_dtype, backend):
    tensors = leaves(dtype=dtype, parameter_dtype=parameter_dtype)
    y, grads = gradients(lambda *t: ops.layer_norm(*t, backend=backend), tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want_y, want = gradients(stock, exact)
    for got, wanted, of in zip((y, *grads), (want_y, *want), (tensors[0], *tensors), strict=True):
        assert got.dtype == of.dtype
        # Rounded once, to its own dtype: half a unit in the last place (one where the interpreter truncates).
        epsilon = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=max(epsilon, 1e-5), atol=max(epsilon / 16, 1e-6))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float64(backend):
    tensors = [t.detach().double().requires_grad_() for t in leaves()]
    y, grads = gradients(lambda *t: ops.layer_norm(*t, backend=backend), tensors)
    want_y, want = gradients(stock, tensors)
    for got, wanted in zip((y, *grads), (want_y, *want), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("which", ["weight only", "bias only", "neither", "weight float32", "bias float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mix_of_parameters(which, backend):
    x, weight, bias = leaves(dtype=torch.bfloat16, parameter_dtype=torch.bfloat16)
    weight = {"bias only": None, "neither": None, "weight float32": weight.detach().float().requires_grad_()}.get(
        which, weight
    )
    bias = {"weight only": None, "neither": None, "bias float32": bias.detach().float().requires_grad_()}.get(
        which, bias
    )
    given = [t for t in (x, weight, bias) if t is not None]
    y = ops.layer_norm(x, weight, bias, backend=backend)
    grads = torch.autograd.grad(y.sum(), given)
    want = stock(x.double(), None if weight is None else weight.double(), None if bias is None else bias.double())
    assert [grad.dtype for grad in grads] == [t.dtype for t in given]
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cpu_sums_parameter_gradients_in_float32(dtype):
    x, weight, bias = leaves((False, True, True), dtype=dtype, shape=(4000, 16))
    dy = torch.randn(4000, 16).to(dtype) + 0.1
    got = torch.autograd.grad(ops.layer_norm(x, weight, bias, backend="cpu"), (weight, bias), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = torch.autograd.grad(stock(*exact), exact[1:], dy.double())
    for got_grad, want_grad in zip(got, want, strict=True):
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, N_COLS), (3, 0, N_COLS), (N_COLS,), (2, 3, 4, 1)], ids=str)
def test_shapes(shape, backend):
    tensors = leaves(shape=shape)
    y, grads = gradients(lambda *t: ops.layer_norm(*t, backend=backend), tensors)
    want_y, want = gradients(stock, [t.detach().double().requires_grad_() for t in tensors])
    for got, wanted in zip((y, *grads), (want_y, *want), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    x, weight, bias = leaves((False, True, True), shape=(4, 6, N_COLS))
    for view in (
        x.transpose(0, 1),
        x[:, 0],
        x[:, :1].expand(4, 6, N_COLS),
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ):
        view = view.detach().requires_grad_()
        y, grads = gradients(lambda *t: ops.layer_norm(*t, backend=backend), (view, weight, bias))
        want_y, want = gradients(stock, (view, weight, bias))
        assert y.is_contiguous()
        for got, wanted in zip((y, *grads), (want_y, *want), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_weight_and_bias(backend):
    x, *vectors = leaves()
    wide = [torch.stack((v.detach(), v.detach() + 3), dim=1).requires_grad_() for v in vectors]
    views = (x, wide[0][:, 0], wide[1][:, 1])
    y, grads = gradients(lambda *t: ops.layer_norm(*t, backend=backend), views)
    want_y, want = gradients(stock, views)
    for got, wanted in zip((y, *grads), (want_y, *want), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def kept(function):
    """What `function` keeps for backward, by way of the hooks that every accounting uses."""
    packed = []

    def pack(t):
        packed.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        function()
    return packed


@pytest.mark.parametrize("through_operator", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", [*SUBSETS, (False, False, False)], ids=str)
def test_nothing_is_kept_that_no_wanted_gradient_needs(subset, backend, through_operator):
    x, weight, bias = leaves(subset)
    if through_operator:
        tensors = kept(lambda: OPERATOR(x, weight, bias, 1e-5, backend))
    else:
        tensors = kept(lambda: ops.layer_norm(x, weight, bias, backend=backend))
    need_dx, need_dweight, _ = subset
    storages = {t.data_ptr() for t in tensors}
    assert (x.data_ptr() in storages) == (need_dx or need_dweight)
    assert (weight.data_ptr() in storages) == need_dx
    assert bias.data_ptr() not in storages
    n_stats = layer_norm_module._load(backend).n_stats
    rest = sum(t.numel() for t in tensors if t.data_ptr() not in (x.data_ptr(), weight.data_ptr()))
    assert rest == (n_stats * x[..., 0].numel() if need_dx or need_dweight else 0)


def test_nothing_is_kept_without_grad_mode():
    with torch.no_grad():
        assert kept(lambda: ops.layer_norm(*leaves())) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_only_the_wanted_gradients_are_computed(subset, backend, monkeypatch):
    implementation = layer_norm_module._load(backend)
    asked, made = [], []

    def backward(*args, **flags):
        asked.append((flags["need_dx"], flags["need_dweight"], flags["need_dbias"]))
        grads = implementation.backward(*args, **flags)
        made.append(tuple(grad is not None for grad in grads))
        return grads

    monkeypatch.setattr(layer_norm_module, "_load", lambda _: implementation._replace(backward=backward))
    gradients(lambda *t: ops.layer_norm(*t, backend=backend), leaves(subset))
    assert asked == made == [subset]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", TELLING, ids=str)
def test_operator_passes_opcheck(subset, backend):
    torch.library.opcheck(OPERATOR, (*leaves(subset), 1e-5, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", TELLING, ids=str)
def test_backward_operator_passes_opcheck(subset, backend):
    x, weight, bias = leaves((False, False, False), dtype=torch.bfloat16)
    y, stats = OPERATOR(x, weight, bias, 1e-5, backend)
    need_x = subset[0] or subset[1]
    args = (x if need_x else None, weight if subset[0] else None, stats if need_x else None)
    assert len(BACKWARD(y, *args, *subset, torch.float32, backend)) == sum(subset)
    torch.library.opcheck(BACKWARD, (y, *args, *subset, torch.float32, backend))


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_gradcheck(subset):
    tensors = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves(subset, shape=(3, 5))]
    assert torch.autograd.gradcheck(lambda *t: ops.layer_norm(*t, backend="reference"), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", [(True, True, True), (False, True, False)], ids=str)
def test_compiled_whole_graph_equals_eager(subset, backend):
    def function(x, weight, bias):
        return ops.layer_norm(x * 2, weight, bias, backend=backend).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (2, 3):
        tensors = leaves(subset, shape=(rows, 5, N_COLS))
        y, grads = gradients(compiled, tensors)
        want_y, want = gradients(function, tensors)
        for got, wanted in zip((y, *grads), (want_y, *want), strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.slow
def test_inductor_equals_eager():
    def function(x, weight, bias):
        return ops.layer_norm(x * 2, weight, bias).sin()

    got = gradients(torch.compile(function, fullgraph=True), leaves())
    torch.testing.assert_close(got, gradients(function, leaves()))


def test_a_second_derivative_is_refused():
    x, weight, bias = leaves()
    with pytest.raises(FastLNError, match="create_graph"):
        torch.autograd.grad(ops.layer_norm(x, weight, bias).sum(), x, create_graph=True)


def test_meta_tensors():
    x = torch.empty(2, 3, N_COLS, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = ops.layer_norm(x, None, None)
    y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, x.dtype, x.shape)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(3, 4), torch.ones(5), r"weight of layer_norm must be \(4,\).*\(5,\)"),
        (torch.zeros(3, 4, dtype=torch.int64), None, "floating-point"),
        (torch.zeros(3, 0), None, "last dimension"),
        (torch.tensor(1.0), None, "last dimension"),
    ],
)
def test_bad_arguments(x, weight, message):
    with pytest.raises(FastLNError, match=message):
        ops.layer_norm(x, weight, None)


def test_float64_is_not_for_triton():
    with pytest.raises(FastLNError, match="float64"):
        ops.layer_norm(torch.zeros(3, 4, dtype=torch.float64), None, None, backend="triton")


def test_imports_where_triton_does_not_exist():
    program = "; ".join(
        (
            "import sys, torch",
            "sys.modules['triton'] = None",
            "import fastln.ops",
            "fastln.ops.layer_norm(torch.ones(2, 3), None, None)",
        )
    )
    subprocess.run([sys.executable, "-c", program], check=True)
