"""The norm operations: values, dtypes, shapes, strides, prologues, and what they refuse."""

import pytest
import torch
from norm_stock import BACKENDS, KINDS, LAYER_NORM, N_COLS, gradients, leaves, stock, stock_norm
from torch.nn import functional

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops import OpSettings
from fastln_kernels import reference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_dtypes(dtype, parameter_dtype, backend):
    tensors = leaves(dtype=dtype, parameter_dtype=parameter_dtype)
    y, grads = gradients(lambda *t: ops.layer_norm(*t, settings=OpSettings(backend)), tensors)
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
    y, grads = gradients(lambda *t: ops.layer_norm(*t, settings=OpSettings(backend)), tensors)
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
    y = ops.layer_norm(x, weight, bias, settings=OpSettings(backend))
    grads = torch.autograd.grad(y.sum(), given)
    want = stock(x.double(), None if weight is None else weight.double(), None if bias is None else bias.double())
    assert [grad.dtype for grad in grads] == [t.dtype for t in given]
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cpu_sums_parameter_gradients_in_float32(dtype):
    x, weight, bias = leaves((False, True, True), dtype=dtype, shape=(4000, 16))
    dy = torch.randn(4000, 16).to(dtype) + 0.1
    got = torch.autograd.grad(ops.layer_norm(x, weight, bias, settings=OpSettings("cpu")), (weight, bias), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = torch.autograd.grad(stock(*exact), exact[1:], dy.double())
    for got_grad, want_grad in zip(got, want, strict=True):
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, N_COLS), (3, 0, N_COLS), (N_COLS,), (2, 3, 4, 1)], ids=str)
def test_shapes(shape, backend):
    tensors = leaves(shape=shape)
    y, grads = gradients(lambda *t: ops.layer_norm(*t, settings=OpSettings(backend)), tensors)
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
        y, grads = gradients(lambda *t: ops.layer_norm(*t, settings=OpSettings(backend)), (view, weight, bias))
        want_y, want = gradients(stock, (view, weight, bias))
        assert y.is_contiguous()
        for got, wanted in zip((y, *grads), (want_y, *want), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_weight_and_bias(backend):
    x, *vectors = leaves()
    wide = [torch.stack((v.detach(), v.detach() + 3), dim=1).requires_grad_() for v in vectors]
    views = (x, wide[0][:, 0], wide[1][:, 1])
    y, grads = gradients(lambda *t: ops.layer_norm(*t, settings=OpSettings(backend)), views)
    want_y, want = gradients(stock, views)
    for got, wanted in zip((y, *grads), (want_y, *want), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_rms_norm(kind, dtype, backend):
    kind, (x, weight, _) = KINDS[kind], leaves(dtype=dtype)

    def ours(x, weight):
        return ops.rms_norm(
            x, weight, kind.eps, kind.offset, round_normed=kind.round_normed, settings=OpSettings(backend)
        )

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
            settings=OpSettings(backend),
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
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_under_autocast_a_float32_residual_makes_a_float32_stream(dropout, backend):
    h, weight, bias = leaves(shape=(10, N_COLS))
    projection = torch.randn(N_COLS, N_COLS)
    residual = torch.randn_like(h).requires_grad_()
    seed = torch.tensor([7])
    mask = reference.dropout_keep(10, N_COLS, dropout, seed) * reference.dropout_scale(dropout)

    def ours(x, residual):
        options = {"dropout": dropout, "return_stream": True, "seed": seed, "settings": OpSettings(backend)}
        return ops.dropout_add_norm(x, residual, weight, bias, LAYER_NORM, **options)

    def stock_prologue(x, residual):
        stream = residual + mask * x
        return stock(stream, weight, bias), stream

    results = []
    for function in (ours, stock_prologue):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = functional.linear(h, projection)
            assert x.dtype == torch.bfloat16
            y, stream = function(x, residual)
        assert y.dtype == stream.dtype == torch.float32
        loss = (y * torch.linspace(-1, 1, N_COLS)).sum() + stream.sin().sum()
        grads = torch.autograd.grad(loss, (x, residual, weight, bias))
        assert [grad.dtype for grad in grads] == [torch.bfloat16, *3 * [torch.float32]]
        results.append((y, stream, *(grad.float() for grad in grads)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2 if got is results[0][2] else 1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_can_be_written_in_place(backend):
    x, weight, bias = leaves()
    ops.layer_norm(x, weight, bias, settings=OpSettings(backend)).mul_(2).sum().backward()
    want = torch.autograd.grad(2 * stock(x, weight, bias).sum(), x)
    torch.testing.assert_close(x.grad, want[0], rtol=1e-4, atol=1e-5)
    for result in ops.dropout_add_norm(
        x, x, weight, bias, LAYER_NORM, return_stream=True, settings=OpSettings(backend)
    ):
        result.add_(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_of_inputs_without_gradient_has_none(backend):
    x, weight, bias = leaves((False, True, True))
    y, stream = ops.dropout_add_norm(x, x, weight, bias, LAYER_NORM, return_stream=True, settings=OpSettings(backend))
    assert y.requires_grad
    assert not stream.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_parameters_of_an_unused_norm_have_no_gradient(dropout, backend):
    x, weight, bias = leaves()
    _, stream = ops.dropout_add_norm(
        *(x, None if dropout else x, weight, bias, LAYER_NORM),
        dropout=dropout,
        return_stream=True,
        settings=OpSettings(backend),
    )
    stream.sum().backward()
    assert weight.grad is bias.grad is None
    torch.testing.assert_close(x.grad, (stream / x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_alone_or_unused_has_its_gradient(backend):
    tensors = leaves((True, True, True))

    def ours(which, *t):
        return ops.dropout_add_norm(
            t[0], t[0] * 2, *t[1:], LAYER_NORM, return_stream=True, settings=OpSettings(backend)
        )[which]

    for which in (0, 1):
        used = tensors if which == 0 else tensors[:1]
        got = torch.autograd.grad(ours(which, *tensors).sum(), used)
        want = torch.autograd.grad((stock(tensors[0] * 3, *tensors[1:]) if which == 0 else tensors[0] * 3).sum(), used)
        for gradient, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


ROWS, VECTOR = torch.zeros(3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (ROWS, torch.ones(5), None, r"weight of a norm must be \(4,\).*\(5,\)"),
        (ROWS, VECTOR, torch.ones(4, 1), r"bias of a norm must be \(4,\).*\(4, 1\)"),
        (ROWS.long(), None, None, r"takes torch.float32, .*x is torch.int64"),
        (ROWS.to(torch.float8_e4m3fn), None, None, "x is torch.float8_e4m3fn"),
        (ROWS, VECTOR.long(), None, "weight is torch.int64"),
        (ROWS, VECTOR, VECTOR.to("meta"), "bias of a norm must be on cpu, as x is; it is on meta"),
        (ROWS.to("meta"), VECTOR, None, "weight of a norm must be on meta, as x is; it is on cpu"),
        (torch.zeros(3, 0), None, None, "last dimension"),
        (torch.tensor(1.0), None, None, "last dimension"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_bad_arguments(backend, x, weight, bias, message):
    with pytest.raises(FastLNError, match=message):
        ops.layer_norm(x, weight, bias, settings=OpSettings(backend))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 1.0}, "dropout is 1.0; it must be from 0 to below 1"),
        ({"dropout": -0.1}, "it must be from 0"),
        ({"residual": torch.zeros(2, 4)}, r"residual must be shaped like x, \(3, 4\); it is \(2, 4\)"),
        ({"residual": torch.zeros(4)}, "residual must be shaped like x"),
        ({"residual": ROWS.long()}, "residual is torch.int64"),
        ({"residual": ROWS.to("meta")}, "residual of a norm must be on cpu, as x is; it is on meta"),
        ({"seed": torch.tensor(1)}, r"seed must be \(1,\), torch.int64 and on cpu.*it is \(\), torch.int64"),
        ({"seed": torch.tensor([1, 2])}, r"it is \(2,\)"),
        ({"seed": torch.tensor([1], dtype=torch.int32)}, r"it is \(1,\), torch.int32"),
        ({"seed": torch.tensor([1], device="meta")}, "and on meta"),
    ],
)
def test_bad_prologues(arguments, message):
    arguments = {"residual": None, "dropout": 0.1} | arguments
    with pytest.raises(FastLNError, match=message):
        ops.dropout_add_norm(ROWS, arguments.pop("residual"), None, None, LAYER_NORM, **arguments)


def test_float64_is_not_for_triton():
    with pytest.raises(FastLNError, match="float64"):
        ops.layer_norm(torch.zeros(3, 4, dtype=torch.float64), None, None, settings=OpSettings("triton"))
