"""The head's loss: values and gradients, what is kept for backward, how many logits exist at a time."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastln import ops
from fastln.errors import FastLNError
from fastln_kernels import linear_cross_entropy as kernels
from fastln_kernels import reference_int8
from fastln_kernels.cpu import native_linear, products, units

REDUCTIONS = ["mean", "sum", "none"]
IGNORED = -100


def make(n_rows=13, d=6, n_classes=11, dtype=torch.float32, share=0.5, wanted=(True, True, True)):
    """Hidden, weight, bias and labels, `share` of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(bool(want))
        for shape, want in zip(((n_rows, d), (n_classes, d), (n_classes,)), wanted, strict=True)
    )
    labels = torch.randint(n_classes, (n_rows,), generator=generator)
    return hidden, weight, bias, labels.masked_fill(torch.arange(n_rows) < share * n_rows, IGNORED)


def stock(hidden, weight, bias, labels, scale=1.0, softcap=None, **settings):
    logits = F.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, **settings)


def with_gradients(function, tensors, **settings):
    *tensors, labels = tensors
    loss = function(*tensors, labels, **settings)
    # As different as can be from row to row, and exact in every dtype.
    dy = torch.arange(loss.numel()).remainder(5).sub(1.5).to(loss.dtype).view_as(loss)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dy)]


