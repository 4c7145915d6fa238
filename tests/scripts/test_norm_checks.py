"""The check that comes before a timing, with kernels under Triton's interpreter."""

import dataclasses
import math
import types

import pytest
import torch
from norm_cases import CASES, DTYPES, Work, kernel_work
from norm_checks import Configuration, bounds_for, check, dropout_fault, random_inputs, storage_bound
from norm_peers import Implementation, load_fastln, load_torch

from fastln_kernels import norm, reference

FASTLN, EAGER = load_fastln()[0], load_torch()[0]


def configuration(case="layer_norm-forward", dtype="fp32", n_rows=19, n_cols=40):
    return Configuration(CASES[case], n_rows, n_cols, dtype)


def checked(implementation, of):
    return check(implementation, of, random_inputs(of, torch.device("cpu"), seed=3))


def spoilt(result, factor):
    """fastln's kernels with one result scaled: `factor` is 1 where nothing is wrong."""

    def of(function):
        def call(request):
            outputs = function(request)
            wrong = getattr(outputs, result, None)
            return outputs if wrong is None else outputs._replace(**{result: wrong * factor})

        return call

    kernels = types.SimpleNamespace(norm_forward=of(norm.norm_forward), norm_backward=of(norm.norm_backward))
    return Implementation("spoilt", lambda case, given: kernel_work(kernels, case, given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_fastln_passes(case, dtype):
    verdict = checked(FASTLN, configuration(case, dtype))
    assert verdict.fault is None
    assert list(verdict.errors) == list(verdict.bounds) == list(CASES[case].results)
    assert all(verdict.errors[name] <= verdict.bounds[name] for name in verdict.bounds)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_torch_passes_through_autograd(case, dtype):
    assert checked(EAGER, configuration(case, dtype)).fault is None


@pytest.mark.parametrize(
    ("case", "result"),
    [
        ("layer_norm-forward", "y"),
        ("layer_norm-dx-dweight-dbias", "dx"),
        ("layer_norm-dweight-dbias", "dbias"),
        ("rms_norm-dx-dweight", "dweight"),
        ("add_layer_norm-backward", "dresidual"),
        ("dropout_add_layer_norm-forward", "stream"),
        ("dropout_add_layer_norm-backward", "dresidual"),
        ("dropout_add_layer_norm_post-forward", "y"),
        ("dropout_add_layer_norm_post-backward", "dweight"),
    ],
)
def test_a_wrong_result_is_caught(case, result):
    assert checked(spoilt(result, 1.0), configuration(case)).fault is None
    assert f"relative error of {result}" in checked(spoilt(result, 1.001), configuration(case)).fault


def test_a_result_of_the_wrong_dtype_or_that_is_not_a_number_is_caught():
    def with_y(change):
        return Implementation("x", lambda *of: Work(lambda: {"y": change(FASTLN.prepare(*of).run()["y"])}))

    assert "torch.float64" in checked(with_y(torch.Tensor.double), configuration()).fault
    verdict = checked(with_y(lambda y: y * math.nan), configuration())
    assert verdict.errors == {"y": None}
    assert "relative error of y is nan" in verdict.fault


def test_wrong_dropout_is_caught():
    keep = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) >= 0.125
    assert dropout_fault(keep, 0.125) is None
    assert "keeps" in dropout_fault(torch.ones(200, 200), 0.125)

    def other_mask_in_backward(case, given):
        work = kernel_work(norm, case, given)
        other = reference.dropout_keep(*given.x.shape, case.dropout, given.seed + 1)
        return dataclasses.replace(work, run=lambda: work.run() | {"dx": work.run()["dresidual"] * other})

    implementation = Implementation("other mask", other_mask_in_backward)
    assert "relative error of dx" in checked(implementation, configuration("dropout_add_layer_norm-backward")).fault


def test_bounds():
    u, bf16 = 2.0**-24, 2.0**-7 / math.sqrt(3)
    plain = configuration("layer_norm-dx-dweight-dbias", "fp32", n_rows=200)
    assert bounds_for(plain, 2) == pytest.approx({"dx": 4 * u, "dweight": 14 * u, "dbias": 14 * u})
    fused = configuration("dropout_add_layer_norm-forward", "bf16")
    assert bounds_for(fused, 0) == pytest.approx({"y": 4 * u + 2 * bf16, "stream": 4 * u + bf16})
    assert bounds_for(fused, 2) == pytest.approx({"y": 4 * u + 4 * bf16, "stream": 4 * u + 3 * bf16})
    assert bounds_for(configuration("llama_rms_norm-forward", "bf16"), 2) == pytest.approx({"y": 4 * u + 3 * bf16})
    post = bounds_for(configuration("dropout_add_layer_norm_post-backward", "bf16"), 0)
    assert post["dx"] == pytest.approx(4 * u + 3 * bf16)
    assert storage_bound(torch.float16) == pytest.approx(2.0**-10 / (2 * math.sqrt(3)))


def test_bytes_that_must_move():
    assert configuration("layer_norm-dx", "bf16", 10, 100).moved_bytes == 3 * 2000
    assert configuration("dropout_add_layer_norm-backward", "fp32", 10, 100).moved_bytes == 5 * 4000
