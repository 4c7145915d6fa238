"""Logits that wait: their own gradients, for who asks for them."""

import pytest
import torch
from late_logits import LAZY_USES, parts, rows
from tiny import Twice
from torch.nn import functional as F

from fastln.errors import FastLNError
from fastln.late.logits import LazyLogits


@pytest.mark.parametrize("ask", ["retain_grad", "register_hook", "grad", "backward"])
@pytest.mark.parametrize("use", LAZY_USES)
def test_gradients_of_logits_whose_loss_was_computed_without_them(use, ask):
    """They are there for who asks, and so are the gradients of what the logits are made of."""

    def gradients(make):
        tensors = parts()
        logits = make(tensors[0] * 1, *tensors[1:])
        loss = LAZY_USES[use](logits)
        if ask == "grad":
            return torch.autograd.grad(loss, [logits, *tensors])
        if ask == "backward":
            loss.backward(inputs=[logits, *tensors])
            return [logits.grad, *(tensor.grad for tensor in tensors)]
        if ask == "retain_grad":
            logits.retain_grad()
        else:
            seen = []
            logits.register_hook(lambda gradient: seen.append(gradient) or gradient * 2)
        loss.backward()
        return [logits.grad if ask == "retain_grad" else seen[0], *(tensor.grad for tensor in tensors)]

    for got, want in zip(gradients(LazyLogits.of), gradients(F.linear), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_uses_after_a_gradient_was_asked_for_count_too():
    def gradients(make):
        tensors = parts()
        logits = make(tensors[0] * 1, *tensors[1:])
        loss = rows(logits.float())
        logits.retain_grad()
        (loss + logits.sin().sum() + Twice.apply(logits).cos().sum() + rows(logits)).backward()
        return [logits.grad, *(tensor.grad for tensor in tensors)]

    for got, want in zip(gradients(LazyLogits.of), gradients(F.linear), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use", [rows, lambda z: z.sin().sum()], ids=["a loss", "another use"])
def test_a_gradient_that_is_asked_for_before_any_use(use):
    def gradients(make):
        tensors = parts()
        logits = make(tensors[0] * 1, *tensors[1:])
        logits.retain_grad()
        use(logits).backward()
        return [logits.grad, *(tensor.grad for tensor in tensors)]

    for got, want in zip(gradients(LazyLogits.of), gradients(F.linear), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def by_a_hook_on_the_node(logits, seen):
    logits.grad_fn.register_prehook(lambda gradients: seen.append(gradients[0]))


def by_a_hook_on_many(logits, seen):
    torch.autograd.graph.register_multi_grad_hook((logits,), lambda gradients: seen.append(gradients[0]))


@pytest.mark.parametrize("ask", [by_a_hook_on_the_node, by_a_hook_on_many])
def test_hooks_on_the_node_of_logits_see_the_gradient(ask):
    def gradients(make):
        tensors, seen = parts(), []
        logits = make(tensors[0] * 1, *tensors[1:])
        loss = rows(logits)
        ask(logits, seen)
        loss.backward()
        return [*seen, *(tensor.grad for tensor in tensors)]

    got, want = gradients(LazyLogits.of), gradients(F.linear)
    assert len(got) == len(want) == 4
    for ours, stocks in zip(got, want, strict=True):
        torch.testing.assert_close(ours, stocks, rtol=1e-5, atol=1e-6)


def test_a_kept_gradient_is_one_like_any_other():
    logits = LazyLogits.of(*parts())
    loss = rows(logits)
    assert not logits.retains_grad
    logits.retain_grad()
    assert logits.retains_grad
    loss.backward()
    assert logits.grad.shape == logits.shape
    logits.grad = None
    assert logits.grad is None


def test_a_gradient_asked_for_too_late_is_an_error():
    logits = LazyLogits.of(*parts())
    loss = rows(logits)
    logits.argmax(-1)
    with pytest.raises(FastLNError, match="read before their gradient was asked for"):
        logits.retain_grad()
    loss.backward()
