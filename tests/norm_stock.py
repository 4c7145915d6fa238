"""Inputs of a norm, its gradients, and the same norm in torch's own operations, for the tests of `fastln.ops`."""

import itertools

import torch

from fastln.ops import NormKind

SUBSETS = [subset for subset in itertools.product((True, False), repeat=3) if any(subset)]
BACKENDS = ["triton", "cpu", "reference"]
N_COLS = 24
LAYER_NORM = NormKind(1e-5)
LLAMA = NormKind(1e-6, centre=False, round_normed=True)
GEMMA = NormKind(1e-6, centre=False, offset=1.0)
KINDS = {"layer": LAYER_NORM, "llama": LLAMA, "gemma": GEMMA}


def leaves(subset=(True, True, True), dtype=torch.float32, parameter_dtype=torch.float32, shape=(2, 5, N_COLS)):
    """x, weight and bias, of which those in `subset` want a gradient."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(parameter_dtype), torch.randn(shape[-1]).to(parameter_dtype)
    return [t.requires_grad_(needed) for t, needed in zip((x, weight, bias), subset, strict=True)]


def gradients(function, tensors):
    """What `function` makes of the tensors, and the gradients of those that want one."""
    y = function(*tensors)
    dy = torch.arange(y.numel()).remainder(7).sub(2).to(y.dtype).view_as(y)  # exact in every dtype
    return y, torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy)


def stock(x, weight, bias):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def stock_norm(x, weight, bias, kind):
    weight = None if weight is None else weight + kind.offset
    if kind.centre:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, kind.eps)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, kind.eps) + (0 if bias is None else bias)
