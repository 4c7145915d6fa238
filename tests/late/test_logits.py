"""Logits that wait: which uses leave them uncomputed, and that every other use finds what stock code would."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from late_logits import LABELS, LAZY_USES, N_CLASSES, parts, rows
from tiny import Twice
from torch import Tensor
from torch.nn import functional as F

from fastln.errors import FastLNError
from fastln.late.logits import LazyLogits


def overwritten_through_a_view(logits):
    view = logits.view(-1, N_CLASSES)
    view[:, 2] = 0.0
    return rows(logits)


def overwritten_under_a_view(logits):
    view = logits[:, 1:]
    logits[..., 2] = 0.0
    return F.cross_entropy(view.reshape(-1, N_CLASSES), LABELS[:, 1:].reshape(-1))


def overwritten_after_a_copy(logits):
    copied = logits[:, :-1].contiguous()
    logits[..., 2] = 0.0
    return rows(copied, LABELS[:, :-1]) + logits.mean()


def scaled_and_overwritten(logits):
    scaled = logits * 0.5
    logits[..., 2] = 0.0
    return rows(scaled.tanh()) + logits.mean()


def looked_at_without_autograd(logits):
    with torch.no_grad():
        assert not logits.argmax(-1).requires_grad
    return rows(logits)


def looked_at_in_inference_mode(logits):
    with torch.inference_mode():
        logits.argmax(-1)
    return rows(logits)


def used_by_compiled_code(logits):
    with torch._C.DisableTorchFunctionSubclass():
        first = logits.sin().sum()
    return first + logits[:, 1:].cos().sum()


def view_used_by_compiled_code(logits):
    view = logits[:, 1:].float()
    with torch._C.DisableTorchFunctionSubclass():
        first = view.sin().sum()
    return first + rows(logits)


OTHER_USES = {
    "capped twice": lambda z: rows(torch.tanh(torch.tanh(z))),
    "scaled by a tensor": lambda z: rows(z * torch.tensor(0.3)),
    "scaled by nothing": lambda z: rows(z * 0),
    "turned": lambda z: rows(z * -2),
    "divided into": lambda z: rows(2 / (z.exp() + 1)),
    "scaled in place": lambda z: rows(z.mul_(0.5)),
    "scaled and overwritten": scaled_and_overwritten,
    "scaled, by a function": lambda z: Twice.apply(z * 0.3).sin().sum(),
    "capped, by a function": lambda z: Twice.apply(3 * torch.tanh(z / 2)).sin().sum(),
    "capped view, by a function": lambda z: Twice.apply((3 * torch.tanh(z / 2))[:, 1:].float()).sin().sum(),
    "capped and looked at": lambda z: (3 * torch.tanh(z / 2)).pow(2).sum() + rows(z),
    "plus bias": lambda z: rows(z + torch.arange(7.0)),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, 7), torch.full((10, 7), 1 / 7)),
    "class weights": lambda z: rows(z, weight=torch.arange(1.0, 8)),
    "some classes": lambda z: z[..., :4].logsumexp(-1).sum(),
    "all classes by a slice": lambda z: rows(z[..., :N_CLASSES].contiguous()),
    "a class": lambda z: z[..., 1].sum(),
    "by a mask": lambda z: F.cross_entropy(z[LABELS != -100], LABELS[LABELS != -100]),
    "other rows": lambda z: z.view(2, -1)[:, 3:].pow(2).sum(),
    "double": lambda z: rows(z.double()),
    "concatenated": lambda z: torch.cat([z, z]).exp().sum(),
    "function": lambda z: Twice.apply(z).sin().sum(),
    "function on a view": lambda z: Twice.apply(z[:, 1:].float()).sin().sum(),
    "overwritten": lambda z: rows(z.clone().mul_(2)) + z.mul_(0.5).sum(),
    "overwritten through a view": overwritten_through_a_view,
    "overwritten under a view": overwritten_under_a_view,
    "overwritten after a copy": overwritten_after_a_copy,
    "without autograd": looked_at_without_autograd,
    "in inference mode": looked_at_in_inference_mode,
    "by compiled code": used_by_compiled_code,
    "view by compiled code": view_used_by_compiled_code,
    "compiled": lambda z: torch.compile(lambda z: rows(z.float()), backend="eager")(z),
}


def loss_and_gradients(make, use, tensors):
    hidden, weight, bias = tensors
    loss = use(make(hidden * 1, weight, bias))
    return [loss, *torch.autograd.grad(loss, tensors)]


@pytest.fixture
def computed(monkeypatch):
    """The logits that were computed, in place of none."""
    log = []
    compute = LazyLogits._compute
    monkeypatch.setattr(LazyLogits, "_compute", lambda logits, *args: log.append(logits) or compute(logits, *args))
    return log


@pytest.mark.parametrize("d", [4, N_CLASSES, 12])
@pytest.mark.parametrize("use", [*LAZY_USES, *OTHER_USES])
def test_every_use(use, d, computed):
    function = {**LAZY_USES, **OTHER_USES}[use]
    got, want = (loss_and_gradients(make, function, parts(d=d)) for make in (LazyLogits.of, F.linear))
    if use in LAZY_USES:
        assert not computed
    elif use != "compiled" and not (use == "all classes by a slice" and d <= N_CLASSES):
        assert computed
    for actual, expected in zip(got, want, strict=True):
        assert type(actual) is Tensor
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_that_lay_memory_out_anew(dtype, computed):
    hidden, weight = torch.randn(2, 3, 5, 4, dtype=dtype, requires_grad=True), torch.randn(N_CLASSES, 4, dtype=dtype)
    for cast in (Tensor.float, lambda z, **settings: z.to(torch.float32, **settings)):
        got, want = (
            cast(make(hidden, weight, None), memory_format=torch.channels_last) for make in (LazyLogits.of, F.linear)
        )
        assert type(got) is Tensor
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


@pytest.mark.parametrize("d", [4, N_CLASSES])
def test_dimensions_of_one_size(d, computed):
    """Where positions, width and classes count the same, an index into the one is not taken for one into another."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(d, d, d, requires_grad=True), torch.randn(d, d)
    labels = torch.randint(d, (d,))
    for pick in (lambda z: z[..., 1], lambda z: z[:, 1], lambda z: z[1], lambda z: z[:, :, 1]):
        got, want = (
            F.cross_entropy(pick(z), labels) for z in (LazyLogits.of(hidden, weight, None), F.linear(hidden, weight))
        )
        torch.testing.assert_close(got, want)
    assert len(computed) == 2


