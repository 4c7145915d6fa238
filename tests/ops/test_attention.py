import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastln.ops.attention import attention, uses_blocked
from fastln_kernels.cpu import attention as kernels

# Relative root-mean-square error against float64: a few roundings of the type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def reference(q, k, v, scale, causal=False, mask=None):
    """Attention as written on paper; rows without a key are 0."""
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    dead = (scores < -1e30).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0), -1).masked_fill(dead, 0) @ v


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def make(shape, dtype, n=4, seed=0):
    """n tensors (B, H, S, D) laid out as models make them: views of (B, S, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    b, h, s, d = shape
    return [torch.randn(b, s, h, d, generator=generator).to(dtype).transpose(1, 2) for _ in range(n)]


def check(q, k, v, dout, causal=False, mask=None, scale=0.3):
    """Both kernels against float64 autograd."""
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    wide_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    expected = reference(*inputs, scale, causal, wide_mask)
    expected_grads = torch.autograd.grad(expected, inputs, dout.double())
    all_grads = torch.stack([grad.norm() for grad in expected_grads]).norm()
    out, lse = kernels.attention_forward(q, k, v, scale=scale, causal=causal, mask=mask)
    grads = kernels.attention_backward(
        dout, q, k, v, out, lse, scale=scale, causal=causal, mask=mask, need_dq=True, need_dk=True, need_dv=True
    )
    tolerance = TOLERANCE[q.dtype]
    assert out.dtype == q.dtype
    assert relative_error(out, expected.detach()) < tolerance
    for x, grad, expected_grad in zip((q, k, v), grads, expected_grads, strict=True):
        assert grad.dtype == x.dtype
        assert grad.stride() == x.stride()
        # With few keys dq and dk are small differences of terms as large as dv: 0 for one key.
        error = (grad.double() - expected_grad).norm() / expected_grad.norm().clamp_min(0.1 * all_grads)
        assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("s", "d"), [(1, 8), (2, 20), (3, 64), (17, 20), (129, 64), (257, 64)])
def test_kernels_match_float64(s, d, causal, dtype):
    check(*make((2, 3, s, d), dtype), causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("limit", [1, 2 * 70 * 70, 9 * 70 * 70])
def test_blocks_of_heads_and_batches(limit, causal, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_SCORES", limit)
    check(*make((3, 4, 70, 20), dtype), causal=causal)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(5, 33), (33, 5), (1, 40)])
@pytest.mark.parametrize("causal", [False, True])
def test_different_numbers_of_queries_and_keys(n_queries, n_keys, causal):
    q, dout = make((2, 3, n_queries, 20), torch.bfloat16, 2)
    k, v = make((2, 3, n_keys, 20), torch.bfloat16, 2, seed=1)
    check(q, k, v, dout, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 37), (1, 37), (2, 1, 1, 37), (2, 1, 37, 37), (2, 3, 37, 37), (1, 3, 37, 37)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks(shape, kind, dtype):
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(shape, generator=generator) < 0.6
    if kind == "additive":
        mask = torch.randn(shape, generator=generator).masked_fill(~keep, torch.finfo(dtype).min).to(dtype)
    else:
        mask = keep
    check(*make((2, 3, 37, 20), dtype), mask=mask)


@pytest.mark.parametrize("kind", ["boolean", "minus infinity", "lowest number"])
def test_fully_masked_rows_are_zero_and_send_nothing_back(kind):
    q, k, v, dout = make((2, 3, 9, 8), torch.bfloat16)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril_()
    mask[0, :, :4] = False
    if kind != "boolean":
        low = -math.inf if kind == "minus infinity" else torch.finfo(torch.bfloat16).min
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, low)
    check(q, k, v, dout, mask=mask)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, mask=mask)
    assert out[0, :, :4].eq(0).all()
    grads = torch.autograd.grad(out, leaves, dout)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][0, :, :4].eq(0).all()


def test_gradients_in_float64():
    leaves = [x.requires_grad_() for x in make((1, 2, 5, 4), torch.float64, 3)]
    mask = torch.ones(5, 5, dtype=torch.bool).tril_()
    op = torch.ops.fastln.attention
    assert torch.autograd.gradcheck(lambda *x: op(*x, None, 0.5, False)[0], leaves)
    assert torch.autograd.gradcheck(lambda *x: op(*x, None, 0.5, True)[0], leaves)
    assert torch.autograd.gradcheck(lambda *x: op(*x, mask, 0.5, False)[0], leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_the_gradients_asked_for(wanted):
    q, k, v, dout = make((2, 3, 17, 8), torch.bfloat16)
    complete = [x.detach().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attention(*complete), complete, dout)
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
    attention(*some).backward(dout)
    for i, x in enumerate(some):
        assert (x.grad is not None) == (i in wanted)
        if i in wanted:
            assert torch.equal(x.grad, expected[i])


def test_any_strides():
    q, k, v, dout = make((2, 3, 17, 8), torch.bfloat16)
    expected = kernels.attention_forward(q, k, v, scale=0.3, causal=False, mask=None)[0]
    q, k, v = (x.contiguous() for x in (q, k, v))
    check(q, k, v, dout.contiguous())
    check(q, k, v, dout[:, :, :1].expand_as(dout))
    out = attention(q.requires_grad_(), k, v, scale=0.3)
    assert torch.equal(out, expected)


def test_same_result_with_one_and_two_threads():
    q, k, v, dout = make((2, 3, 129, 64), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(q, k, v, dout)
    finally:
        torch.set_num_threads(before)


def test_grouped_queries():
    q, dout = make((2, 6, 17, 8), torch.bfloat16, 2)
    k, v = make((2, 2, 17, 8), torch.bfloat16, 2, seed=1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, causal=True)
    grads = torch.autograd.grad(out, leaves, dout)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = reference(wide[0], *(x.repeat_interleave(3, 1) for x in wide[1:]), 8**-0.5, causal=True)
    for grad, exact in zip(grads, torch.autograd.grad(expected, wide, dout.double()), strict=True):
        assert relative_error(grad, exact) < TOLERANCE[torch.bfloat16]


def test_saves_only_inputs_output_and_row_sums():
    q, k, v = (x.requires_grad_() for x in make((2, 3, 17, 8), torch.bfloat16, 3))
    mask = torch.ones(17, 17, dtype=torch.bool).tril_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attention(q, k, v, mask=mask)
    storages = {x.untyped_storage().data_ptr(): x for x in saved if x is not None}
    for x in (q, k, v, out, mask):
        assert storages.pop(x.untyped_storage().data_ptr()).numel() == x.numel()
    (lse,) = storages.values()
    assert (lse.shape, lse.dtype) == ((2, 3, 17), torch.float32)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest storage that any operation's result has."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.n_bytes = max(self.n_bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("masked", [False, True])
def test_no_more_scores_than_one_block(masked, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_SCORES", 2 * 200 * 200)
    q, k, v, dout = make((3, 5, 200, 8), torch.bfloat16)
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool) if masked else None
    out, lse = kernels.attention_forward(q, k, v, scale=0.3, causal=False, mask=mask)
    with LargestTensor() as largest:
        kernels.attention_backward(
            dout, q, k, v, out, lse, scale=0.3, causal=False, mask=mask, need_dq=True, need_dk=True, need_dv=True
        )
    p_and_ds = 2 * 2 * kernels.BLOCK_SCORES
    assert largest.n_bytes == p_and_ds


def test_who_serves():
    q, k, v = make((1, 2, 5, 8), torch.bfloat16, 3)
    mask = torch.zeros(5, 5, dtype=torch.bfloat16)

    def blocked(q=q, k=k, v=v, causal=False, mask=None, dropout=0.0):
        return uses_blocked(q, k, v, causal=causal, mask=mask, dropout=dropout)

    assert not blocked()
    q.requires_grad_()
    assert blocked()
    assert blocked(mask=mask)
    assert not blocked(mask=mask.clone().requires_grad_())
    assert not blocked(dropout=0.1)
    assert not blocked(q.float(), k.float(), v.float())
    assert not blocked(v=v[..., :4])
    assert not blocked(q.detach().to("meta").requires_grad_())
    with torch.no_grad():
        assert not blocked()
    (long,) = make((1, 1, 901, 8), torch.bfloat16, 1)
    long.requires_grad_()
    assert blocked(long, long, long)
    assert not blocked(long, long, long, causal=True)


def test_torch_serves_the_rest():
    q, k, v = (x.requires_grad_() for x in make((1, 2, 5, 8), torch.float32, 3))
    bias = torch.randn(5, 5, requires_grad=True)
    out = attention(q, k, v, mask=bias)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, bias))
    assert torch.autograd.grad(out.sum(), bias)[0].isfinite().all()
    assert attention(q, k, v, dropout=0.5).shape == out.shape
    empty = torch.randn(1, 2, 0, 8, dtype=torch.bfloat16, requires_grad=True)
    assert attention(empty, empty, empty).shape == empty.shape


@pytest.mark.parametrize("masked", [False, True])
def test_operator_contract(masked):
    q, k, v, dout = make((2, 3, 5, 8), torch.bfloat16)
    mask = torch.ones(5, 5, dtype=torch.bool).tril_() if masked else None
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.fastln.attention, (*leaves, mask, 0.3, False))
    out, lse = torch.ops.fastln.attention(q, k, v, mask, 0.3, False)
    arguments = (dout, q, k, v, out, lse, mask, 0.3, False, [True, False, True])
    torch.library.opcheck(torch.ops.fastln.attention_backward, arguments)


def test_compiles_in_one_graph():
    q, k, v, dout = make((2, 3, 17, 8), torch.bfloat16)

    def step(q, k, v):
        return attention(q * 2, k, v, causal=True) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
