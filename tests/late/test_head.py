"""Heads whose logits wait: when they do, in copies, checkpoints and compiled code."""

import copy
import pickle

import pytest
import torch
from late_logits import N_CLASSES, rows
from torch import nn
from torch.nn import functional as F

from fastln.late.logits import LazyLogits
from fastln.standins.lm_head import LMHead
from fastln.standins.part import stand_back, stand_in


def head(**settings):
    linear = nn.Linear(4, N_CLASSES, **settings)
    stand_in(linear, LMHead)
    return linear


def is_lazy(logits):
    return isinstance(logits, LazyLogits)


def test_when_the_head_is_lazy():
    hidden, linear = torch.randn(2, 5, 4, requires_grad=True), head()
    assert is_lazy(linear(hidden))
    assert is_lazy(linear(hidden.detach()))  # the weight trains
    linear.requires_grad_(False)
    assert is_lazy(linear(hidden))
    assert not is_lazy(linear(hidden.detach()))
    assert not is_lazy(linear(hidden[0, 0]))
    assert not is_lazy(torch.func.vmap(linear)(hidden))
    with torch.no_grad():
        assert not is_lazy(linear(hidden))
    assert not is_lazy(linear.eval()(hidden))
    for register in (
        linear.register_forward_hook,
        linear.register_forward_pre_hook,
        linear.register_full_backward_hook,
        linear.register_full_backward_pre_hook,
    ):
        hook = register(lambda *_: None)
        assert not is_lazy(linear.train()(hidden))
        hook.remove()
    assert is_lazy(linear(hidden))
    assert not is_lazy(copy.deepcopy(linear).to("meta")(hidden.to("meta")))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(hidden.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert is_lazy(linear(hidden.bfloat16()))
        assert not is_lazy(copy.deepcopy(linear).double()(hidden.double()))


def test_head_compiles_in_one_graph():
    linear, hidden = head(), torch.randn(2, 5, 4, requires_grad=True)
    compiled = torch.compile(lambda x: rows(linear(x)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(hidden), rows(F.linear(hidden, linear.weight, linear.bias)))


def test_head_keeps_its_identity():
    linear = nn.Linear(4, N_CLASSES)
    weight, keys = linear.weight, list(linear.state_dict())
    stand_in(linear, LMHead)
    assert linear.weight is weight
    assert list(linear.state_dict()) == keys
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert is_lazy(twin(torch.randn(2, 5, 4)))
    stand_back(linear)
    assert type(linear) is nn.Linear
    assert vars(linear).keys() == vars(nn.Linear(4, N_CLASSES)).keys()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(use_reentrant):
    linear = head()
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    logits = torch.utils.checkpoint.checkpoint(linear, hidden, use_reentrant=use_reentrant)
    got = torch.autograd.grad(rows(logits), hidden) if not use_reentrant else None
    if use_reentrant:
        rows(logits).backward()
        got = (hidden.grad,)
    want = torch.autograd.grad(rows(F.linear(hidden, linear.weight, linear.bias)), hidden)
    torch.testing.assert_close(got, want)
