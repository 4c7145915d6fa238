"""The table of cases that both reports share."""

import itertools
import types

import pytest
import torch
from norm_cases import CASES, DROPOUT, kernel_work, make_inputs

from fastln_kernels import reference


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("layer_norm-forward", 2),
        ("layer_norm-dx", 3),
        ("layer_norm-dweight", 2),
        ("layer_norm-dbias", 1),
        ("layer_norm-dx-dbias", 3),
        ("layer_norm-dweight-dbias", 2),
        ("layer_norm-dx-dweight-dbias", 3),
        ("layer_norm_no_affine-dx", 3),
        ("rms_norm-forward", 2),
        ("llama_rms_norm-dx-dweight", 3),
        ("add_layer_norm-forward", 4),  # x, residual; y, sum
        ("add_layer_norm-backward", 4),  # dy, sum, its gradient; one result for both
        ("dropout_add_layer_norm-forward", 4),
        ("dropout_add_layer_norm-backward", 5),
        ("dropout_add_layer_norm_post-forward", 4),  # y and x_hat
        ("dropout_add_layer_norm_post-backward", 4),  # dy, x_hat; dx, dresidual
    ],
)
def test_tensors_that_must_move(name, tensors):
    assert CASES[name].tensors == tensors


def test_every_subset_of_a_layer_norms_gradients_is_there():
    gradients = ("dx", "dweight", "dbias")
    subsets = [of for n in (1, 2, 3) for of in itertools.combinations(gradients, n)]
    assert {CASES[f"layer_norm-{'-'.join(of)}"].results for of in subsets} == set(subsets)


def inputs(case):
    draw = torch.Generator().manual_seed(0)
    return make_inputs(
        case, 5, 24, lambda shape: torch.randn(shape, generator=draw), torch.float32, torch.zeros(1, dtype=torch.int64)
    )


@pytest.mark.parametrize("name", CASES)
def test_a_backward_is_given_what_it_needs_and_no_more(name):
    """With NaN in everything that is held back by the flags, results would show it; None would raise."""
    case = CASES[name]
    calls = []

    def noted(request):
        calls.append(request)
        return reference.norm_backward(request)

    given = inputs(case)
    work = kernel_work(types.SimpleNamespace(norm_forward=reference.norm_forward, norm_backward=noted), case, given)
    results = work.run()
    assert tuple(results) == case.results
    assert all(result is not None for result in results.values())
    if not case.backward:
        assert not calls
        assert work.stream is None
        return
    request = calls[0]
    assert request.kind is case.kind
    assert (request.saved is None) == (request.rstd is None) == (case.results == ("dbias",))
    assert (request.weight is None) == (not case.weight or not {"dx", "dresidual"} & set(case.results))
    assert (request.dstream is None) == (work.stream is None) == (not case.residual or case.keeps_normed)
    assert request.saved_is_normed == name.startswith("dropout_add_layer_norm_post")
    assert request.dropout == (DROPOUT if "dropout" in name else 0.0)


def test_weights_leave_x_hat_about_as_it_is():
    for name, near in (("layer_norm-forward", 1.0), ("gemma_rms_norm-forward", 0.0)):
        weight = inputs(CASES[name]).weight
        assert (weight - near).abs().mean() < 0.2
    assert inputs(CASES["layer_norm_no_affine-forward"]).weight is None
