"""The norm operations: what is kept for backward, and which gradients are computed."""

import functools
import sys
import types

import pytest
import torch
from norm_stock import BACKENDS, LAYER_NORM, N_COLS, SUBSETS, gradients, leaves, stock
from torch.autograd.graph import saved_tensors_hooks

from fastln import ops
from fastln.ops import OpSettings
from fastln.ops.backends import implementation

norm_module = sys.modules["fastln.ops.norm_autograd"]


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
def test_nothing_is_kept_that_no_wanted_gradient_needs(subset, backend, through_operator, monkeypatch):
    x, weight, bias = leaves(subset)
    if through_operator:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    tensors = kept(lambda: ops.layer_norm(x, weight, bias, settings=OpSettings(backend)))
    need_dx, need_dweight, _ = subset
    storages = {t.data_ptr() for t in tensors}
    assert (x.data_ptr() in storages) == (need_dx or need_dweight)
    assert (weight.data_ptr() in storages) == need_dx
    assert bias.data_ptr() not in storages
    n_stats = getattr(implementation("layer_norm", x, OpSettings(backend)), "N_STATS", 1)
    rest = sum(t.numel() for t in tensors if t.data_ptr() not in (x.data_ptr(), weight.data_ptr()))
    assert rest == (n_stats * x[..., 0].numel() if need_dx or need_dweight else 0)


def test_nothing_is_kept_without_grad_mode():
    with torch.no_grad():
        assert kept(lambda: ops.layer_norm(*leaves())) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prologue_keeps_one_tensor_of_rows_and_no_mask(backend):
    x, weight, bias = leaves(dtype=torch.bfloat16)
    residual = torch.randn_like(x).requires_grad_()
    n_rows = x[..., 0].numel()
    returned = []

    def run(return_stream):
        options = {"dropout": 0.1, "return_stream": return_stream, "settings": OpSettings(backend)}
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
    assert kept(lambda: ops.dropout_add_norm(*arguments, dropout=0.1, settings=OpSettings(backend))) == []
    y = ops.dropout_add_norm(*arguments, dropout=0.1, settings=OpSettings(backend))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), bias)[0], torch.full((N_COLS,), 10.0))
    with torch.no_grad():
        torch.testing.assert_close(
            ops.dropout_add_norm(*arguments, settings=OpSettings(backend)),
            stock(2 * x, weight, bias),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.fixture
def calls(monkeypatch):
    """Per call of a backend's backward: the gradients that were asked for, and those that were made."""
    calls = []

    def spying(*arguments):
        kernels = implementation(*arguments)

        def backward(request):
            grads = kernels.norm_backward(request)
            asked = {name for name in grads._fields if getattr(request, f"need_{name}")}
            calls.append((asked, {name for name, grad in grads._asdict().items() if grad is not None}))
            return grads

        return types.SimpleNamespace(norm_forward=kernels.norm_forward, norm_backward=backward)

    monkeypatch.setattr(norm_module, "implementation", spying)
    return calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_only_the_wanted_gradients_are_computed(subset, backend, calls):
    gradients(lambda *t: ops.layer_norm(*t, settings=OpSettings(backend)), leaves(subset))
    wanted = {name for name, want in zip(("dx", "dweight", "dbias"), subset, strict=True) if want}
    assert calls == [(wanted, wanted)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("need_x", "need_residual"), [(True, True), (True, False), (False, True)])
def test_without_dropout_x_and_residual_have_one_gradient(need_x, need_residual, dropout, backend, calls):
    x, residual = (torch.randn(5, N_COLS).requires_grad_(need) for need in (need_x, need_residual))
    seed = torch.tensor([1])
    y = ops.dropout_add_norm(
        x, residual, None, None, LAYER_NORM, dropout=dropout, seed=seed, settings=OpSettings(backend)
    )
    y[:, 0].sum().backward()
    wanted = {name for name, need in (("dx", need_x), ("dresidual", need_residual)) if need} if dropout else {"dx"}
    assert calls == [(wanted, wanted)]
    for leaf, need in ((x, need_x), (residual, need_residual)):
        assert (leaf.grad is not None) == need
    if need_x and need_residual:
        assert torch.equal(x.grad, residual.grad) == (not dropout)
