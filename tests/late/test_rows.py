"""Rows that wait: which uses compute but some of them, and that every use finds what stock code would."""

import copy
import pickle

import pytest
import torch
from late_tail import BATCH, LABELS, LENGTH, N_ROWS, WIDTH, Tail, check, inputs, loss_of
from tiny import Twice
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastln import ops
from fastln.late.logits import LazyLogits
from fastln.late.rows import LazyRows


def overwritten_after_a_sum(h):
    later = h + 1
    h.mul_(0.5)
    return later.sin().sum() + h.sum()


def looked_at_without_autograd(h):
    with torch.no_grad():
        assert not h.argmax(-1).requires_grad
    return h[:, 0].sin().sum()


PICKS = {  # and how many rows of them
    "first": (lambda h: h[:, 0].sin().sum(), 2),
    "first, all columns": (lambda h: h[:, 0, :].sin().sum(), 2),
    "last": (lambda h: h[:, -1:].sin().sum(), 2),
    "a sequence": (lambda h: h[1].sin().sum(), LENGTH),
    "one each": (lambda h: h[torch.arange(BATCH), torch.tensor([3, 5])].sin().sum(), 2),
    "by a mask": (lambda h: h[LABELS != -100].sin().sum(), 3),
    "of all in a row": (lambda h: h.reshape(-1, WIDTH)[3:5].sin().sum(), 2),
    "after a whole slice": (lambda h: h[:, slice(0, None), :][:, 0].sin().sum(), 2),
    "with labels": (lambda h: loss_of(h.float()), 3),
    "with labels, summed": (lambda h: loss_of(h, reduction="sum", label_smoothing=0.1), 3),
    "with labels and weights": (lambda h: loss_of(h, weight=torch.arange(1.0, WIDTH + 1)), 3),
    "then more": (lambda h: loss_of(torch.tanh(h * 0.5) + 1), 3),
    "by a layer's result": (lambda h: F.linear(h, torch.ones(3, WIDTH))[:, 2].sin().sum(), 2),
    "shifted": (lambda h: loss_of(h[..., :-1, :].reshape(-1, WIDTH), LABELS[..., 1:].reshape(-1)), 3),
    "shifted, most of them": (lambda h: loss_of((h[:, :-1] * 2).contiguous(), LABELS[:, :-1].reshape(-1)), 3),
    "first of the last": (lambda h: h[:, 1:][:, 0].sin().sum(), 2),
    "the last, whatever stands before": (lambda h: h[..., -1, :].sin().sum(), 2),
    "the same again": (lambda h: h[:, 0].sin().sum() + h[:, 0].cos().sum(), 2),
}


def written_through_a_view(h):
    h.view(-1, WIDTH)[torch.tensor([0, 5])] = 0.0
    return h.sin().sum() + h[:, 0].cos().sum()


def written_under_a_view(h):
    view = h.view(-1, WIDTH)
    h.mul_(2)
    h.add_(1)
    return view.sin().sum() + h[:, 0].sum()


def written_under_a_cast(h):
    same = h.float()
    same.mul_(2)
    return h.sin().sum()


def logits_of_written(h):
    make = LazyLogits.of if isinstance(h, LazyRows) else F.linear
    logits = make(h, torch.arange(3.0 * WIDTH).view(3, WIDTH), None)
    h.mul_(0)
    return F.cross_entropy(logits.view(-1, 3), LABELS.view(-1).clamp(max=2)) + h.sum()


def doubled_by_a_hook(h):
    h.register_hook(lambda gradient: gradient * 2)
    return h.sin().sum() + h[:, 0].cos().sum()


def kept_gradient(h):
    h.retain_grad()
    loss = h[:, 0].sin().sum()
    gradient = torch.autograd.grad(loss, h, retain_graph=True)[0]
    return loss + gradient.abs().sum()


def dropped_by_name(h):
    torch.manual_seed(4)
    return (ops.dropout(h, p=0.5) != 0).float().mean() + h.sin().sum()


def written_in_a_slice(h):
    h[:, 1:].mul_(2)
    return h.sin().sum()


def written_under_a_slice(h):
    most = h[:, 1:]
    h.mul_(2)
    return most.sin().sum()


def written_under_a_plain_view(h):
    view = h.transpose(1, 2)
    h.mul_(2)
    return view.sin().sum()


def copy_of_a_pick_written(h):
    h[LABELS != -100].mul_(2)
    return h.sin().sum()


def second_pick_written(h):
    first, second = h[:, 0].sum(), h[:, 1]
    second.mul_(2)
    return first + h.sin().sum()


def read_after_later_ones_and_written(h):
    later = h + 1
    loss = later.sin().sum()
    h.mul_(2)
    return loss + h.sin().sum() + later.cos().sum()


def loss_of_written(h):
    rows = h.view(-1, WIDTH)
    rows.mul_(2)
    return F.cross_entropy(rows, LABELS.view(-1))


