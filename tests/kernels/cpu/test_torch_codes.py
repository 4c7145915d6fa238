"""Codes where there is no compiler: torch's kernels, and the reference for what they lack."""

import pytest
import torch

from fastln_kernels import reference, reference_activation, reference_codes
from fastln_kernels.cpu import torch_activation, torch_norm
from fastln_kernels.reference import NormAgain, NormBackward, NormForward, NormKind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("round_normed", [False, True])
def test_a_norm_keeps_codes(dtype, round_normed):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 9, 70, generator=generator).to(dtype)
    weight, bias = torch.randn(2, 70, generator=generator)
    kind = NormKind(1e-5, round_normed=round_normed)
    request = NormForward(x, weight, bias, kind, want_codes=True)
    made, want = torch_norm.norm_forward(request), reference.norm_forward(request)
    assert torch.equal(made.y, torch_norm.norm_forward(request._replace(want_codes=False)).y)
    torch.testing.assert_close(made.scale, want.scale)
    assert (made.normed.int() - want.normed).abs().max() <= 1
    wanted = {"need_dx": True, "need_dweight": True, "need_dbias": True}
    given = NormBackward(dy, made.normed, weight, made.rstd, kind, True, scale=made.scale, **wanted)
    right = reference.norm_backward(given._replace(rstd=want.rstd))
    for got, gradient in zip(torch_norm.norm_backward(given), right, strict=True):
        if gradient is not None:
            torch.testing.assert_close(got, gradient, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-6)
    again = NormAgain(made.normed, weight, bias, made.rstd, kind, True, made.scale, dtype)
    assert torch.equal(torch_norm.norm_again(again), reference.norm_again(again))
    again = again._replace(saved=x, saved_is_normed=False, scale=None)
    assert torch.equal(torch_norm.norm_again(again), made.y)


def test_an_activation_keeps_codes():
    x, dy = torch.randn(2, 9, 71).bfloat16()
    for kind in reference_activation.ACTIVATION_KINDS:
        for bits in (8, 4, 2):
            y, codes = torch_activation.activation_forward(x, kind, bits=bits)
            torch.testing.assert_close(y, torch_activation.activation_forward(x, kind))
            dx = torch_activation.activation_backward(dy, codes, kind, bits=bits)
            assert codes.shape == reference_codes.code_shape(x.shape, bits)
            torch.testing.assert_close(dx, reference_activation.activation_backward(dy, codes, kind, bits=bits))
    y, gated = torch_activation.gated_forward(x, dy, "silu", bits=8)
    assert torch_activation.gated_backward(dy, gated, None, "silu", need_dup=True).dup.shape == x.shape
