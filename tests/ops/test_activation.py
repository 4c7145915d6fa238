"""The activation operations: values, what is kept for backward, which gradients are computed, torch's contracts."""

import subprocess
import sys
import types

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops import ACTIVATION_KINDS, OpSettings
from fastln.ops.backends import implementation

activation_module = sys.modules["fastln.ops.activation"]
OPERATOR = torch.ops.fastln.activation.default
BACKWARD = torch.ops.fastln.activation_backward.default
GATED = torch.ops.fastln.gated_activation.default
GATED_BACKWARD = torch.ops.fastln.gated_activation_backward.default
BACKENDS = ["triton", "cpu", "reference"]
SUBSETS = [(True, True), (True, False), (False, True)]
SHAPE = (2, 5, 24)
STOCK = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
}


def leaves(subset=(True, True), dtype=torch.float32, shape=SHAPE):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_(needed) for needed in subset]


def packed_leaf(dtype=torch.float32, shape=SHAPE):
    torch.manual_seed(0)
    return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype).requires_grad_()


def gradients(function, tensors):
    y = function(*tensors)
    dy = torch.arange(y.numel()).remainder(7).sub(2).to(y.dtype).view_as(y)  # exact in every dtype
    return y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)


def doubles(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def assert_rounded_once(got, want, dtype):
    for result, right in zip(got, want, strict=True):
        assert result.dtype == dtype
        # Half a unit in the last place; one where the interpreter truncates.
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(result.double(), right, rtol=max(epsilon, 1e-5), atol=max(epsilon / 16, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_dtypes(dtype, kind, backend):
    (x,), stock = leaves((True,), dtype), STOCK[kind]
    got = gradients(lambda x: ops.activation(x, kind, settings=OpSettings(backend)), [x])
    assert_rounded_once(got, gradients(stock, doubles([x])), dtype)
    tensors = leaves(dtype=dtype)
    got = gradients(lambda gate, up: ops.gated_activation(gate, up, kind, settings=OpSettings(backend)), tensors)
    assert_rounded_once(got, gradients(lambda gate, up: stock(gate) * up, doubles(tensors)), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_packed_is_gated_of_the_halves(kind, backend):
    gate_up = packed_leaf()
    got = gradients(lambda t: ops.packed_gated_activation(t, kind, settings=OpSettings(backend)), [gate_up])
    want = gradients(lambda t: ops.gated_activation(*t.chunk(2, -1), kind, settings=OpSettings("reference")), [gate_up])
    torch.testing.assert_close(got, want)
    assert got[0].is_contiguous()


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_float64(kind):
    tensors = doubles(leaves())
    for backend in ("auto", "cpu", "reference"):
        got = gradients(lambda x: ops.activation(x, kind, settings=OpSettings(backend)), tensors[:1])  # noqa: B023
        torch.testing.assert_close(got, gradients(STOCK[kind], tensors[:1]))
    got = gradients(lambda gate, up: ops.gated_activation(gate, up, kind), tensors)
    torch.testing.assert_close(got, gradients(lambda gate, up: STOCK[kind](gate) * up, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 24), (3, 0), (7,), (2, 3, 4, 1)], ids=str)
def test_shapes(shape, backend):
    tensors = leaves(shape=shape)
    got = gradients(lambda x: ops.activation(x, "gelu", settings=OpSettings(backend)), tensors[:1])
    torch.testing.assert_close(got, gradients(STOCK["gelu"], tensors[:1]))
    got = gradients(lambda gate, up: ops.gated_activation(gate, up, "silu", settings=OpSettings(backend)), tensors)
    torch.testing.assert_close(got, gradients(lambda gate, up: STOCK["silu"](gate) * up, tensors))


@pytest.mark.parametrize("shape", [(0, 24), (3, 0), (8,)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_shapes(shape, backend):
    x = torch.randn(shape).requires_grad_()
    got = gradients(lambda x: ops.packed_gated_activation(x, "silu", settings=OpSettings(backend)), [x])
    torch.testing.assert_close(got, gradients(lambda x: STOCK["silu"](x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [x]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    x = leaves((False,), shape=(4, 6, 24))[0]
    for view in (x.transpose(0, 1), x[:, 0], x[:, :1].expand(4, 6, 24), x[..., ::2], x.permute(2, 0, 1)):
        view = view.detach().requires_grad_()
        other = torch.randn(view.shape).requires_grad_()
        got = gradients(lambda x: ops.activation(x, "silu", settings=OpSettings(backend)), [view])
        assert got[0].is_contiguous()
        torch.testing.assert_close(got, gradients(STOCK["silu"], [view]))
        got = gradients(
            lambda gate, up: ops.gated_activation(gate, up, "silu", settings=OpSettings(backend)), [other, view]
        )
        torch.testing.assert_close(got, gradients(lambda gate, up: STOCK["silu"](gate) * up, [other, view]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_and_an_up_of_two_dtypes(backend):
    gate, up = leaves()
    up = up.detach().bfloat16().requires_grad_()
    got = gradients(lambda gate, up: ops.gated_activation(gate, up, "silu", settings=OpSettings(backend)), (gate, up))
    want = gradients(lambda gate, up: STOCK["silu"](gate) * up, (gate, up))
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.bfloat16]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_results_can_be_written_in_place(kind, backend):
    x, up = leaves()
    if kind != "relu":  # which keeps its result, as torch's does
        ops.activation(x, kind, settings=OpSettings(backend)).mul_(2).sum().backward()
        (want,) = torch.autograd.grad(2 * STOCK[kind](x).sum(), x)
        torch.testing.assert_close(x.grad, want)
    ops.gated_activation(x, up, kind, settings=OpSettings(backend)).mul_(2).sum().backward()
    torch.testing.assert_close(up.grad, 2 * STOCK[kind](x).detach())


def kept(function):
    """What `function` keeps for backward, by way of the hooks that every accounting uses."""
    packed = []

    def pack(t):
        packed.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return packed, result


@pytest.mark.parametrize("through_operator", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_an_activation_keeps_exactly_one_tensor(kind, backend, through_operator):
    def run(x):
        return (
            OPERATOR(x, kind, 0, *OpSettings(backend).flat)[0]
            if through_operator
            else ops.activation(x, kind, settings=OpSettings(backend))
        )

    (x,) = leaves((True,), torch.bfloat16)
    tensors, y = kept(lambda: run(x))
    assert [t.data_ptr() for t in tensors] == [(y if kind == "relu" else x).data_ptr()]
    assert tensors[0].dtype == torch.bfloat16
    assert kept(lambda: run(x.detach()))[0] == []
    with torch.no_grad():
        assert kept(lambda: run(x))[0] == []


@pytest.mark.parametrize("through_operator", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", [*SUBSETS, (False, False)], ids=str)
@pytest.mark.parametrize("kind", ["silu", "relu"])
def test_a_gated_activation_keeps_gate_and_up_and_no_more(kind, subset, backend, through_operator):
    gate, up = leaves(subset, torch.bfloat16)
    if through_operator:
        tensors, _ = kept(lambda: GATED(gate, up, kind, 0, *OpSettings(backend).flat))
    else:
        tensors, _ = kept(lambda: ops.gated_activation(gate, up, kind, settings=OpSettings(backend)))
    want = {(True, True): [gate, up], (True, False): [gate, up], (False, True): [gate], (False, False): []}[subset]
    assert [t.data_ptr() for t in tensors] == [t.data_ptr() for t in want]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_gated_activation_keeps_one_tensor(backend):
    gate_up = packed_leaf()
    tensors, _ = kept(lambda: ops.packed_gated_activation(gate_up, "silu", settings=OpSettings(backend)))
    assert [(t.data_ptr(), t.shape) for t in tensors] == [(gate_up.data_ptr(), gate_up.shape)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_only_the_wanted_gradients_are_computed(subset, backend, monkeypatch):
    kernels = implementation("gated_activation", leaves()[0], OpSettings(backend))
    asked = []

    def backward(dy, gate, up, kind, **flags):
        asked.append((flags["need_dgate"], flags["need_dup"]))
        assert (up is not None) == flags["need_dgate"]
        return kernels.gated_backward(dy, gate, up, kind, **flags)

    spying = types.SimpleNamespace(gated_forward=kernels.gated_forward, gated_backward=backward)
    monkeypatch.setattr(activation_module, "implementation", lambda *_: spying)
    gradients(lambda gate, up: ops.gated_activation(gate, up, "silu", settings=OpSettings(backend)), leaves(subset))
    assert asked == [subset]


@pytest.mark.slow(take=5)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [0, 8, 4, 2])
@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_operators_pass_opcheck(kind, bits, backend):
    x, up = leaves()
    told = (kind, bits, *OpSettings(backend).flat)
    torch.library.opcheck(OPERATOR, (x, *told))
    _, codes = OPERATOR(x, *told)
    torch.library.opcheck(BACKWARD, (up.detach(), codes.detach() if bits else x.detach(), *told))
    for subset in SUBSETS:
        torch.library.opcheck(GATED, (*leaves(subset), *told))
        _, *codes = GATED(*leaves(subset), *told)
        kept = (None, None, codes) if bits else (x.detach(), up.detach() if subset[0] else None, [])
        arguments = (up.detach(), *kept, False, *subset, *told)
        assert len(GATED_BACKWARD(*arguments)) == sum(subset)
        torch.library.opcheck(GATED_BACKWARD, arguments)
    gate_up = packed_leaf()
    torch.library.opcheck(GATED, (gate_up, None, *told))
    _, *codes = GATED(gate_up.detach(), None, *told)
    kept = (None, None, codes) if bits else (gate_up.detach(), None, [])
    torch.library.opcheck(GATED_BACKWARD, (x.detach(), *kept, True, True, False, *told))


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_gradcheck(kind):
    def gated(gate, up):
        return ops.gated_activation(gate, up, kind, settings=OpSettings("reference"))

    tensors = doubles(leaves(shape=(3, 5)))
    assert torch.autograd.gradcheck(lambda x: ops.activation(x, kind, settings=OpSettings("reference")), tensors[:1])
    for subset in SUBSETS:
        assert torch.autograd.gradcheck(gated, doubles(leaves(subset, shape=(3, 5))))
    (packed,) = doubles([packed_leaf(shape=(3, 5))])
    assert torch.autograd.gradcheck(
        lambda x: ops.packed_gated_activation(x, kind, settings=OpSettings("reference")), packed
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_compiled_whole_graph_equals_eager(kind, backend):
    def function(gate, up):
        y = ops.gated_activation(gate * 2, up, kind, settings=OpSettings(backend))
        y = y + ops.packed_gated_activation(torch.cat((gate, up), -1), kind, settings=OpSettings(backend))
        return ops.activation(y, kind, settings=OpSettings(backend)).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (2, 3):
        tensors = leaves(shape=(rows, 5, 24))
        torch.testing.assert_close(gradients(compiled, tensors), gradients(function, tensors))


@pytest.mark.slow(pool="inductor")
def test_inductor_equals_eager():
    def function(gate, up):
        return ops.activation(ops.gated_activation(gate * 2, up, "silu"), "gelu").sin()

    tensors = leaves()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, tensors), gradients(function, tensors))


def test_a_second_derivative_is_refused():
    x, up = leaves()
    for y in (
        ops.activation(x, "gelu"),
        ops.gated_activation(x, up, "gelu"),
        OPERATOR(x, "silu", 0, *OpSettings("auto").flat)[0],
    ):
        with pytest.raises(FastLNError, match="create_graph"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_torchs_transforms_take_the_definition(kind):
    x, up = (t.detach() for t in leaves())
    for function, stock in (
        (lambda x: ops.activation(x, kind), STOCK[kind]),
        (lambda x: ops.gated_activation(x, up, kind), lambda x: STOCK[kind](x) * up),
    ):
        torch.testing.assert_close(torch.func.jvp(function, (x,), (up,)), torch.func.jvp(stock, (x,), (up,)))
        got, want = (torch.func.grad(lambda x, f=f: f(x).sum())(x) for f in (function, stock))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_meta_tensors(backend):
    x = torch.empty(SHAPE, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = ops.gated_activation(
        ops.activation(x, "gelu", settings=OpSettings(backend)), x, "silu", settings=OpSettings(backend)
    )
    y = y + ops.packed_gated_activation(torch.cat((x, x), -1), "silu", settings=OpSettings(backend))
    y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, x.dtype, x.shape)


def test_bad_arguments():
    x = torch.zeros(3, 4)
    for function, message in (
        (lambda: ops.activation(x, "swish"), "unknown activation 'swish'.*gelu, gelu_tanh, quick_gelu, silu, relu"),
        (lambda: ops.activation(x.long(), "relu"), "x is torch.int64"),
        (lambda: ops.gated_activation(x, x.long(), "relu"), "up is torch.int64"),
        (lambda: ops.gated_activation(x, x[:2], "relu"), r"up must be shaped like gate.*\(3, 4\).*\(2, 4\)"),
        (lambda: ops.gated_activation(x, x.to("meta"), "relu"), "on its device.*cpu.*meta"),
        (lambda: ops.packed_gated_activation(x[:, :3], "silu"), r"even number of columns.*\(3, 3\)"),
        (lambda: ops.packed_gated_activation(torch.tensor(1.0), "silu"), "even number of columns"),
        (lambda: ops.activation(x.double(), "silu", settings=OpSettings("triton")), "float64"),
    ):
        with pytest.raises(FastLNError, match=message):
            function()


def test_imports_where_triton_does_not_exist():
    program = "; ".join(
        (
            "import sys, torch",
            "sys.modules['triton'] = None",
            "import fastln.ops",
            "x = fastln.ops.layer_norm(torch.ones(2, 3), None, None)",
            "fastln.ops.gated_activation(x, fastln.ops.activation(x, 'silu'), 'gelu')",
        )
    )
    subprocess.run([sys.executable, "-c", program], check=True)
