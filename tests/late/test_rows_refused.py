"""Rows that wait: what was written since is an error or counts as it was, and nothing stays behind."""

import gc
import weakref

import pytest
import torch
from late_tail import BATCH, LENGTH, WIDTH, Tail, check, inputs, loss_of
from tiny import Twice
from torch import Tensor

from fastln.errors import FastLNError
from fastln.late.logits import LazyLogits
from fastln.late.rows import LazyRows


def test_compiled_code_cannot_write():
    tail, (attended, residual) = Tail(), inputs()
    lazy = tail(LazyRows.of(attended), residual)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(FastLNError, match="clone"):
        lazy.mul_(2)


@pytest.mark.parametrize("use", [Tensor.sum, loss_of, lambda h: h[:, 0]], ids=["all", "labels", "first"])
def test_written_parts_are_an_error(use):
    tail, (attended, residual) = Tail(), inputs()
    lazy, seen = (tail(LazyRows.of(attended), residual) for _ in range(2))
    seen.sum()
    with torch.no_grad():
        tail.up.weight.add_(1)
    with pytest.raises(FastLNError, match=r"read it before optimizer.step\(\)"):
        use(lazy)
    use(seen)


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("use", [Tensor.sum, loss_of, lambda h: h[:, 0].sum()], ids=["all", "labels", "first"])
def test_short_vectors_count_as_they_were(use, settings):
    """Norms' weights and biases that an optimizer has written to; a matrix that it wrote to is an error."""
    tail, (attended, residual) = Tail(), inputs()
    vectors = [parameter for parameter in tail.parameters() if parameter.ndim == 1]
    lazy, want = tail(LazyRows.of(attended), residual), use(tail(attended, residual))
    with_matrix = tail(LazyRows.of(attended), residual)
    loss_of(lazy).backward()
    torch.optim.AdamW(vectors, lr=0.1, **settings).step()
    torch.testing.assert_close(use(lazy), want)
    torch.optim.AdamW(tail.parameters(), **settings).step()
    with pytest.raises(FastLNError, match=r"read it before optimizer.step\(\)"):
        use(with_matrix)


def test_a_write_into_a_pick_is_an_error():
    tail, (attended, residual) = Tail(), inputs()
    hidden = tail(LazyRows.of(attended), residual)
    hidden[:, 0].mul_(2)
    for use in (lambda: hidden[:, 0], lambda: hidden.sum(), lambda: (hidden + 1).sum()):
        with pytest.raises(FastLNError, match="through a view"):
            use()


def test_a_write_through_a_view_is_an_error():
    tail, (attended, residual) = Tail(), inputs()
    hidden = tail(LazyRows.of(attended), residual)
    later = hidden + 1
    hidden.transpose(1, 2).mul_(2)
    with pytest.raises(FastLNError, match="through a view"):
        later.sum()


def test_rows_that_autograd_alone_saw_are_checked_too():
    tail, (attended, residual) = Tail(), inputs()
    loss = Twice.apply(tail(LazyRows.of(attended), residual)).sin().sum()
    with pytest.raises(FastLNError, match="create_graph"):
        torch.autograd.grad(loss, attended, create_graph=True)
    with torch.no_grad():
        tail.up.weight.add_(1)
    with pytest.raises(FastLNError, match=r"read it before optimizer.step\(\)"):
        loss.backward()


def test_a_gradient_that_autograd_alone_saw_is_that_of_the_rows_as_they_were_drawn():
    """Some were picked, with elements dropped by their places among those."""
    tail, (attended, residual) = Tail(dropout=0.5), inputs()

    def gradients(twice):
        torch.manual_seed(5)
        hidden = tail(LazyRows.of(attended * 1), residual * 1)
        loss = hidden[:, 3].sum() + twice(hidden).sin().sum()
        return [loss, *torch.autograd.grad(loss, [attended, residual, *tail.parameters()])]

    check(gradients(Twice.apply), gradients(lambda h: h * 2 + 0))


class Unread(torch.autograd.Function):
    """Does not look at what it sends a gradient to."""

    @staticmethod
    def forward(ctx, x, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return torch.ones(BATCH, LENGTH, WIDTH), dy


def test_a_gradient_to_rows_that_nobody_read_is_an_error():
    tail, (attended, residual) = Tail(), inputs()
    hidden = tail(LazyRows.of(attended), residual)
    with pytest.raises(FastLNError, match="without reading"):
        Unread.apply(hidden, attended).sum().backward()


def test_nothing_is_left_behind():
    tail, (attended, residual) = Tail(), inputs()
    lazy = tail(LazyRows.of(attended), residual)
    loss_of(lazy).backward()
    gone = weakref.ref(lazy)
    gc.disable()
    try:
        del lazy
        assert gone() is None
    finally:
        gc.enable()


def test_a_loss_does_not_keep_alive_what_waits():
    """The inputs of the last block's rows go with the outputs, though its graph reaches the late tensors' nodes."""
    tail, (attended, residual) = Tail(), inputs()
    hidden = tail(LazyRows.of(attended), residual)
    logits = LazyLogits.of(hidden, torch.randn(6, WIDTH), None)
    loss = loss_of(logits.float())
    rows = weakref.ref(hidden._rows)
    gc.disable()
    try:
        del hidden, logits
        assert rows() is None
    finally:
        gc.enable()
    loss.backward()


@pytest.mark.parametrize(
    "ask",
    [
        lambda h, loss: h.retain_grad(),
        lambda h, loss: h.register_hook(lambda gradient: None),
        lambda h, loss: torch.autograd.grad(loss, h),
        lambda h, loss: torch.autograd.grad(outputs=loss, inputs=[h]),
    ],
)
def test_a_gradient_that_would_miss_rows_used_before_is_an_error(ask):
    hidden = Tail()(LazyRows.of(inputs()[0]), inputs()[1])
    loss = hidden[:, 0].sin().sum()
    with pytest.raises(FastLNError, match="used before their gradient was asked for"):
        ask(hidden, loss)
    loss.backward()
    assert hidden.cos().sum().requires_grad, "and other uses go on"