def exact(tensors, **settings):
    *tensors, labels = tensors
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    return with_gradients(stock, (*wide, labels), **settings)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.fixture(params=[1, 3, 100])
def rows_at_a_time(request, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", request.param * 11 * 4)


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_values_and_gradients(share, label_smoothing, reduction):
    tensors = make(share=share)
    settings = {"label_smoothing": label_smoothing, "reduction": reduction}
    got, want = with_gradients(ops.linear_cross_entropy, tensors, **settings), exact(tensors, **settings)
    for actual, expected in zip(got, want, strict=True):
        assert actual.dtype == torch.float32
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("n_rows", "d", "n_classes"), [(1, 1, 2), (129, 33, 257), (40, 64, 1000), (5, 7, 1)])
def test_sizes(n_rows, d, n_classes, reduction):
    hidden, weight, _, labels = make(n_rows, d, n_classes, share=0.3 if n_rows > 1 else 0)
    tensors = (hidden, weight, None, labels)
    got, want = (
        with_gradients(ops.linear_cross_entropy, tensors, reduction=reduction),
        exact(tensors, reduction=reduction),
    )
    for actual, expected in zip(got, want, strict=True):
        assert torch.equal(actual, torch.zeros_like(actual)) or relative_error(actual, expected) < 2e-6
        assert actual.shape == expected.shape
        assert (n_classes == 1) == (not expected.any())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, reduction, monkeypatch):
    """As near to float64 as the stock code is, but for the one more rounding of what is scaled by dy."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 25 * 300 * 4)
    hidden, weight, bias, labels = make(80, 64, 300, dtype, share=0.2)
    with torch.no_grad():
        weight /= 8  # logits of deviation 1
    tensors = (hidden, weight, bias, labels)
    got, base, want = (
        with_gradients(ops.linear_cross_entropy, tensors, reduction=reduction),
        with_gradients(stock, tensors, reduction=reduction),
        exact(tensors, reduction=reduction),
    )
    roundoff = torch.finfo(dtype).eps / 2
    for actual, of_stock, expected in zip(got, base, want, strict=True):
        assert actual.dtype == of_stock.dtype
        assert relative_error(actual, expected) < relative_error(of_stock, expected) + roundoff
    # A logit z is rounded by |z| roundoff at most, which moves p, whose logarithm is the difference of two such, by
    # twice that; then dz, the product and the scaled product are rounded.
    largest = F.linear(*(t.detach().double() for t in (hidden, weight, bias))).abs().max().item()
    assert relative_error(got[1], want[1]) < (2 * largest + 3) * roundoff


@pytest.mark.skipif(products.why_not("linear") is not None, reason=f"{products.why_not('linear')}")
@pytest.mark.parametrize("wanted", [(1, 0, 0), (1, 1, 1)])
def test_bfloat16_in_float32_units(wanted, monkeypatch):
    calls = []
    stock_linear = native_linear.linear
    monkeypatch.setattr(native_linear, "linear", lambda *args, **kw: calls.append(1) or stock_linear(*args, **kw))
    tensors = make(90, 48, 197, torch.bfloat16, wanted=wanted)
    with torch.no_grad():
        tensors[1].div_(8)
    largest = F.linear(*(t.detach().double() for t in tensors[:3])).abs().max().item()
    results = []
    for unit, n_calls in (("float32", 2), ("bfloat16", 0)):
        if unit == "float32" or torch.bfloat16 in products.usable("linear"):
            monkeypatch.setenv(units.VARIABLE, unit)
            results.append(with_gradients(ops.linear_cross_entropy, tensors))
            assert len(calls) == n_calls
            calls.clear()
    for got in results:
        for actual, expected in zip(got, exact(tensors), strict=True):
            # As in the test above.
            assert relative_error(actual, expected) < (2 * largest + 3) * torch.finfo(torch.bfloat16).eps / 2


def test_label_of_vanishing_probability():
    hidden = torch.tensor([[400.0, -400.0]], requires_grad=True)
    loss = ops.linear_cross_entropy(hidden, torch.eye(2), None, torch.tensor([1]))
    assert loss.item() == 800
    loss.backward()
    assert hidden.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing": 0.3}, {"scale": -0.7}, {"scale": 1.5, "softcap": 2.0, "label_smoothing": 0.1}]
)
def test_gradients_in_float64(settings, reduction):
    *tensors, labels = make(5, 3, 4, torch.float64, share=0.4)
    assert torch.autograd.gradcheck(
        lambda *t: ops.linear_cross_entropy(*t, labels, **settings, reduction=reduction), tensors
    )


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_and_capped(dtype, softcap, reduction):
    tensors, settings = make(dtype=dtype), {"scale": 0.3, "softcap": softcap, "reduction": reduction}
    got, base, want = (
        with_gradients(ops.linear_cross_entropy, tensors, **settings),
        with_gradients(stock, tensors, **settings),
        exact(tensors, **settings),
    )
    for actual, of_stock, expected in zip(got, base, want, strict=True):
        assert actual.dtype == of_stock.dtype
        assert relative_error(actual, expected) < relative_error(of_stock, expected) + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n_rows", [0, 4])
def test_no_labels(n_rows, reduction):
    tensors = make(n_rows, share=1.0)
    got, base = (
        with_gradients(function, tensors, reduction=reduction) for function in (ops.linear_cross_entropy, stock)
    )
    for actual, expected in zip(got, base, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    assert got[0].isnan().any() == (reduction == "mean")
    assert not any(gradient.any() for gradient in got[1:])


def test_ignore_index_may_be_a_class():
    *tensors, labels = make(share=0.0)
    labels[::2] = 3
    got, want = (with_gradients(f, (*tensors, labels), ignore_index=3) for f in (ops.linear_cross_entropy, stock))
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected)


def test_shapes_and_strides():
    hidden, weight, bias, labels = make(24)
    hidden = hidden.detach().view(4, 6, 6).transpose(0, 1).requires_grad_()
    labels = labels.view(4, 6).T
    weight = weight.detach().T.contiguous().T.requires_grad_()
    got = with_gradients(ops.linear_cross_entropy, (hidden, weight, bias, labels), reduction="none")
    flat = (hidden.reshape(24, 6), weight, bias, labels.reshape(24))
    want = with_gradients(stock, flat, reduction="none")
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual.reshape(expected.shape), expected)
    assert got[0].shape == labels.shape


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_the_gradients_asked_for(wanted, reduction, monkeypatch):
    complete = with_gradients(ops.linear_cross_entropy, make(), reduction=reduction)[1:]
    asked = []

    def spy(request):
        asked.append([request.need_dhidden, request.need_dweight, request.need_dbias])
        return compute(request)

    compute = kernels.linear_cross_entropy
    monkeypatch.setattr(kernels, "linear_cross_entropy", spy)
    some = with_gradients(ops.linear_cross_entropy, make(wanted=wanted), reduction=reduction)[1:]
    for actual, expected in zip(some, (g for g, want in zip(complete, wanted, strict=True) if want), strict=True):
        assert torch.equal(actual, expected)
    assert [sum(times) for times in zip(*asked, strict=True)] == list(wanted)


def saved(tensors, **settings):
    kept = []
    with saved_tensors_hooks(lambda t: kept.append((tuple(t.shape), t.dtype)) or t, lambda t: t):
        loss = ops.linear_cross_entropy(*tensors, **settings)
    assert loss.requires_grad
    return sorted(kept, key=str)


def test_what_is_kept():
    half, float32 = torch.bfloat16, torch.float32
    rows, of_hidden = ((6,), torch.int64), ((6, 6), half)
    frozen = make(dtype=half, wanted=(True, False, False))
    for reduction in REDUCTIONS:
        assert saved(frozen, reduction=reduction) == sorted([of_hidden, rows], key=str)
    assert saved(make(dtype=half, share=0.0, wanted=(True, False, False))) == [((13, 6), half)]
    trained, parameters = make(dtype=half), [((11, 6), half), ((11,), half)]
    assert saved(trained) == sorted([of_hidden, rows, *parameters], key=str)
    # And the rows and labels, for the gradients to be computed from in backward.
    assert saved(trained, reduction="none") == sorted([of_hidden, rows, of_hidden, rows, *parameters], key=str)
    assert saved(make(wanted=(False, False, True)), reduction="sum") == sorted([rows, ((11,), float32)], key=str)


class MostLogits(TorchDispatchMode):
    """Records the most elements of any result whose last dimension is the classes'."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == 50:
                self.n_elements = max(self.n_elements, x.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_more_logits_than_one_chunk(reduction, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 7 * 50 * 4)
    tensors = make(100, 6, 50)
    with MostLogits() as most:
        with_gradients(ops.linear_cross_entropy, tensors, reduction=reduction)
    assert most.n_elements == 7 * 50
    with MostLogits() as most:
        with_gradients(stock, tensors, reduction=reduction)
    assert most.n_elements == 100 * 50


def test_autocast():
    tensors = make(40, 32, 50)
    with torch.autocast("cpu", torch.bfloat16):
        got, base = (with_gradients(function, tensors) for function in (ops.linear_cross_entropy, stock))
    want = exact(tensors)
    for actual, of_stock, expected in zip(got, base, want, strict=True):
        assert actual.dtype == of_stock.dtype == torch.float32
        assert relative_error(actual, expected) < relative_error(of_stock, expected) + torch.finfo(torch.bfloat16).eps
    wide = make(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear_cross_entropy(*wide).dtype == torch.float64


def test_compiles_in_one_graph():
    tensors, settings = make(), {"scale": 0.5, "softcap": 3.0}
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got, want = (with_gradients(function, tensors, **settings) for function in (compiled, stock))
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected)


def test_meta_tensors():
    *tensors, labels = (t.to("meta") for t in make())
    assert ops.linear_cross_entropy(*tensors, labels, reduction="none").shape == labels.shape


def test_differentiable_once():
    hidden, *rest = make()
    loss = ops.linear_cross_entropy(hidden, *rest)
    with pytest.raises(FastLNError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(13, 5)}, r"weight \(n_classes, d\).*\(13, 5\) and \(11, 6\)"),
        ({"weight": torch.zeros(0, 6)}, "one class or more"),
        ({"bias": torch.zeros(10)}, r"must be \(11,\).*\(10,\)"),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, r"\(13,\), one for each row.*\(12,\)"),
        ({"labels": torch.zeros(13, dtype=torch.int32)}, "int64.*int32"),
        ({"labels": torch.full((13,), 11)}, "label 11 is neither one of 11 classes nor ignore_index, -100"),
        ({"labels": torch.full((13,), -1)}, "label -1"),
        ({"softcap": 0.0}, "above 0"),
        ({"label_smoothing": 1.5}, "from 0 to 1"),
        ({"reduction": "average"}, "valid: mean, sum, none"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("hidden", "weight", "bias", "labels"), make(), strict=True))
    with pytest.raises(FastLNError, match=message):
        ops.linear_cross_entropy(**{**arguments, **change})


