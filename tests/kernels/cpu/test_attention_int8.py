"""Attention whose products of rows with rows run in 8 bits: the compiled kernels against the definition, and the
definition against float64.

The whole numbers and their sums are the same in both, so only float arithmetic differs: the bounds are those of exact
attention. From float64 both differ by what 8 bits cost: errors are uniform within half a step, a step is a 127th of the
largest number of a row, and that is 2 to 3 standard deviations in rows of normal numbers, so 0.7% of the rows' size.
"""

import math

import pytest
import torch
from attention_on_paper import ALL, SEED, TOLERANCE, make, on_paper, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from fastln_kernels import reference_attention
from fastln_kernels.cpu import native_attention, products, units
from fastln_kernels.reference_attention import AttentionBackward, AttentionForward

pytestmark = pytest.mark.skipif(
    products.why_not("attention") is not None or not products.in_8_bits("attention"),
    reason="no compiled kernels with products in 8 bits",
)


def run(implementation, q, k, v, dout, wanted=ALL, **options):
    request = AttentionForward(q, k, v, **{"scale": 0.3, "seed": SEED, "int8": True} | options)
    out, lse = implementation.attention_forward(request)
    return out, *implementation.attention_backward(AttentionBackward(request, dout, out, lse, **wanted))


def check(tensors, tolerance=None, **options):
    results = run(native_attention, *tensors, **options)
    expected = run(reference_attention, *tensors, **options)
    scale = torch.stack([x.double().norm() for x in expected[1:]]).norm()
    bound = tolerance or TOLERANCE[tensors[0].dtype]
    for i, (actual, right) in enumerate(zip(results, expected, strict=True)):
        assert (actual.dtype, actual.shape) == (right.dtype, right.shape)
        assert relative_error(actual, right.double(), floor=0.5 * scale if i else 0) < bound


@pytest.fixture(params=["float32", "bfloat16"])
def unit(request, monkeypatch):
    """The unit of the other products of rows in bfloat16."""
    if request.param not in units.rates():
        pytest.skip("no such products here")
    monkeypatch.setenv(units.VARIABLE, request.param)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_awkward_lengths(dtype, causal, dropout):
    for n_tokens in (1, 2, 17, 65, 321):
        check(make(dtype, 1, 2, n_queries=n_tokens), causal=causal, dropout=dropout)


@pytest.mark.usefixtures("unit")
def test_bfloat16():
    for n_tokens in (1, 17, 321):
        check(make(torch.bfloat16, 1, 2, n_queries=n_tokens, dim=64), causal=True, dropout=0.1)


@pytest.mark.parametrize(("dim", "v_dim"), [(1, 1), (3, 5), (16, 40), (33, 31), (64, 64), (72, 72), (128, 80)])
def test_head_dimensions(dim, v_dim):
    check(make(torch.float32, 1, 2, n_queries=70, dim=dim, v_dim=v_dim), dropout=0.1)


@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    lengths=st.tuples(st.integers(1, 140), st.integers(1, 340)),
    dims=st.tuples(st.integers(1, 72), st.integers(1, 72)),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
)
def test_any_lengths_heads_masks_and_memory(data, dtype, lengths, dims, kv_heads, group):
    (n_queries, n_keys), (dim, v_dim) = lengths, dims
    sizes = {"n_queries": n_queries, "n_keys": n_keys, "dim": dim, "v_dim": v_dim}
    tensors = make(dtype, 1, h=kv_heads * group, kv_heads=kv_heads, **sizes)
    match data.draw(st.sampled_from(["plain", "tokens first", "cut"])):
        case "tokens first":
            tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        case "cut":
            tensors = [torch.nn.functional.pad(x, (1, 2), value=7.0)[..., 1 : 1 + x.shape[-1]] for x in tensors]
    options = {"dropout": data.draw(st.sampled_from([0.0, 0.3])), "causal": data.draw(st.booleans())}
    if not options["causal"] and data.draw(st.booleans()):
        seen = torch.rand((1, 1, n_queries, n_keys), generator=torch.Generator().manual_seed(5)) < 0.7
        options["mask"] = seen if data.draw(st.booleans()) else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    check(tensors, **options)


def test_grouped_queries_and_different_lengths():
    for n_queries, n_keys in ((5, 350), (130, 33), (1, 350), (350, 1)):
        check(make(torch.float32, 1, h=6, kv_heads=2, n_queries=n_queries, n_keys=n_keys), causal=True, dropout=0.1)


