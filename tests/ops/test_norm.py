"""The norm operations: values, what is kept for backward, which gradients are computed, torch's contracts."""

import dataclasses
import functools
import itertools
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops import NormKind
from fastln_kernels import reference

norm_module = sys.modules["fastln.ops.norm"]
OPERATOR = torch.ops.fastln.norm.default
BACKWARD = torch.ops.fastln.norm_backward.default
SUBSETS = [subset for subset in itertools.product((True, False), repeat=3) if any(subset)]
TELLING = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
BACKENDS = ["triton", "cpu", "reference"]
N_COLS = 24
LAYER_NORM = NormKind(1e-5)
LLAMA = NormKind(1e-6, centre=False, round_normed=True)
GEMMA = NormKind(1e-6, centre=False, offset=1.0)
KINDS = {"layer": LAYER_NORM, "llama": LLAMA, "gemma": GEMMA}


def settings(backend, kind=LAYER_NORM, dropout=0.0, keep="x"):
    """What the operators take after their tensors."""
    return kind.eps, kind.centre, kind.offset, kind.round_normed, dropout, keep, backend


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


def stock_norm(x, weight, bias, kind):
    """The same in torch's own operations."""
    weight = None if weight is None else weight + kind.offset
    if kind.centre:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, kind.eps)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, kind.eps) + (0 if bias is None else bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_rms_norm(kind, dtype, backend):
    kind, (x, weight, _) = KINDS[kind], leaves(dtype=dtype)

    def ours(x, weight):
        return ops.rms_norm(x, weight, kind.eps, kind.offset, round_normed=kind.round_normed, backend=backend)

    y, grads = gradients(ours, (x, weight))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want_y, want = gradients(lambda x, weight: stock_norm(x, weight, None, kind), exact)
    for got, wanted, of in zip((y, *grads), (want_y, *want), (x, x, weight), strict=True):
        assert got.dtype == of.dtype
        epsilon = (1 + kind.round_normed) * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=max(2 * epsilon, 1e-5), atol=max(epsilon, 1e-5))