@pytest.mark.skipif("products.why_not('int8') is not None", reason="no 8-bit products here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_8_bits_has_nearly_the_loss_and_gradient_of_an_exact_one(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(24, 128), torch.randn(3000, 128) / 8
    labels = torch.randint(0, 3000, (24,))
    labels[3] = -100
    found = []
    for rounded in (None, reference_int8.quantise_weight(weight, turned=True)):
        x = hidden.to(dtype).requires_grad_()
        loss = ops.linear_cross_entropy(x, weight.to(dtype), None, labels, rounded=rounded)
        found.append((loss.item(), *torch.autograd.grad(loss, x)))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.01)
    cosine = torch.nn.functional.cosine_similarity(*(dx.flatten().double() for _, dx in found), dim=0)
    assert cosine > 0.9995  # 0.9 with a gradient of one row


@pytest.mark.skipif("products.why_not('int8') is not None", reason="no 8-bit products here")
def test_a_head_that_trains_stays_exact():
    weight = torch.randn(50, 64, requires_grad=True)
    rounded = reference_int8.quantise_weight(torch.zeros(50, 64))
    labels = torch.arange(4)
    losses = [ops.linear_cross_entropy(torch.ones(4, 64), weight, None, labels, rounded=r) for r in (None, rounded)]
    assert losses[0] == losses[1]