@pytest.mark.parametrize("kind", ["boolean", "additive", "lowest number"])
def test_masks_and_rows_without_a_key(kind):
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand((2, 1, 37, 350), generator=generator) < 0.6
    mask[0, :, :4] = False
    if kind != "boolean":
        low = -math.inf if kind == "additive" else torch.finfo(torch.float32).min
        mask = torch.randn(mask.shape, generator=generator).masked_fill(~mask, low)
    check(make(torch.float32, h=2, n_queries=37, n_keys=350), mask=mask)


def test_extreme_rows():
    """Zeros, an outlier, all numbers at the end of the range, numbers too small to round.

    The highest score is 270, at which float32 has 3e-5 between two numbers.
    """
    tensors = make(torch.float32, 1, 2, n_queries=70, dim=64)
    for i, x in enumerate(tensors):
        x[0, 0, 3] = 0
        x[0, 0, 4, 5] = 1e4 if i == 2 else 30
        x[0, 1, 5] = 1 if i % 2 else -1
        x[0, 1, 6] = 1e-35
    check(tensors, tolerance=1e-5)


@pytest.mark.parametrize("wanted", [("dq",), ("dk",), ("dv",), ("dq", "dv")])
def test_only_the_gradients_asked_for(wanted):
    tensors = make(torch.float32, 1, n_queries=70, n_keys=350)
    complete = run(native_attention, *tensors)[1:]
    some = run(native_attention, *tensors, wanted={f"need_{name}": True for name in wanted})[1:]
    for name, grad, expected in zip(("dq", "dk", "dv"), some, complete, strict=True):
        assert torch.equal(grad, expected) if name in wanted else grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("implementation", [native_attention, reference_attention])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(implementation, value):
    q, k, v, dout = make(torch.float32, 1, 1, n_queries=350)
    q[0, 0, 3, 2] = value
    out, dq, *_ = run(implementation, q, k, v, dout)
    assert out[0, 0].isnan().any(-1).nonzero().tolist() == [[3]]
    assert dq[0, 0].isnan().any(-1).nonzero().tolist() == [[3]]
    # Of a causal mask, queries before a key do not see it, nor a mean that holds it.
    q[0, 0, 3, 2] = 0
    k[0, 0, 200, 1] = value
    out = run(implementation, q, k, v, dout, causal=True)[0]
    assert not out[0, 0, :200].isnan().any()
    assert out[0, 0, 200:].isnan().all()


def test_the_number_of_threads_changes_no_bit():
    tensors = make(torch.bfloat16, n_queries=130, n_keys=350, dim=33)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(native_attention, *tensors, dropout=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("moved", ["nothing", "k", "v"])
def test_errors_and_gradients_beside_float64(moved):
    """Also where all keys or values share large numbers, which would be most of a row's range."""
    q, k, v, dout = make(torch.float32, 1, 2, n_queries=200, dim=64)
    shared = 8 * torch.randn(64, generator=torch.Generator().manual_seed(4))
    k, v = k + shared * (moved == "k"), v + shared * (moved == "v")
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    expected = on_paper(*inputs, scale=0.125)
    exact = torch.autograd.grad(expected, inputs, dout.double())
    out, *grads = run(native_attention, q, k, v, dout, scale=0.125)
    # Scores have a deviation of 1 and two factors with errors of 0.7%, averaged over the values.
    assert relative_error(out, expected.detach()) < math.sqrt(2) * 0.007 * 1.5
    for grad, right in zip(grads, exact, strict=True):
        cosine = torch.nn.functional.cosine_similarity(grad.double().flatten(), right.flatten(), dim=0)
        assert cosine > 0.9995


def test_without_the_means_large_shared_numbers_cost_accuracy(monkeypatch):
    """What the means are for."""
    q, k, v, dout = make(torch.float32, 1, 1, n_queries=64, dim=64)
    k = k + 8 * torch.randn(64, generator=torch.Generator().manual_seed(4))
    exact = on_paper(q.double(), k.double(), v.double(), 0.125)
    centred = run(reference_attention, q, k, v, dout, scale=0.125)[0]
    monkeypatch.setattr(reference_attention, "_centred", lambda x: (x.float(), x.new_zeros(x.shape[-1]).float()))
    plain = run(reference_attention, q, k, v, dout, scale=0.125)[0]
    assert relative_error(plain, exact) > 3 * relative_error(centred, exact)
