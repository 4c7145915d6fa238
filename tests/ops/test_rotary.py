"""The rotary operator: gradients, what is stored, compilers, transforms, and what it refuses."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops import OpSettings
from fastln_kernels import reference_rotary

BACKENDS = ["cpu", "reference"]


def tensors(dtype=torch.float32, n_positions=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    angles = torch.rand(n_positions, 5, 6, generator=generator, dtype=torch.float64) * 2 * math.pi
    return x.to(dtype).requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


def as_written(x, cos, sin):
    """What transformers' models do."""
    low, high = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), -1) * sin.unsqueeze(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_positions", [1, 2])
def test_it_is_what_models_do(n_positions, backend):
    x, cos, sin = tensors(n_positions=n_positions)
    y, want = ops.rotary(x, cos, sin, settings=OpSettings(backend)), as_written(x, cos, sin)
    torch.testing.assert_close(y, want)
    assert y.transpose(1, 2).is_contiguous()
    dy = torch.randn(x.shape)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, want)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_to_the_second_derivative(backend):
    x, cos, sin = tensors(torch.float64)
    function = lambda x: ops.rotary(x, cos, sin, settings=OpSettings(backend)).square()  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_cos_and_sin_alone_are_kept():
    x, cos, sin = tensors()
    packed = []
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        ops.rotary(x, cos, sin)
    assert [t.data_ptr() for t in packed] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_passes_opcheck(backend):
    for backward in (False, True):
        torch.library.opcheck(torch.ops.fastln.rotary, (*tensors(), backward, *OpSettings(backend).flat))


def test_compiled_whole_graph_equals_eager():
    x, cos, sin = tensors(torch.bfloat16)
    compiled = torch.compile(lambda x: ops.rotary(x, cos, sin), fullgraph=True, backend="aot_eager")
    got, want = compiled(x), ops.rotary(x, cos, sin)
    dy = torch.randn(x.shape).bfloat16()
    assert torch.equal(got, want)
    assert got.stride() == want.stride()
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (got, want)))


def test_transforms_run_the_definition():
    x, cos, sin = tensors()
    x = x.detach()
    function = lambda x: ops.rotary(x, cos, sin)  # noqa: E731
    y = reference_rotary.rotary(x, cos, sin)
    many = torch.vmap(function)(torch.stack((x, -x)))
    torch.testing.assert_close(many, torch.stack((y, -y)))
    torch.testing.assert_close(torch.func.jvp(function, (x,), (2 * x,)), (y, 2 * y))
    gradient = torch.func.grad(lambda x: function(x).square().sum() / 2)(x)
    torch.testing.assert_close(gradient, reference_rotary.rotary(y, cos, sin, backward=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, cos, sin: (x[0], cos, sin), r"x must be \(B, H, S, D\)"),
        (lambda x, cos, sin: (x[..., :5], cos[..., :5], sin[..., :5]), "an even D"),
        (lambda x, cos, sin: (x.long(), cos, sin), "floating-point"),
        (lambda x, cos, sin: (x, cos[..., :4], sin[..., :4]), "cos must be .B or 1, S, D"),
        (lambda x, cos, sin: (x, cos, sin[:, :4]), "sin must be .B or 1, S, D"),
        (lambda x, cos, sin: (x, cos[0], sin[0]), "cos must be .B or 1, S, D"),
        (lambda x, cos, sin: (x, torch.cat((cos, cos[:1])), sin), "cos must be .B or 1, S, D"),
        (lambda x, cos, sin: (x, cos[:1], sin), "cos and sin differ in shape"),
        (lambda x, cos, sin: (x, cos.bfloat16(), sin.bfloat16()), "cos must be torch.float32 on cpu"),
        (lambda x, cos, sin: (x, cos, sin.to("meta")), "sin must be torch.float32 on cpu; it is torch.float32 on meta"),
        (lambda x, cos, sin: (x, cos, sin.requires_grad_()), "sin wants a gradient"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(FastLNError, match=message):
        ops.rotary(*change(*tensors()))