@pytest.mark.parametrize("widen", [False, True], ids=["as it is", "float"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_low_precision(autocast, widen, computed):
    def run(make):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return loss_and_gradients(make, lambda z: rows(z.float() if widen else z), tensors)

    tensors = parts(torch.float32 if autocast else torch.bfloat16)
    got, want = run(LazyLogits.of), run(F.linear)
    exact = loss_and_gradients(F.linear, rows, [t.detach().double().requires_grad_() for t in tensors])
    assert not computed
    for actual, of_stock, expected in zip(got, want, exact, strict=True):
        assert actual.dtype == of_stock.dtype
        error, of_stock_error = ((x.double() - expected).norm() / expected.norm() for x in (actual, of_stock))
        assert error < of_stock_error + torch.finfo(torch.bfloat16).eps


def test_autocast_is_that_of_the_forward_pass():
    tensors = parts()
    with torch.autocast("cpu", torch.bfloat16):
        lazy, stock = LazyLogits.of(*tensors), F.linear(*tensors)
    assert lazy.dtype == torch.bfloat16
    torch.testing.assert_close(rows(lazy), rows(stock), rtol=1e-2, atol=0)
    assert torch.equal(lazy + 0, stock)
    lazy, plain = LazyLogits.of(*tensors), F.linear(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rows(lazy), rows(plain))
        assert torch.equal(lazy + 0, plain)


def test_what_it_is_can_be_asked(computed):
    tensors = parts()
    lazy, stock = LazyLogits.of(*tensors), F.linear(*tensors)
    for a, b in ((lazy, stock), (lazy[:, 1:], stock[:, 1:]), (lazy[:, 1:].contiguous(), stock[:, 1:].contiguous())):
        assert isinstance(a, Tensor)
        assert (a.shape, a.stride(), a.dtype, a.device, a.ndim) == (b.shape, b.stride(), b.dtype, b.device, b.ndim)
        assert (a.size(-1), a.numel(), len(a), a.dim()) == (b.size(-1), b.numel(), len(b), b.dim())
        assert a.is_contiguous() == b.is_contiguous()
        assert a.requires_grad
        assert not a.is_leaf
    assert not computed
    assert repr(lazy) == repr(stock)


def test_computed_once(computed):
    lazy = LazyLogits.of(*parts())
    first = lazy.detach()
    assert lazy.detach().data_ptr() == first.data_ptr()
    assert lazy.view(-1, N_CLASSES).data_ptr() == first.data_ptr()
    assert lazy[:, 1:].detach().untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def test_copies_are_plain_tensors():
    lazy = LazyLogits.of(*parts())
    plain = F.linear(*parts())
    assert type(pickle.loads(pickle.dumps(lazy.detach()))) is Tensor
    assert torch.equal(copy.deepcopy(lazy.detach()), plain)
    assert lazy.tolist() == plain.tolist()
    assert torch.equal(torch.stack([lazy, lazy])[0], plain)


def test_compiled_code_cannot_write():
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(FastLNError, match="clone"):
        LazyLogits.of(*parts()).mul_(2)


def test_written_parts_are_an_error():
    hidden, weight, bias = parts()
    for written in (weight, hidden):
        lazy = LazyLogits.of(hidden, weight, bias)
        seen = LazyLogits.of(hidden, weight, bias)
        seen.sum()
        with torch.no_grad():
            written.add_(1)
        for use in (Tensor.sum, rows, lambda z: z[:, 1:]):
            with pytest.raises(FastLNError, match=r"read it before optimizer.step\(\)"):
                use(lazy)
        seen.sum()


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_head_that_an_optimizer_wrote_to_is_an_error(settings):
    hidden, weight, bias = parts()
    lazy = LazyLogits.of(hidden, weight, bias)
    rows(lazy).backward()
    torch.optim.AdamW([weight, bias], **settings).step()
    with pytest.raises(FastLNError, match=r"read it before optimizer.step\(\)"):
        lazy.argmax(-1)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_what_no_gradient_moves_hides_nothing(value):
    """A first column without a gradient; and weights that are no numbers have not been written to for that."""
    hidden, weight, bias = parts()
    with torch.no_grad():
        hidden[..., 0], weight[0, 1] = 0.0, value
    lazy = LazyLogits.of(hidden, weight, bias)
    rows(lazy).backward()
    torch.testing.assert_close(lazy + 0, F.linear(hidden, weight, bias), equal_nan=True)
    if value == 0:
        lazy = LazyLogits.of(hidden, weight, bias)
        torch.optim.Adam([weight], fused=True).step()
        with pytest.raises(FastLNError, match=r"read it before optimizer.step\(\)"):
            lazy.argmax(-1)


def test_a_bias_that_trains_counts_as_it_was():
    hidden, weight, bias = parts()
    weight.requires_grad_(False)
    lazy, want = LazyLogits.of(hidden, weight, bias), F.linear(hidden, weight, bias)
    rows(lazy).backward()
    torch.optim.AdamW([bias], fused=True).step()
    assert torch.equal(lazy + 0, want)


def test_nothing_is_left_behind():
    lazy = LazyLogits.of(*parts())
    view = lazy.float()[:, 1:].contiguous()
    rows(view, LABELS[:, 1:]).backward()
    gone = weakref.ref(lazy)
    gc.disable()
    try:
        del lazy, view
        assert gone() is None
    finally:
        gc.enable()
