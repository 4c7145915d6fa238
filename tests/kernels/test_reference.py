"""The definition of the norms and of dropout, against torch and against what is published."""

import dataclasses
import itertools
import math

import pytest
import torch
from norm_bounds import KINDS, Prologue, backward, forward, inputs, kept_rows

from fastln_kernels import reference
from fastln_kernels.reference import NormBackward, NormForward


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms", "gemma"])
@pytest.mark.parametrize("keep", ["x", "stream", "normed"])
def test_the_definition_is_what_autograd_makes_of_torchs_norms(has_weight, has_bias, kind, keep):
    kind, prologue = KINDS[kind], Prologue(residual=keep != "x", keep=keep)
    given = inputs(7, 33, torch.float32).double()
    given = dataclasses.replace(
        given, weight=given.weight if has_weight else None, bias=given.bias if has_bias else None
    )
    leaves = {
        name: tensor.clone().requires_grad_()
        for name in ("x", "residual", "weight", "bias")
        if (tensor := getattr(given, name)) is not None
    }
    stream = leaves["x"] + leaves["residual"] if prologue.residual else leaves["x"]
    weight = leaves["weight"] + kind.offset if has_weight else None
    bias = leaves.get("bias")
    if kind.centre:
        want_y = torch.nn.functional.layer_norm(stream, (33,), weight, bias, kind.eps)
    else:
        want_y = torch.nn.functional.rms_norm(stream, (33,), weight, kind.eps) + (0 if bias is None else bias)
    loss = (want_y * given.dy).sum() + ((stream * given.dstream).sum() if keep == "stream" else 0)
    want = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    got = forward(reference, given, kind, prologue)
    torch.testing.assert_close(got.y, want_y.detach())
    kept = kept_rows(given, got, prologue)
    subset = (True, has_weight, has_bias)
    result = backward(reference, given, kept, got.rstd, kind, prologue, subset, grad_dtype=torch.float64)
    for name, gradient in result._asdict().items():
        right = want.get(name[1:])
        assert (gradient is None) == (right is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_at_its_rate_and_independently(dropout):
    n_rows, n_cols = 500, 400
    masks = [reference.dropout_keep(n_rows, n_cols, dropout, torch.tensor([seed])) for seed in (0, 1, 2**40)]
    deviation = math.sqrt(dropout * (1 - dropout))
    kept = [mask.double() - (1 - dropout) for mask in masks]
    for mask in kept:
        assert abs(mask.mean()) < 5 * deviation / math.sqrt(mask.numel())
        for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(8, 1), mask.roll(2, 1)):
            assert abs((mask * shifted).mean()) < 5 * deviation**2 / math.sqrt(mask.numel())
    for one, other in itertools.combinations(kept, 2):
        assert abs((one * other).mean()) < 5 * deviation**2 / math.sqrt(one.numel())


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    for dropout in (0.0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-9):
        rate = 1 - reference.dropout_threshold(dropout) / reference.DROPOUT_STEPS
        assert abs(rate - (1 - dropout)) <= 1 / reference.DROPOUT_STEPS
        assert rate * reference.dropout_scale(dropout) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dropped_element_is_zero_whatever_it_was(value):
    x, seed = torch.full((4, 40), value), torch.tensor([1])
    kind = KINDS["rms"]
    keep = reference.dropout_keep(4, 40, 0.5, seed)
    stream = reference.norm_forward(NormForward(x, None, None, kind, dropout=0.5, seed=seed, want_stream=True)).stream
    zeros = torch.zeros(4, 40)
    flags = {"dstream": x, "dropout": 0.5, "seed": seed, "need_dx": True}
    dx = reference.norm_backward(NormBackward(zeros, zeros, None, torch.ones(4), kind, **flags)).dx
    for dropped in (stream, dx):
        assert torch.equal(dropped == 0, ~keep)


def test_the_generator_is_philox():
    """The known answers of the Random123 distribution (Salmon et al., SC 2011)."""
    cases = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, answer in cases:
        words = reference._philox(*(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
        assert [word.item() for word in words] == answer
