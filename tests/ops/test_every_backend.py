"""Every operation in all of its kinds on every backend, with and without a compiler, against the float64 definition.

Kinds and backends come from the registries, so a new one is tested from the start.

Bounds. Errors are root-mean-square, relative to the result. Rounding to nearest in storage is uniform within half the
dtype's epsilon at mantissa 1: epsilon / (2 sqrt(3)). A gradient may have three such errors that are independent (x_hat
or the probabilities, what else was kept, the result itself), so sqrt(3) of them. Arithmetic is float32: about 8
roundings in a chain and the sums, of 48 terms at most: under 16 u, u = 2^-24. Chance may double both.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastln import ops
from fastln.ops import ACTIVATION_KINDS, NormKind, OpSettings
from fastln.ops.backends import OPERATIONS, resolve
from fastln.ops.settings import BACKENDS, REFERENCE
from fastln_kernels import reference, reference_activation, reference_attention, reference_int8, reference_rotary
from fastln_kernels.cpu import library, products
from fastln_kernels.reference import NormForward
from fastln_kernels.reference_attention import AttentionForward

SEED = torch.tensor([7])
N_ROWS, N_COLS = 40, 32
WITHOUT_COMPILER = "cpu, no compiler"


class Case(NamedTuple):
    """An operation in one of its kinds.

    Attributes:
        op: Its name in the table of backends.
        kind: Which, in words.
        shapes: Of the tensors whose gradients are wanted.
        run: The operation, of settings and these tensors.
        define: Its definition, of these tensors; differentiable.
    """

    op: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor]
    define: Callable[..., Tensor]


ROWS, VECTOR = (N_ROWS, N_COLS), (N_COLS,)


def norm_kinds():
    """Every combination of what a kind of norm may say beside its eps."""
    flags = [field for field in dataclasses.fields(NormKind) if field.name != "eps"]
    values = [(False, True) if field.type is bool else (0.0, 1.0) for field in flags]
    for chosen in itertools.product(*values):
        yield NormKind(1e-5, **dict(zip([field.name for field in flags], chosen, strict=True)))


def norm_cases():
    for kind in norm_kinds():
        words = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(kind).items() if name != "eps")
        yield Case(
            "layer_norm" if kind.centre else "rms_norm",
            words,
            (ROWS, VECTOR, VECTOR),
            functools.partial(run_norm, kind),
            functools.partial(define_norm, kind),
        )
        for dropout, stream in itertools.product((0.0, 0.25), (False, True)):
            yield Case(
                "dropout_add_norm",
                f"{words}, {dropout=}, {stream=}",
                (ROWS, VECTOR, VECTOR, ROWS),
                functools.partial(run_sum, kind, dropout, stream),
                functools.partial(define_sum, kind, dropout, stream),
            )


def run_norm(kind, settings, x, weight, bias):
    return ops.dropout_add_norm(x, None, weight, bias, kind, settings=settings)


def define_norm(kind, x, weight, bias):
    return reference.norm_forward(NormForward(x, weight, bias, kind)).y


def run_sum(kind, dropout, return_stream, settings, x, weight, bias, residual):
    options = {"dropout": dropout, "return_stream": return_stream, "seed": SEED, "settings": settings}
    result = ops.dropout_add_norm(x, residual, weight, bias, kind, **options)
    return torch.cat(result) if return_stream else result


def define_sum(kind, dropout, return_stream, x, weight, bias, residual):
    # The stream is rounded before it is normalised, in float64 to nothing that counts.
    request = NormForward(x, weight, bias, kind, residual, dropout, SEED, want_stream=False)
    y = reference.norm_forward(request).y
    return torch.cat((y, reference.dropout(x, dropout, SEED) + residual)) if return_stream else y


def activation_cases():
    for kind in ACTIVATION_KINDS:
        yield Case(
            "activation",
            kind,
            (ROWS,),
            lambda settings, x, kind=kind: ops.activation(x, kind, settings=settings),
            lambda x, kind=kind: reference_activation.activation_forward(x, kind),
        )
        yield Case(
            "gated_activation",
            kind,
            (ROWS, ROWS),
            lambda settings, gate, up, kind=kind: ops.gated_activation(gate, up, kind, settings=settings),
            lambda gate, up, kind=kind: reference_activation.gated_forward(gate, up, kind),
        )
        yield Case(
            "gated_activation",
            f"{kind}, packed",
            (ROWS,),
            lambda settings, both, kind=kind: ops.packed_gated_activation(both, kind, settings=settings),
            lambda both, kind=kind: reference_activation.gated_forward(*both.chunk(2, -1), kind),
        )


def dropout_cases():
    for p in (0.1, 0.5):
        yield Case(
            "dropout",
            f"{p=}",
            (ROWS,),
            lambda settings, x, p=p: ops.dropout(x, p, seed=SEED, settings=settings),
            lambda x, p=p: reference.dropout(x, p, SEED),
        )


HEADS = (2, 3, 20, 16)
ATTENTION = {
    "plain": {},
    "causal": {"causal": True},
    "boolean mask": {"mask": torch.ones(20, 20, dtype=torch.bool).tril()},
    "additive mask": {"mask": torch.linspace(-2, 2, 400).view(20, 20)},
    "dropout": {"dropout": 0.2},
}


def attention_cases():
    for kind, options in ATTENTION.items():
        yield Case(
            "attention",
            kind,
            (HEADS, HEADS, HEADS),
            functools.partial(run_attention, options),
            functools.partial(define_attention, options),
        )


def run_attention(options, settings, q, k, v):
    torch.manual_seed(3)
    mask = options.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        options = options | {"mask": mask.to(q.dtype)}
    return ops.attention(q, k, v, scale=0.25, **options, settings=settings)


def define_attention(options, q, k, v):
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    return reference_attention.attention_forward(AttentionForward(q, k, v, 0.25, seed=seed, **options)).out


def rotary_cases():
    angles = torch.randn(2, 20, 16)
    cos, sin = angles.cos().half(), angles.sin().half()
    for kind, n in (("positions of each sequence", 2), ("shared positions", 1)):
        yield Case(
            "rotary",
            kind,
            (HEADS,),
            functools.partial(run_rotary, cos[:n], sin[:n]),
            lambda x, n=n: reference_rotary.rotary(x, cos[:n], sin[:n]),
        )


def run_rotary(cos, sin, settings, x):
    return ops.rotary(x, cos.to(x.dtype), sin.to(x.dtype), settings=settings)


def linear_cases():
    weight, bias = torch.randn(48, N_COLS), torch.randn(48)
    for transpose in (True, False):
        given = weight if transpose else weight.t().contiguous()
        yield Case(
            "linear",
            f"{transpose=}",
            (ROWS,),
            functools.partial(run_linear, given, bias, transpose),
            lambda x, given=given, transpose=transpose: reference.linear(x, given, bias, transpose=transpose),
        )


def run_linear(weight, bias, transpose, settings, x):
    return ops.linear(x, weight.to(x.dtype), bias.to(x.dtype), transpose=transpose, settings=settings)


def int8_cases():
    """By definition in plain PyTorch: what backends must share is how they round."""
    for turned in (False, True):
        weight = reference_int8.quantise_weight(torch.randn(48, 64), turned=turned)
        run = functools.partial(run_int8, weight, torch.randn(48))
        yield Case("int8_linear", f"{turned=}", ((N_ROWS, 64),), run, functools.partial(run, REFERENCE))


def run_int8(weight, bias, settings, x):
    return ops.int8_linear(x, weight, bias.half().to(x.dtype), settings=settings)


CASES = [
    *(*norm_cases(), *activation_cases(), *dropout_cases()),
    *(*attention_cases(), *rotary_cases(), *linear_cases(), *int8_cases()),
]


@pytest.fixture(params=[*BACKENDS, WITHOUT_COMPILER])
def settings(request, monkeypatch):
    """The settings of every backend."""
    if request.param != WITHOUT_COMPILER:
        yield OpSettings(request.param)
        return
    forget()
    monkeypatch.setenv("FASTLN_CPU_KERNELS", "0")
    yield OpSettings("cpu")
    forget()


def forget():
    for cached in (library.load, library.why_not, products._taken, products.why_not, resolve):
        cached.cache_clear()


def outcome(function, tensors):
    """The result, and the gradients of all tensors."""
    y = function(*tensors)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).half().to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, tensors, dy)


def test_every_operation_is_tested():
    assert {case.op for case in CASES} == set(OPERATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        # Each kind of norm always runs by itself; in a sum, a sample of them with dropout and stream does.
        pytest.param(
            case,
            marks=pytest.mark.slow(take=10) if case.op == "dropout_add_norm" else (),
            id=f"{case.op}: {case.kind}",
        )
        for case in CASES
    ],
)
def test_values_and_gradients_are_the_definition_s(case, dtype, settings):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in case.shapes]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    got, want = outcome(functools.partial(case.run, settings), tensors), outcome(case.define, exact)
    storage = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / (2 * math.sqrt(3))
    bound = 2 * (16 * 2.0**-24 + math.sqrt(3) * storage)
    for result, right in zip(got, want, strict=True):
        assert result.dtype == dtype
        assert (result.double() - right).norm() <= bound * right.norm()


@pytest.mark.parametrize("kind", norm_kinds(), ids=str)
def test_x_hat_is_rounded_where_the_kind_says_so(kind, settings):
    """Nearly every number is the definition's to the bit, which it would not be were x_hat rounded otherwise."""
    x, bias, weight = (torch.randn(shape).half() for shape in (ROWS, VECTOR, VECTOR))
    y, want = run_norm(kind, settings, x, weight, bias), define_norm(kind, x, weight, bias)
    assert (y != want).double().mean() < 0.01
    # Of a single row the gradient of the weight is x_hat itself.
    weight = weight.float().requires_grad_()
    (x_hat,) = torch.autograd.grad(run_norm(kind, settings, x[:1], weight, None).sum(), weight)
    assert torch.equal(x_hat, x_hat.half().float()) == kind.round_normed