@pytest.mark.parametrize("return_stream", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_add_norm(backend, kind, dropout, has_residual, return_stream):
    kind, (x, weight, bias) = KINDS[kind], leaves()
    residual = torch.randn_like(x).requires_grad_() if has_residual else None
    seed = torch.tensor([7])
    keep = reference.dropout_keep(x[..., 0].numel(), N_COLS, dropout, seed).view_as(x)
    keep = keep * reference.dropout_scale(dropout)

    def outputs(y, stream):
        return y + stream.sin() if return_stream else y

    def ours(x, weight, bias, *residual):
        result = ops.dropout_add_norm(
            *(x, residual[0] if residual else None, weight, bias, kind),
            dropout=dropout,
            return_stream=return_stream,
            seed=seed,
            backend=backend,
        )
        return outputs(*result) if return_stream else result

    def stock(x, weight, bias, *residual):
        stream = x * keep + sum(residual)
        return outputs(stock_norm(stream, weight, bias, kind), stream)

    tensors = [x, weight, bias, *([residual] if has_residual else [])]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    (y, grads), (want_y, want) = gradients(ours, tensors), gradients(stock, exact)
    for got, wanted in zip((y, *grads), (want_y, *want), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_dropout_follows_torchs_generator():
    x, weight, bias = leaves()
    ys = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ys.append(ops.dropout_add_norm(x, None, weight, bias, LAYER_NORM, dropout=0.5))
    assert torch.equal(ys[0], ys[1])
    assert not torch.equal(ys[0], ys[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_can_be_written_in_place(backend):
    x, weight, bias = leaves()
    ops.layer_norm(x, weight, bias, backend=backend).mul_(2).sum().backward()
    want = torch.autograd.grad(2 * stock(x, weight, bias).sum(), x)
    torch.testing.assert_close(x.grad, want[0], rtol=1e-4, atol=1e-5)
    for result in ops.dropout_add_norm(x, x, weight, bias, LAYER_NORM, return_stream=True, backend=backend):
        result.add_(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", ["stream", "normed"])
def test_results_share_no_memory(keep, backend):
    x = leaves()[0]
    torch.library.opcheck(OPERATOR, (x, None, None, None, None, *settings(backend, LAYER_NORM, 0.0, keep)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_of_inputs_without_gradient_has_none(backend):
    x, weight, bias = leaves((False, True, True))
    y, stream = ops.dropout_add_norm(x, x, weight, bias, LAYER_NORM, return_stream=True, backend=backend)
    assert y.requires_grad
    assert not stream.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_parameters_of_an_unused_norm_have_no_gradient(dropout, backend):
    x, weight, bias = leaves()
    _, stream = ops.dropout_add_norm(
        *(x, None if dropout else x, weight, bias, LAYER_NORM), dropout=dropout, return_stream=True, backend=backend
    )
    stream.sum().backward()
    assert weight.grad is bias.grad is None
    torch.testing.assert_close(x.grad, (stream / x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_alone_or_unused_has_its_gradient(backend):
    tensors = leaves((True, True, True))

    def ours(which, *t):
        return ops.dropout_add_norm(t[0], t[0] * 2, *t[1:], LAYER_NORM, return_stream=True, backend=backend)[which]

    for which in (0, 1):
        used = tensors if which == 0 else tensors[:1]
        got = torch.autograd.grad(ours(which, *tensors).sum(), used)
        want = torch.autograd.grad((stock(tensors[0] * 3, *tensors[1:]) if which == 0 else tensors[0] * 3).sum(), used)
        for gradient, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prologue_keeps_one_tensor_of_rows_and_no_mask(backend):
    x, weight, bias = leaves(dtype=torch.bfloat16)
    residual = torch.randn_like(x).requires_grad_()
    n_rows = x[..., 0].numel()
    returned = []

    def run(return_stream):
        options = {"dropout": 0.1, "return_stream": return_stream, "backend": backend}
        returned.append(ops.dropout_add_norm(x, residual, weight, bias, LAYER_NORM, **options))

    for return_stream in (True, False):
        tensors = kept(functools.partial(run, return_stream))
        places = {t.data_ptr() for t in tensors}
        assert sorted(t.numel() for t in tensors) == sorted([1, n_rows, N_COLS, x.numel()])
        assert not {x.data_ptr(), residual.data_ptr()} & places
        if return_stream:
            _, stream = returned[0]
            assert stream.data_ptr() in places


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prologue_without_gradients_keeps_nothing(backend):
    x, weight, bias = leaves((False, False, True))
    arguments = (x, x, weight, bias, LAYER_NORM)
    assert kept(lambda: ops.dropout_add_norm(*arguments, dropout=0.1, backend=backend)) == []
    y = ops.dropout_add_norm(*arguments, dropout=0.1, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), bias)[0], torch.full((N_COLS,), 10.0))
    with torch.no_grad():
        torch.testing.assert_close(
            ops.dropout_add_norm(*arguments, backend=backend), stock(2 * x, weight, bias), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("dropout", "residual"), [(1.0, None), (-0.1, None), (0.1, torch.zeros(2, 4))])
def test_bad_prologues(dropout, residual):
    with pytest.raises(FastLNError, match="must be"):
        ops.dropout_add_norm(torch.zeros(3, 4), residual, None, None, LAYER_NORM, dropout=dropout)


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
        tensors = kept(lambda: OPERATOR(x, weight, bias, None, None, *settings(backend)))
    else:
        tensors = kept(lambda: ops.layer_norm(x, weight, bias, backend=backend))
    need_dx, need_dweight, _ = subset
    storages = {t.data_ptr() for t in tensors}
    assert (x.data_ptr() in storages) == (need_dx or need_dweight)
    assert (weight.data_ptr() in storages) == need_dx
    assert bias.data_ptr() not in storages
    n_stats = norm_module._load(backend).n_stats
    rest = sum(t.numel() for t in tensors if t.data_ptr() not in (x.data_ptr(), weight.data_ptr()))
    assert rest == (n_stats * x[..., 0].numel() if need_dx or need_dweight else 0)


def test_nothing_is_kept_without_grad_mode():
    with torch.no_grad():
        assert kept(lambda: ops.layer_norm(*leaves())) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_only_the_wanted_gradients_are_computed(subset, backend, monkeypatch):
    implementation = norm_module._load(backend)
    asked, made = [], []

    def backward(*args, **flags):
        asked.append((flags["need_dx"], flags["need_dweight"], flags["need_dbias"]))
        grads = implementation.backward(*args, **flags)
        assert grads.dresidual is None or grads.dresidual is grads.dx
        made.append(tuple(grad is not None for grad in (grads.dx, grads.dweight, grads.dbias)))
        return grads

    monkeypatch.setattr(norm_module, "_load", lambda _: implementation._replace(backward=backward))
    gradients(lambda *t: ops.layer_norm(*t, backend=backend), leaves(subset))
    assert asked == made == [subset]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", TELLING, ids=str)
def test_operator_passes_opcheck(subset, backend):
    torch.library.opcheck(OPERATOR, (*leaves(subset), None, None, *settings(backend)))


@pytest.mark.parametrize("keep", ["stream", "normed", "nothing"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_operator_with_a_prologue_passes_opcheck(dropout, backend, keep):
    x, weight, bias = leaves((keep != "nothing",) * 2 + (True,))
    residual = torch.randn_like(x).requires_grad_(x.requires_grad)
    seed = torch.tensor([5]) if dropout else None
    torch.library.opcheck(OPERATOR, (x, weight, bias, residual, seed, *settings(backend, LLAMA, dropout, keep)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", TELLING, ids=str)
def test_backward_operator_passes_opcheck(subset, backend):
    x, weight, bias = leaves((False, False, False), dtype=torch.bfloat16)
    y, _, stats = OPERATOR(x, weight, bias, None, None, *settings(backend))
    need_dx, need_dweight, need_dbias = subset
    need_x = need_dx or need_dweight
    tensors = (y, None, x if need_x else None, weight if need_dx else None, None, stats if need_x else None)
    args = (*tensors, need_dx, False, need_dweight, need_dbias, torch.float32, *settings(backend))
    assert len(BACKWARD(*args)) == sum(subset)
    torch.library.opcheck(BACKWARD, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_backward_operator_with_a_prologue_passes_opcheck(dropout, backend):
    x, weight, bias = leaves((False, False, False), dtype=torch.bfloat16)
    seed = torch.tensor([5]) if dropout else None
    options = settings(backend, LLAMA, dropout, "stream")
    y, stream, stats = OPERATOR(x, weight, bias, x, seed, *options)
    args = (y, y, stream, weight, seed, stats, True, True, True, True, torch.float32, *options)
    assert len(BACKWARD(*args)) == (4 if dropout else 3)
    torch.library.opcheck(BACKWARD, args)


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_gradcheck(subset):
    tensors = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves(subset, shape=(3, 5))]
    assert torch.autograd.gradcheck(lambda *t: ops.layer_norm(*t, backend="reference"), tensors)


@pytest.mark.parametrize("return_stream", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_a_prologue(kind, return_stream):
    tensors = [t.detach().double().requires_grad_() for t in leaves(shape=(3, 5))]
    tensors.append(torch.randn_like(tensors[0]).requires_grad_())

    def function(x, weight, bias, residual):
        return ops.dropout_add_norm(
            *(x, residual, weight, bias, dataclasses.replace(KINDS[kind], round_normed=False)),
            dropout=0.25,
            seed=torch.tensor([1]),
            return_stream=return_stream,
            backend="reference",
        )

    assert torch.autograd.gradcheck(function, tensors)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_stream", [True, False], ids=["pre-norm", "post-norm"])
def test_a_compiled_prologue_equals_eager(return_stream, backend):
    def function(x, weight, bias):
        y = ops.dropout_add_norm(
            *(x * 2, x, weight, bias, LLAMA), dropout=0.5, seed=seed, return_stream=return_stream, backend=backend
        )
        return y[0].sin() + y[1] if return_stream else y.sin()

    seed = torch.tensor([3])
    got = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), leaves())
    torch.testing.assert_close(got, gradients(function, leaves()))


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


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_meta_tensors(backend):
    x = torch.empty(2, 3, N_COLS, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = ops.layer_norm(x, None, None, backend=backend)
    y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, x.dtype, x.shape)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(3, 4), torch.ones(5), r"weight of a norm must be \(4,\).*\(5,\)"),
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
