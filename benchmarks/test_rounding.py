"""Rounding rows where they are made, and in a pass of its own: `python -m pytest -s benchmarks/test_rounding.py`.

Prints microseconds, the least of many calls that take turns: of the kernel alone, with a pass over its rows after it,
with its rows rounded where they are made, and of the product that takes the rows.
"""

import time

import pytest
import torch

from fastln.machine import install_arena, release_arena
from fastln_kernels.cpu import native_activation, native_int8, native_norm
from fastln_kernels.reference import NormBackward, NormForward, NormKind


@pytest.fixture(autouse=True, scope="module")
def arena():
    install_arena()
    yield
    release_arena()


N_ROWS, WIDE, NARROW = 1024, 3072, 768
LAYER, RMS = NormKind(1e-5), NormKind(1e-6, centre=False, round_normed=True)


def norm(kind, adds):
    def make(x, y, weight):
        return lambda *told: (
            native_norm.norm_forward(NormForward(x, weight, None, kind, y if adds else None, want_normed=adds), *told).y
        )

    return make


def norm_backward(x, y, weight):
    rstd = native_norm.norm_forward(NormForward(x, weight, None, LAYER)).rstd
    return lambda *told: (
        native_norm.norm_backward(NormBackward(y, x, weight, rstd, LAYER, need_dx=True, need_dweight=True), *told).dx
    )


# The width, whether the rows are turned, whether they are a gradient, and what makes the kernel.
CASES = {
    "gelu": (WIDE, False, False, lambda x, y, _: lambda *told: native_activation.activation_forward(x, "gelu", *told)),
    "gelu, dx": (
        WIDE,
        False,
        True,
        lambda x, y, _: lambda *told: native_activation.activation_backward(y, x, "gelu", *told),
    ),
    "swiglu, turned": (
        WIDE,
        True,
        False,
        lambda x, y, _: lambda *told: native_activation.gated_forward(x, y, "silu", *told),
    ),
    "layer norm": (NARROW, False, False, norm(LAYER, False)),
    "add, layer norm": (NARROW, False, False, norm(LAYER, True)),
    "layer norm, dx": (NARROW, False, True, norm_backward),
    "rms norm, turned": (NARROW, True, False, norm(RMS, False)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rounding(case, dtype):
    n_cols, turned, is_gradient, make = CASES[case]
    torch.manual_seed(0)
    x, y = (torch.randn(N_ROWS, n_cols).to(dtype) for _ in range(2))
    kernel = make(x, y, torch.rand(n_cols))
    # The layer around: its other width is the narrow one.
    shape = (n_cols, NARROW) if is_gradient else (NARROW, n_cols)
    weight = native_int8.quantise_weight(torch.randn(shape), turned=turned)
    factors = weight.scale if is_gradient else None
    product = (
        native_int8.linear_backward
        if is_gradient
        else lambda *given: native_int8.linear(given[0], given[1], None, dtype)
    )
    rows = native_int8.quantise(kernel(), factors, turned=turned)

    def where_made():
        kernel(native_int8.rounding(torch.empty(N_ROWS, n_cols), factors, turned=turned)[1])

    calls = {
        "alone": kernel,
        "own pass": lambda: native_int8.quantise(kernel(), factors, turned=turned),
        "where made": where_made,
        "product": lambda: product(rows, weight, dtype),
    }
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(100):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - start)
    print(f"\n{case}, {dtype}:", *(f"{name} {1e6 * seconds:.0f}" for name, seconds in least.items()))
