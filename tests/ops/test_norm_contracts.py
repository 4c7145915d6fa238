"""The norm operations and torch: operators, derivatives, compilation, transforms, tensors without data."""

import dataclasses

import pytest
import torch
from norm_stock import BACKENDS, GEMMA, KINDS, LAYER_NORM, LLAMA, N_COLS, SUBSETS, gradients, leaves, stock_norm
from torch import nn

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops import OpSettings
from fastln.standins.norm import LayerNorm
from fastln.standins.part import stand_in

OPERATOR = torch.ops.fastln.norm.default
BACKWARD = torch.ops.fastln.norm_backward.default
AGAIN = torch.ops.fastln.norm_again.default
TELLING = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


def settings(backend, kind=LAYER_NORM, dropout=0.0, keep="x"):
    """What the operators take after their tensors."""
    return kind.eps, kind.centre, kind.offset, kind.round_normed, dropout, keep, *OpSettings(backend).flat


@pytest.mark.slow(take=6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", TELLING, ids=str)
def test_operator_passes_opcheck(subset, backend):
    torch.library.opcheck(OPERATOR, (*leaves(subset), None, None, *settings(backend)))


@pytest.mark.slow(take=6)
@pytest.mark.parametrize("keep", ["stream", "normed", "nothing", "codes", "stream, codes"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_operator_with_a_prologue_passes_opcheck(dropout, backend, keep):
    x, weight, bias = leaves((keep != "nothing",) * 2 + (True,))
    residual = torch.randn_like(x).requires_grad_(x.requires_grad)
    seed = torch.tensor([5]) if dropout else None
    torch.library.opcheck(OPERATOR, (x, weight, bias, residual, seed, *settings(backend, LLAMA, dropout, keep)))


@pytest.mark.slow(take=4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", ["stream", "normed", "codes", "stream, codes"])
def test_results_share_no_memory(keep, backend):
    x = leaves()[0]
    torch.library.opcheck(OPERATOR, (x, None, None, None, None, *settings(backend, LAYER_NORM, 0.0, keep)))


@pytest.mark.slow(take=6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", TELLING, ids=str)
def test_backward_operator_passes_opcheck(subset, backend):
    x, weight, bias = leaves((False, False, False), dtype=torch.bfloat16)
    y, _, _, stats, _ = OPERATOR(x, weight, bias, None, None, *settings(backend))
    need_dx, need_dweight, need_dbias = subset
    need_x = need_dx or need_dweight
    tensors = (y, None, x if need_x else None, weight if need_dx else None, None, stats if need_x else None, None)
    args = (*tensors, need_dx, False, need_dweight, need_dbias, torch.float32, *settings(backend))
    assert len(BACKWARD(*args)) == sum(subset)
    torch.library.opcheck(BACKWARD, args)


@pytest.mark.slow(take=4)
@pytest.mark.parametrize("keep", ["stream", "stream, codes"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_backward_operator_with_a_prologue_passes_opcheck(dropout, backend, keep):
    x, weight, bias = leaves((False, False, False), dtype=torch.bfloat16)
    seed = torch.tensor([5]) if dropout else None
    options = settings(backend, LLAMA, dropout, keep)
    y, stream, codes, stats, scale = OPERATOR(x, weight, bias, x, seed, *options)
    kept = (stream, weight, seed, stats, None) if keep == "stream" else (codes, weight, seed, stats, scale)
    args = (y, y, *kept, True, dropout > 0, True, True, torch.float32, *options)
    assert len(BACKWARD(*args)) == (4 if dropout else 3)
    torch.library.opcheck(BACKWARD, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", ["normed", "codes"])
def test_what_makes_a_result_again_passes_opcheck(keep, backend):
    x, weight, bias = leaves((False, False, False), dtype=torch.bfloat16)
    options = settings(backend, LLAMA, 0.0, keep)
    y, _, rows, stats, scale = OPERATOR(x, weight, bias, x, None, *options)
    args = (rows, weight, bias, stats, scale if keep == "codes" else None, torch.bfloat16, *options)
    torch.library.opcheck(AGAIN, args)
    # x_hat is kept to a bit in 2^8, or to a half in 127 of the largest.
    torch.testing.assert_close(AGAIN(*args), y.flatten(0, -2), rtol=0.03, atol=0.05)


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_gradcheck(subset):
    tensors = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves(subset, shape=(3, 5))]
    assert torch.autograd.gradcheck(lambda *t: ops.layer_norm(*t, settings=OpSettings("reference")), tensors)


@pytest.mark.parametrize("return_stream", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradcheck_of_a_prologue(dropout, kind, return_stream):
    tensors = [t.detach().double().requires_grad_() for t in leaves(shape=(3, 5))]
    tensors.append(torch.randn_like(tensors[0]).requires_grad_())

    def function(x, weight, bias, residual):
        return ops.dropout_add_norm(
            *(x, residual, weight, bias, dataclasses.replace(KINDS[kind], round_normed=False)),
            dropout=dropout,
            seed=torch.tensor([1]),
            return_stream=return_stream,
            settings=OpSettings("reference"),
        )

    assert torch.autograd.gradcheck(function, tensors)


def test_a_second_derivative_is_refused():
    x, weight, bias = leaves()
    with pytest.raises(FastLNError, match="create_graph"):
        torch.autograd.grad(ops.layer_norm(x, weight, bias).sum(), x, create_graph=True)


class Block(nn.Module):
    """A module that has every norm: alone, of a new stream, of a sum, each a function of the parameters before it."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(1)
        self.settings = OpSettings(backend)
        self.norm, self.linear = nn.LayerNorm(N_COLS), nn.Linear(N_COLS, N_COLS)
        stand_in(self.norm, LayerNorm, OpSettings(backend))
        self.weight, self.bias = nn.Parameter(torch.randn(N_COLS)), nn.Parameter(torch.randn(N_COLS))

    def forward(self, x):
        options = {"dropout": 0.5 if self.training else 0.0, "settings": self.settings}
        y, stream = ops.dropout_add_norm(
            *(self.linear(self.norm(x)), x, self.weight, None, LLAMA), return_stream=True, **options
        )
        y = ops.rms_norm(self.linear(y), self.weight, 1e-6, 1.0, settings=self.settings)
        return ops.dropout_add_norm(y, stream, self.weight, self.bias, GEMMA, **options).sin()


def outcome(function, module, n_rows):
    """The result of a module or of what was compiled of it, and the gradients of its input and its parameters."""
    x = leaves(shape=(n_rows, 5, N_COLS))[0]
    torch.manual_seed(2)
    y = function(x)
    return y, torch.autograd.grad(y.square().sum(), (x, *module.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_module_compiled_whole_equals_eager(training, backend):
    module = Block(backend).train(training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n_rows in (2, 3):
        torch.testing.assert_close(outcome(compiled, module, n_rows), outcome(module, module, n_rows))


@pytest.mark.slow(pool="inductor")
@pytest.mark.parametrize("training", [True, False])
def test_inductor_equals_eager(training):
    module = Block("auto").train(training)
    with torch._inductor.config.patch(fallback_random=True):
        got = outcome(torch.compile(module, fullgraph=True), module, 2)
    torch.testing.assert_close(got, outcome(module, module, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", [(False, True, False), (False, False, True)], ids=str)
def test_compiled_without_a_gradient_of_x(subset, backend):
    def function(x, weight, bias):
        return ops.layer_norm(x * 2, weight, bias, settings=OpSettings(backend)).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, leaves(subset)), gradients(function, leaves(subset)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["layer", "gemma"])
def test_transforms_and_forward_derivatives_see_the_definition(kind, backend):
    kind, (x, weight, bias) = KINDS[kind], [t.detach() for t in leaves()]

    def ours(x, weight):
        return ops.dropout_add_norm(2 * x, x, weight, bias, kind, settings=OpSettings(backend)).sin()

    def stock(x, weight):
        return stock_norm(3 * x, weight, bias, kind).sin()

    tangents = (torch.ones_like(x), weight)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda *t: f(*t).sum(), (0, 1))(x, weight),
        "vmap": lambda f: torch.vmap(f)(x, torch.stack((weight, -weight))),
        "per-row gradients": lambda f: torch.vmap(torch.func.grad(lambda *t: f(*t).sum(), 1), (0, None))(x, weight),
        "jvp": lambda f: torch.func.jvp(f, (x, weight), tangents),
        "second derivative": lambda f: torch.func.jacrev(torch.func.grad(lambda t: f(t, weight).sum()))(x[0, 0]),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(ours), transform(stock), rtol=1e-3, atol=1e-4, msg=name)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip((x, weight), tangents, strict=True)]
        got, want = (torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent for f in (ours, stock))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_meta_tensors(backend):
    x = torch.empty(2, 3, N_COLS, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = ops.layer_norm(x, None, None, settings=OpSettings(backend))
    y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape) == (x.shape, x.dtype, x.shape)
