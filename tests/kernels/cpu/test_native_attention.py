"""Attention, compiled and in plain PyTorch, against the formula on whole matrices in float64."""

import math

import pytest
import torch
from attention_on_paper import ALL, SEED, TOLERANCE, make, on_paper, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from fastln_kernels import reference_attention
from fastln_kernels.cpu import native_attention, products
from fastln_kernels.reference import dropout_keep, dropout_scale
from fastln_kernels.reference_attention import AttentionBackward, AttentionForward

needs_kernels = pytest.mark.skipif(
    products.why_not("attention") is not None, reason=f"no compiled kernels: {products.why_not('attention')}"
)
NATIVE = pytest.param(native_attention, marks=needs_kernels, id="native")
IMPLEMENTATIONS = [NATIVE, pytest.param(reference_attention, id="reference")]


def check(implementation, q, k, v, dout, mask=None, scale=0.3, tolerance=None, **options):
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    wide_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    expected = on_paper(*inputs, scale, mask=wide_mask, **options)
    expected_grads = torch.autograd.grad(expected, inputs, dout.double())
    all_grads = torch.stack([grad.norm() for grad in expected_grads]).norm()
    options |= {"scale": scale, "mask": mask, "seed": SEED}
    out, lse = implementation.attention_forward(AttentionForward(q, k, v, **options))
    grads = implementation.attention_backward(
        AttentionBackward(AttentionForward(q, k, v, **options), dout, out, lse, **ALL)
    )
    tolerance = tolerance or TOLERANCE[q.dtype]
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert relative_error(out, expected.detach()) < tolerance
    for x, grad, expected_grad in zip((q, k, v), grads, expected_grads, strict=True):
        assert (grad.dtype, grad.shape) == (x.dtype, x.shape)
        assert grad.transpose(1, 2).is_contiguous()
        # With few keys dq and dk are small differences of terms as large as dv, which `out` has rounded: 0 for one key.
        assert relative_error(grad, expected_grad, floor=0.5 * all_grads) < tolerance
    return out, grads


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 17, 64, 65, 197, 257, 320, 321]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_awkward_lengths(implementation, dtype, causal, dropout):
    for n_tokens in SIZES:
        check(implementation, *make(dtype, 1, 2, n_queries=n_tokens), causal=causal, dropout=dropout)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tokens(dtype):
    """Blocks have multiples of 16 rows and columns; heads of 64 columns are transposed as they lie in memory."""
    for i, n_tokens in enumerate((1, 2, 15, 16, 17, 31, 32, 33)):
        for dim in (64, 20):
            tensors = make(dtype, 2, 4, kv_heads=2, n_queries=n_tokens, dim=dim)
            check(native_attention, *tensors, scale=dim**-0.5, causal=(i + dim // 64) % 2 == 0, dropout=0.1)
        mask = torch.zeros(2, 1, 1, n_tokens, dtype=torch.bool)  # one for all queries of a sequence
        mask[0, ..., : n_tokens // 2 + 1] = mask[1, ..., 0] = True
        check(native_attention, *make(dtype, 2, 2, n_queries=n_tokens, dim=32), mask=mask, scale=32**-0.5)


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_what_an_earlier_call_left_in_the_buffers_does_not_matter(causal, int8):
    if int8 and not products.in_8_bits("attention"):
        pytest.skip("no products in 8 bits")

    def run(q, k, v, dout):
        request = AttentionForward(q, k, v, scale=0.125, causal=causal, int8=int8)
        out, lse = native_attention.attention_forward(request)
        return out, lse, *native_attention.attention_backward(AttentionBackward(request, dout, out, lse, **ALL))

    tensors, others = (make(torch.float32, 1, 1, n_queries=n, dim=64) for n in (23, 130))
    before, threads = run(*tensors), torch.get_num_threads()
    torch.set_num_threads(1)  # one thread, one set of buffers
    try:
        run(*(x.fill_(math.nan) for x in others))
        after = run(*tensors)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_many_blocks(dtype, causal):
    check(native_attention, *make(dtype, 1, 1, n_queries=901, dim=64), causal=causal, dropout=0.1)


@pytest.mark.parametrize(("dim", "v_dim"), [(1, 1), (8, 8), (16, 40), (33, 31), (64, 64), (72, 72), (128, 80)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_kernels
def test_head_dimensions(dtype, dim, v_dim):
    check(native_attention, *make(dtype, n_queries=70, dim=dim, v_dim=v_dim), dropout=0.1)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(5, 33), (33, 5), (1, 350), (350, 1), (70, 600)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_different_numbers_of_queries_and_keys(implementation, n_queries, n_keys, causal):
    check(implementation, *make(torch.bfloat16, n_queries=n_queries, n_keys=n_keys), causal=causal)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_grouped_queries(implementation, kv_heads):
    check(implementation, *make(torch.bfloat16, h=6, kv_heads=kv_heads, n_queries=130), causal=True, dropout=0.1)


SHAPES = [(37, 350), (1, 350), (37, 1), (2, 1, 1, 350), (2, 1, 37, 350), (2, 3, 37, 350), (1, 3, 37, 350)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive", "additive in float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks(implementation, kind, dtype):
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(2)
        keep = torch.rand(shape, generator=generator) < 0.6
        if kind == "boolean":
            mask = keep
        else:
            mask = torch.randn(shape, generator=generator).masked_fill(~keep, torch.finfo(dtype).min)
            mask = mask if "float32" in kind else mask.to(dtype)
        check(implementation, *make(dtype, n_queries=37, n_keys=350), mask=mask)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["boolean", "minus infinity", "lowest number"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fully_masked_rows(implementation, kind, dropout):
    """Without a key a row is 0; where every key carries the lowest number, stock code takes the mean of all values."""
    q, k, v, dout = make(torch.bfloat16, n_queries=9, n_keys=350)
    mask = torch.ones(2, 1, 9, 350, dtype=torch.bool).tril_()
    mask[0, :, :4] = False
    if kind != "boolean":
        low = -math.inf if kind == "minus infinity" else torch.finfo(torch.bfloat16).min
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, low)
    out, grads = check(implementation, q, k, v, dout, mask=mask, dropout=dropout)
    if kind != "lowest number":
        assert out[0, :, :4].eq(0).all()
        assert grads.dq[0, :, :4].eq(0).all()
    elif not dropout:
        stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        assert relative_error(out[0, :, :4], stock[0, :, :4].double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_at_all(implementation):
    for empty in ({"n_queries": 0, "n_keys": 5}, {"b": 0}, {"h": 0, "kv_heads": 1}):
        q, k, v, dout = make(torch.bfloat16, **empty)
        out, lse = implementation.attention_forward(AttentionForward(q, k, v, scale=1.0))
        grads = implementation.attention_backward(
            AttentionBackward(AttentionForward(q, k, v, scale=1.0), dout, out, lse, **ALL)
        )
        assert out.shape == q.shape
        assert all(grad.shape == x.shape and grad.eq(0).all() for grad, x in zip(grads, (q, k, v), strict=True))
    q, k, v, dout = make(torch.bfloat16)
    request = AttentionForward(q, k[:, :, :0], v[:, :, :0], scale=1.0)
    out, lse = implementation.attention_forward(request)
    assert out.eq(0).all()
    dq = implementation.attention_backward(AttentionBackward(request, dout, out, lse, need_dq=True)).dq
    assert dq.eq(0).all()


@pytest.mark.parametrize("wanted", [("dq",), ("dk",), ("dv",), ("dq", "dk"), ("dq", "dv"), ("dk", "dv")])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_gradients_asked_for(implementation, wanted):
    q, k, v, dout = make(torch.bfloat16, n_queries=70, n_keys=350)
    request = AttentionForward(q, k, v, scale=0.3, dropout=0.1, seed=SEED)
    out, lse = implementation.attention_forward(request)
    complete = implementation.attention_backward(AttentionBackward(request, dout, out, lse, **ALL))
    needs = {f"need_{name}": True for name in wanted}
    kept = None if wanted == ("dv",) else out
    some = implementation.attention_backward(AttentionBackward(request, dout, kept, lse, **needs))
    for name, grad, expected in zip(some._fields, some, complete, strict=True):
        assert (grad is not None) == (name in wanted)
        assert grad is None or torch.equal(grad, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    q, k, v, dout = make(dtype)
    contiguous = [x.contiguous() for x in (q, k, v, dout)]
    check(native_attention, *contiguous)
    check(native_attention, *contiguous[:3], dout[:, :, :1, :1].expand_as(dout))
    check(native_attention, *(x.mT.contiguous().mT for x in contiguous))
    packed = torch.stack((q, k, v), 3)  # one tensor of all three, heads interleaved
    check(native_attention, *packed.unbind(3), dout)


@needs_kernels
@pytest.mark.parametrize(("n_queries", "n_keys", "dim"), [(1, 1, 1), (17, 5, 20), (65, 321, 33), (350, 350, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, n_queries, n_keys, dim):
    q, k, v, dout = make(dtype, n_queries=n_queries, n_keys=n_keys, dim=dim)
    request = AttentionForward(q, k, v, scale=0.125, causal=True, dropout=0.1, seed=SEED)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, lse = native_attention.attention_forward(request)
            grads = native_attention.attention_backward(AttentionBackward(request, dout, out, lse, **ALL))
            results.append((out, lse, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_passes_through(implementation):
    for value, others in ((math.nan, False), (math.inf, False)):
        q, k, v, _ = make(torch.float32, b=1, h=1, n_queries=350)
        q[0, 0, 3, 2] = value
        out, _ = implementation.attention_forward(AttentionForward(q, k, v, scale=0.3))
        assert out[0, 0, 3].isnan().all()
        assert out[0, 0, 4:].isnan().any() == others
        v[0, 0, 330, 5] = math.nan
        out, _ = implementation.attention_forward(AttentionForward(q, k, v, scale=0.3))
        assert out[0, 0, :, 5].isnan().all()
        assert not out[0, 0, 4:, 6].isnan().any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("height", [-120.0, 120.0])
def test_scores_of_any_height(implementation, height):
    """The largest score is taken off before any exponential; float32 has 8e-6 between two scores of this height."""
    q, k, v, dout = make(torch.float32, n_queries=70, n_keys=600, dim=8)
    mask = torch.full((1, 600), height)
    mask[:, 350:] += 30
    check(implementation, q, k, v, dout, mask=mask, tolerance=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_s_numbers_depend_on_seed_head_query_and_key_alone(implementation):
    """Values that are unit vectors read the weights off the output."""
    b, h, n_queries, n_keys, dropout = 2, 2, 70, 350, 0.25
    q = torch.zeros(b, h, n_queries, 8)
    v = torch.eye(n_keys).expand(b, h, n_keys, n_keys)
    request = AttentionForward(q, q.new_zeros(b, h, n_keys, 8), v, scale=1.0, dropout=dropout, seed=SEED)
    out, _ = implementation.attention_forward(request)
    keep = dropout_keep(b * h * n_queries, n_keys, dropout, SEED).view(b, h, n_queries, n_keys)
    torch.testing.assert_close(out, keep * dropout_scale(dropout) / n_keys, rtol=1e-6, atol=0)
    # Six standard deviations of a binomial.
    assert keep.float().mean().item() == pytest.approx(1 - dropout, abs=6 * math.sqrt(0.25 * 0.75 / keep.numel()))
    other, _ = implementation.attention_forward(request._replace(seed=SEED + 1))
    assert not torch.equal(out, other)


def test_the_definition_s_gradients_in_float64():
    leaves = [x.requires_grad_() for x in make(torch.float64, 1, 2, 1, 5, dim=3)[:3]]
    mask = torch.ones(5, 5, dtype=torch.bool).tril_()
    for options in ({}, {"causal": True}, {"mask": mask}, {"dropout": 0.4}):
        settings = {"scale": 0.5, "seed": SEED} | options
        q, k, v = leaves
        dout = torch.randn(q.shape, dtype=torch.float64)
        with torch.no_grad():
            request = AttentionForward(q, k, v, **settings)
            out, lse = reference_attention.attention_forward(request)
            grads = reference_attention.attention_backward(AttentionBackward(request, dout, out, lse, **ALL))
            for x, grad in zip(leaves, grads, strict=True):
                direction, values = torch.randn(x.shape, dtype=torch.float64), []
                for step in (1e-6, -1e-6):
                    moved = [y + step * direction if y is x else y for y in leaves]
                    out = reference_attention.attention_forward(AttentionForward(*moved, **settings)).out
                    values.append((out * dout).sum())
                slope = (values[0] - values[1]) / 2e-6
                assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-8)


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest storage has that any operation makes."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.n_elements = max(self.n_elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_never_exist_at_once(implementation, monkeypatch):
    monkeypatch.setattr(reference_attention, "BLOCK_SCORES", 2000)
    q, k, v, dout = make(torch.bfloat16, 1, 2, n_queries=300, dim=8)
    options = {"scale": 0.3, "dropout": 0.1, "seed": SEED}
    with LargestTensor() as largest:
        out, lse = implementation.attention_forward(AttentionForward(q, k, v, **options))
        implementation.attention_backward(
            AttentionBackward(AttentionForward(q, k, v, **options), dout, out, lse, **ALL)
        )
    assert largest.n_elements <= q.numel()