OTHER_USES = {
    "a loss of what was written": loss_of_written,
    "written in a slice": written_in_a_slice,
    "written under a slice": written_under_a_slice,
    "written under a plain view": written_under_a_plain_view,
    "copy of a pick written": copy_of_a_pick_written,
    "second pick written": second_pick_written,
    "written after later ones were read": read_after_later_ones_and_written,
    "logits written under": logits_of_written,
    "by names": lambda h: (
        torch.reshape(input=h, shape=(-1, WIDTH)).sin().sum()
        + ops.dropout(x=h, p=0.0).sum()
        + F.cross_entropy(input=h.view(-1, WIDTH), target=LABELS.view(-1))
    ),
    "a copied cast written": lambda h: h.to(h.dtype, copy=True).mul_(2).sum() + h.sin().sum(),
    "a slice, a sum of it, all": lambda h: (h[:, 1:] + 1).sin().sum() + h.cos().sum(),
    "a slice of a slice": lambda h: h[:, 1:][:, :-1].contiguous().view(-1, WIDTH).sin().sum(),
    "memory laid out anew": lambda h: (
        h[None].to(memory_format=torch.channels_last).sin().sum()
        + h.view(1, BATCH, LENGTH, WIDTH).float(memory_format=torch.channels_last).cos().sum()
    ),
    "written through a view": written_through_a_view,
    "written under a view": written_under_a_view,
    "written under a cast": written_under_a_cast,
    "doubled by a hook": doubled_by_a_hook,
    "with its gradient": kept_gradient,
    "dropped by name": dropped_by_name,
    "silu in place": lambda h: F.silu(h, inplace=True).sum() + h.sin().sum(),
    "elu in place": lambda h: F.elu(h, 1.0, inplace=True).sum() + h.sin().sum(),
    "added to a product": lambda h: torch.addmm(torch.ones(N_ROWS, 2), h.view(-1, WIDTH), torch.ones(WIDTH, 2)).sum(),
    "mean": lambda h: h.mean(1).sin().sum(),
    "whole": lambda h: h.sin().sum(),
    "most": lambda h: h.repeat(1, 2, 1).view(BATCH, 2 * LENGTH, WIDTH)[:, 1:].sin().sum() + h[:, 1:].sin().sum(),
    "columns of all": lambda h: h[..., 1:4].sin().sum() + h[..., 2].sum() + h[:, :, 2:3].sum(),
    "a new dimension": lambda h: h[:, None].sin().sum() + h[[0, 1]].sum() + h[:, True].sum(),
    "one row, then another": lambda h: h[:, 0].sin().sum() + h[:, 1].sin().sum(),
    "one row, then all": lambda h: h[:, 0].sin().sum() + h.cos().sum(),
    "all, then one row": lambda h: h.cos().sum() + h[:, 0].sin().sum(),
    "one row, then more of it": lambda h: h[:, 0].sin().sum() + (h * 2)[:, :2].sin().sum(),
    "columns": lambda h: h[..., 2].sin().sum(),
    "some columns": lambda h: h[:, 0, :3].sin().sum(),
    "heads": lambda h: h.view(BATCH, LENGTH, 2, 3).transpose(1, 2).sin().sum(),
    "each label": lambda h: loss_of(h, reduction="none").sin().sum(),
    "probabilities": lambda h: F.cross_entropy(h.view(-1, WIDTH), torch.full((N_ROWS, WIDTH), 1 / WIDTH)),
    "plus one sequence": lambda h: (h + torch.ones(1, LENGTH, WIDTH))[:, 0].sin().sum(),
    "plus a column": lambda h: (h + torch.ones(BATCH, LENGTH, 1)).sin().sum(),
    "as a weight": lambda h: F.linear(torch.ones(3, WIDTH), h[0] * 1).sin().sum() + F.linear(h, h[0, :3]).sum(),
    "function": lambda h: Twice.apply(h).sin().sum(),
    "function, then itself": lambda h: Twice.apply(h).sin().sum() + h[:, 0].sin().sum(),
    "concatenated": lambda h: torch.cat([h, h]).exp().sum(),
    "overwritten": lambda h: h.mul_(0.5).sin().sum() + h[:, 0].sum(),
    "overwritten after a sum": overwritten_after_a_sum,
    "row overwritten": lambda h: h.index_fill_(1, torch.tensor([0]), 0.0)[:, :2].sin().sum(),
    "activated in place": lambda h: F.relu(h, inplace=True).sum() + h.sin().sum(),
    "without autograd": looked_at_without_autograd,
    "no label": lambda h: torch.nan_to_num(loss_of(h, torch.full_like(LABELS, -100))) + h.sin().sum(),
}


def run(use, lazy, tail=None):
    tail, (attended, residual) = tail or Tail(), inputs()
    hidden = tail(LazyRows.of(attended * 1) if lazy else attended * 1, residual * 1)
    assert isinstance(hidden, LazyRows) == lazy
    loss = use(hidden)
    assert type(loss) is Tensor
    gradients = torch.autograd.grad(loss, [attended, residual, *tail.parameters()], allow_unused=True)
    return [loss, *gradients]


