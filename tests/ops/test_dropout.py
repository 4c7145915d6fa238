"""The dropout operator: the definition's numbers on every backend, forward and backward, and no mask."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops import OpSettings
from fastln_kernels import reference
from fastln_kernels.reference import dropout_keep, dropout_scale

BACKENDS = ["triton", "cpu", "reference"]
SEED = torch.tensor([0x123456789ABCDEF])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 1), (17,), (4, 33), (2, 300), (0, 8), (2, 0)], ids=str)
def test_forward_and_backward_drop_what_the_definition_does(shape, dtype, backend):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    if dtype == torch.float64 and backend == "triton":
        with pytest.raises(FastLNError, match="float64"):
            ops.dropout(x, 0.25, seed=SEED, settings=OpSettings(backend))
        return
    y = ops.dropout(x, 0.25, seed=SEED, settings=OpSettings(backend))
    n_cols = shape[-1]
    n_rows = x.numel() // n_cols if n_cols else 0
    keep = dropout_keep(n_rows, n_cols, 0.25, SEED).reshape(shape)
    arithmetic = reference.arithmetic_dtype(x)
    scale = keep * torch.tensor(dropout_scale(0.25), dtype=arithmetic)
    # The interpreter truncates to bfloat16 where compiled code rounds.
    ulp = 2.0**-7 if backend == "triton" and dtype == torch.bfloat16 else 0.0
    assert y.dtype == dtype
    torch.testing.assert_close(y, (x.detach().to(arithmetic) * scale).to(dtype), rtol=ulp, atol=0.0)
    dy = torch.randn(shape, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, (dy.to(arithmetic) * scale).to(dtype), rtol=ulp, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_what_is_not_finite(backend):
    x = torch.randn(40, 6).t().contiguous().t()[::2]
    x[3, 2], x[4, 1] = float("nan"), float("inf")
    y = ops.dropout(x, 0.5, seed=SEED, settings=OpSettings(backend))
    torch.testing.assert_close(y, reference.dropout(x.contiguous(), 0.5, SEED), equal_nan=True)
    dropped = ~dropout_keep(20, 6, 0.5, SEED)
    assert torch.equal(y[dropped], torch.zeros(int(dropped.sum())))


def test_nothing_but_the_seed_is_kept():
    x = torch.randn(64, 128, requires_grad=True)
    packed = []
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        ops.dropout(x, 0.1)
    assert [(t.shape, t.dtype) for t in packed] == [((1,), torch.int64)]


def test_the_seed_follows_torchs_generator():
    x = torch.ones(50, 64)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(ops.dropout(x, 0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_passes_opcheck(backend):
    arguments = (torch.randn(4, 24, requires_grad=True), SEED, 0.25, *OpSettings(backend).flat)
    torch.library.opcheck(torch.ops.fastln.dropout, arguments)


def test_gradcheck_to_the_second_derivative():
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    function = lambda x: ops.dropout(x, 0.3, seed=SEED).square()  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_compiled_whole_graph_equals_eager():
    x = torch.randn(4, 24, requires_grad=True)
    compiled = torch.compile(lambda x: ops.dropout(x, 0.25, seed=SEED), fullgraph=True, backend="aot_eager")
    got, want = compiled(x), ops.dropout(x, 0.25, seed=SEED)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))


@pytest.mark.parametrize(
    ("x", "p", "seed", "message"),
    [
        (torch.zeros(2, 3), 1.0, None, "from 0 to below 1"),
        (torch.zeros(2, 3, dtype=torch.int64), 0.5, None, "floating-point"),
        (torch.tensor(1.0), 0.5, None, "one dimension or more"),
        (torch.zeros(2, 3), 0.5, torch.tensor([1], dtype=torch.int32), "the seed of dropout"),
    ],
)
def test_bad_arguments(x, p, seed, message):
    with pytest.raises(FastLNError, match=message):
        ops.dropout(x, p, seed=seed)
