"""Rounding rows where they are made, and in a pass of its own: `python -m pytest -s benchmarks/test_rounding.py`.

Prints microseconds, the least of many calls that take turns: of the kernel alone, with a pass over its rows after it,
with its rows rounded where they are made, and of the product that takes the rows.
"""

import statistics
import time

import pytest
import torch

from fastln.machine import install_arena, release_arena
from fastln_kernels.cpu import native_activation, native_attention, native_int8, native_norm
from fastln_kernels.reference import NormBackward, NormForward, NormKind
from fastln_kernels.reference_attention import AttentionBackward, AttentionForward


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


N_HEADS, DIM = 12, 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n_tokens", [128, 197, 384])
def test_attention(n_tokens, dtype):
    """Prints milliseconds, medians, of attention's forward and backward for about 2,048 tokens."""
    torch.manual_seed(0)
    n_batches = 2048 // n_tokens
    q, k, v, dout = (torch.randn(n_batches, n_tokens, N_HEADS, DIM).to(dtype).transpose(1, 2) for _ in range(4))
    request, factors = AttentionForward(q, k, v, DIM**-0.5), torch.rand(N_HEADS * DIM) + 0.5
    out, lse = native_attention.attention_forward(request)
    back = AttentionBackward(request, dout, out, lse, need_dq=True, need_dk=True, need_dv=True)
    like = torch.empty(n_batches * n_tokens, N_HEADS * DIM)

    def rows(x):
        return x.transpose(1, 2).reshape(like.shape)

    def backward_where_made():
        told = {name: native_int8.rounding(like, factors)[1] for name in ("round_dq", "round_dk", "round_dv")}
        return native_attention.attention_backward(back, **told)

    calls = {
        "forward": lambda: native_attention.attention_forward(request),
        "forward, own pass": lambda: native_int8.quantise(rows(native_attention.attention_forward(request).out)),
        "forward, where made": lambda: native_attention.attention_forward(request, native_int8.rounding(like)[1]),
        "backward": lambda: native_attention.attention_backward(back),
        "backward, own passes": lambda: [
            native_int8.quantise(rows(gradient), factors) for gradient in native_attention.attention_backward(back)
        ],
        "backward, where made": backward_where_made,
    }
    seconds = {name: [] for name in calls}
    for _ in range(60):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    medians = (f"{name} {1e3 * statistics.median(taken):.2f}" for name, taken in seconds.items())
    print(f"\n{n_tokens} tokens, {dtype}:", *medians, sep=" | ")