@pytest.mark.parametrize("use", PICKS)
def test_picked_rows_alone_are_computed(use, computed_rows):
    function, n_rows = PICKS[use]
    got = run(function, lazy=True)
    assert set(computed_rows) == {n_rows}
    check(got, run(function, lazy=False))


@pytest.mark.parametrize("use", OTHER_USES)
def test_every_other_use(use):
    check(run(OTHER_USES[use], lazy=True), run(OTHER_USES[use], lazy=False))


def test_what_nobody_reads_is_not_computed(computed_rows):
    tail, (attended, residual) = Tail(), inputs()
    tail(LazyRows.of(attended), residual)
    assert not computed_rows


@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_and_shapes_are_those_of_stock(autocast, computed_rows):
    tail = Tail() if autocast else Tail().bfloat16()
    attended, residual = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        lazy, stock = tail(LazyRows.of(attended), residual), tail(attended, residual)
        first = lazy[:, 0] * 1  # what is picked is picked under the autocast of the forward pass
    second = tail(LazyRows.of(attended), residual)[:, 0] if not autocast else lazy[:, 0]
    assert not any(n == N_ROWS for n in computed_rows)
    for a, b in ((lazy, stock), (lazy.view(-1, WIDTH), stock.view(-1, WIDTH)), (lazy.float(), stock.float())):
        assert (a.shape, a.stride(), a.dtype, a.device, a.ndim) == (b.shape, b.stride(), b.dtype, b.device, b.ndim)
        assert (a.size(-1), a.numel(), len(a), a.dim()) == (b.size(-1), b.numel(), len(b), b.dim())
        assert a.requires_grad
        assert not a.is_leaf
    for picked in (first, second):
        torch.testing.assert_close(picked, stock[:, 0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lazy + 0, stock, rtol=2e-2, atol=2e-2)


def test_dropout_draws_once():
    """What a row was when it was picked, it is later; nothing is drawn when rows are computed."""
    tail, (attended, residual) = Tail(dropout=0.5), inputs()
    lazy = tail(LazyRows.of(attended), residual)
    state = torch.get_rng_state()
    rows = lazy[:, 2]
    doubled = (lazy * 2)[:, 1:4]
    torch.testing.assert_close(doubled[:, 1], 2 * rows)
    torch.testing.assert_close(lazy.detach()[:, 2], rows)
    assert torch.equal(torch.get_rng_state(), state)
    other = tail(LazyRows.of(attended), residual)[:, 2]
    assert not torch.equal(other, rows)
    F.dropout(tail(LazyRows.of(attended), residual), 0.5)  # by stock code, which draws when it is called
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_block(use_reentrant):
    tail, (attended, residual) = Tail(dropout=0.5), inputs()

    def block(attended, residual):
        return tail(LazyRows.of(attended) if torch.is_grad_enabled() else attended, residual)

    def gradients(hidden):
        for x in (attended, residual, *tail.parameters()):
            x.grad = None
        hidden[:, 0].sin().sum().backward()
        return [x.grad for x in (attended, residual, *tail.parameters())]

    torch.manual_seed(2)
    got = gradients(checkpoint(block, attended, residual, use_reentrant=use_reentrant))
    torch.manual_seed(2)
    want = gradients(block(attended, residual))
    if use_reentrant:  # computes all rows at first, which draws other numbers for the one that is picked
        assert all((a is None) == (b is None) for a, b in zip(got, want, strict=True))
    else:
        check(got, want)


def test_a_checkpoint_that_the_rows_go_into():
    """Its backward computes it again, with the rows as they were."""
    tail, (attended, residual) = Tail(dropout=0.5), inputs()
    weight = torch.randn(WIDTH, WIDTH)

    def after(hidden):
        mixed = F.linear(hidden, weight).view(BATCH, LENGTH, 2, 3).transpose(1, 2)
        return ops.dropout(mixed.softmax(-1).contiguous(), 0.5).sin().sum() + hidden[:, 0].sum()

    def gradients(after):
        torch.manual_seed(3)
        loss = after(tail(LazyRows.of(attended * 1), residual * 1))
        return [loss, *torch.autograd.grad(loss, [attended, residual, *tail.parameters()])]

    check(gradients(lambda h: checkpoint(after, h, use_reentrant=False)), gradients(after))


def test_hooks_on_saved_tensors_see_what_is_kept_for_the_rows():
    tail, (attended, residual) = Tail(), inputs()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):
        hidden = tail(LazyRows.of(attended), residual)
        before = len(seen)
        hidden[:, 0].sum()
        assert len(seen) > before
    assert all(len(shape) < 2 or shape[0] != N_ROWS for shape in seen)


def test_copies_are_plain_tensors():
    tail, (attended, residual) = Tail(), inputs()
    lazy, plain = tail(LazyRows.of(attended), residual), tail(attended, residual)
    assert type(pickle.loads(pickle.dumps(lazy.detach()))) is Tensor
    assert torch.equal(copy.deepcopy(lazy.detach()), plain)
    assert repr(lazy.detach()) == repr(plain.detach())
