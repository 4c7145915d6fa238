"""Holds a norm kernel's results against the definition in float64, for the tests of the norm kernels.

Bounds. Errors are root-mean-square, relative to the root mean square of the result; where the result is what is left of
terms that cancel, of the terms: for dx `rstd * dy * weight` (and the stream's gradient); for a sum over rows what it
would be were the terms' signs random (the root of the sum of their squares), on top of its own size. With u = 2^-24,
the roundoff of float32:

- arithmetic: an element passes a chain of about 8 roundings (the differences, three products, the sum, the row's own
  statistics), each uniform within u and independent of the others: sqrt(8 / 3) u, under 4 u;
- a row's statistics: Triton's interpreter sums two things at once in sequence (a GPU in a tree), of up to C = 4,096
  columns. After k of C squares the running sum is k / C of the last and is rounded within u of that; the C errors
  together are sqrt(C) / 3 u of the variance, half as much of rstd. It is one error for a whole row;
- a sum over R rows in sequence: after k rows the running sum has grown to sqrt(k) terms and is rounded within u of
  that; the R errors together are sqrt(R / 2) u of the final sum for terms of random sign. 4 u for the terms themselves;
- a sum before the norm is rounded too, and what is small beside it (x_hat is, in a row far from 0 beside its deviation)
  has that error whole: it counts as a term;
- storage: rounding to nearest is uniform within half the dtype's epsilon at mantissa 1: epsilon / (2 sqrt(3)). Triton's
  interpreter truncates to bfloat16 (the compiled code does not: `test_compiled.py`), which is uniform within the whole
  epsilon on one side: epsilon / sqrt(3). A result that is rounded twice (x_hat before the weight multiplies it, the
  stream before it is normalised) may be off by both;
- chance: these are expectations. The root mean square of n uniform errors has a deviation of 0.45 / sqrt(n) of itself,
  so four of them are allowed: 1 + 2 / sqrt(n). Equal results have equal errors, so only different ones count.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastln_kernels import launch, norm, reference
from fastln_kernels.reference import NormBackward, NormForward, NormGradients, NormKind, NormOutputs

Subset = tuple[bool, bool, bool]
"""Whether the gradients of the rows, of the weight and of the bias are wanted."""

SUBSETS: list[Subset] = [subset for subset in itertools.product((True, False), repeat=3) if any(subset)]
ALL = (True, True, True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = 2.0**-24
SEED = torch.tensor([0x123456789ABCDEF])
LAYER_NORM = NormKind(1e-5)
KINDS = {
    "layer": LAYER_NORM,
    "rms": NormKind(1e-6, centre=False),
    "gemma": NormKind(1e-6, centre=False, offset=1.0),
    "llama": NormKind(1e-6, centre=False, round_normed=True),
}


@dataclass(frozen=True)
class Prologue:
    """What comes before the norm, and what the forward keeps of it."""

    residual: bool = False
    dropout: float = 0.0
    keep: str = "x"  # or "stream" or "normed"


PROLOGUES = {
    "none": Prologue(),
    "normed": Prologue(keep="normed"),
    "pre-norm": Prologue(residual=True, dropout=0.1, keep="stream"),
    "post-norm": Prologue(residual=True, dropout=0.1, keep="normed"),
    "no dropout": Prologue(residual=True, keep="stream"),
    "no residual": Prologue(dropout=0.5, keep="normed"),
}


def storage_bound(dtype: torch.dtype) -> float:
    """What rounding a result to `dtype` costs at most."""
    if dtype in (torch.float32, torch.float64):
        return 0.0
    return torch.finfo(dtype).eps / (math.sqrt(3) if dtype == torch.bfloat16 else 2 * math.sqrt(3))


def arithmetic_bound(n_rows: int, n_cols: int) -> float:
    """What float32 arithmetic costs, the row's statistics included."""
    return (4 + math.sqrt(min(n_cols, 4096)) / 6 * (1 + 2 / math.sqrt(max(n_rows, 1)))) * ROUNDOFF


def assert_close(got: Tensor, want: Tensor, bound: float, scale: Tensor | None = None) -> None:
    """Hold the error of `got` against `bound`, relative to `scale`, which is `want` by default."""

    def size(t: Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    assert got.shape == want.shape
    if got.numel():
        independent = got.flatten()[:4096].unique().numel()
        allowed = bound * (1 + 2 / math.sqrt(independent))
        assert size(got.double() - want) <= allowed * size(want if scale is None else scale)


def fenced(t: Tensor, gap: int = 16) -> Tensor:
    """The same values with NaN before, after and between the rows: whatever is read beyond them shows."""
    n_rows, n_cols = t.shape
    around = torch.full((n_rows + 2, n_cols + gap), math.nan, dtype=t.dtype)
    inner = around[1:-1, :n_cols]
    inner.copy_(t)
    return inner


def every_other(t: Tensor) -> Tensor:
    """The same values with NaN between the columns."""
    return torch.stack((t, torch.full_like(t, math.nan)), dim=-1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row stride": fenced,
    "contiguous": Tensor.contiguous,
    "transposed": lambda t: t.T.contiguous().T,
    "every other column": every_other,
    "one row expanded": lambda t: t[:1].expand_as(t),
}


@dataclass
class Inputs:
    """Everything that a forward and a backward take."""

    x: Tensor
    residual: Tensor
    dy: Tensor
    dstream: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def double(self) -> "Inputs":
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Inputs(*(None if t is None else t.double() for t in tensors))


def inputs(
    n_rows: int, n_cols: int, dtype: torch.dtype, parameter_dtype: torch.dtype = torch.float32, seed: int = 0
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = (fenced(normal(n_rows, n_cols).to(dtype)) for _ in range(4))
    return Inputs(*rows, *(fenced(normal(1, n_cols).to(parameter_dtype))[0] for _ in range(2)))


def forward(kernels: ModuleType, given: Inputs, kind: NormKind, prologue: Prologue) -> NormOutputs:
    request = NormForward(
        given.x,
        given.weight,
        given.bias,
        kind,
        residual=given.residual if prologue.residual else None,
        dropout=prologue.dropout,
        seed=SEED if prologue.dropout else None,
        want_stream=prologue.keep == "stream",
        want_normed=prologue.keep == "normed",
    )
    return kernels.norm_forward(request)


def backward(
    kernels: ModuleType,
    given: Inputs,
    kept: Tensor,
    rstd: Tensor,
    kind: NormKind,
    prologue: Prologue,
    subset: Subset,
    rows: tuple[str, ...] = ("dx", "dresidual"),
    grad_dtype: torch.dtype = torch.float32,
) -> NormGradients:
    """The backward, given only what it may look at; of the gradients of the rows, those in `rows` are wanted."""
    need_rows, need_dweight, need_dbias = subset
    need_kept = need_rows or need_dweight
    need_dx = need_rows and "dx" in rows
    request = NormBackward(
        given.dy,
        kept if need_kept else None,
        given.weight if need_rows else None,
        rstd if need_kept else None,
        kind,
        saved_is_normed=prologue.keep == "normed",
        dstream=given.dstream if prologue.keep == "stream" and need_rows else None,
        dropout=prologue.dropout,
        seed=SEED if prologue.dropout and need_dx else None,
        need_dx=need_dx,
        need_dresidual=need_rows and prologue.residual and "dresidual" in rows,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
        grad_dtype=grad_dtype,
    )
    return kernels.norm_backward(request)


WIDE_COLS = 64
"""Columns of a block, where rows of few columns take the way of wide ones."""


def take_the_wide_way(monkeypatch: Any) -> None:
    """Have rows of few columns take the way of those that the registers cannot hold, in short blocks.

    Which sums over rows are kept on the way depends on the width: both up to 2 blocks, up to 4 that of the weight, or
    of the bias alone; beyond, none.
    """

    def wide_tile(n_cols: int, *_: Any, n_sums: int, **__: Any) -> launch.WideTile:
        sums = 2 if n_cols <= 2 * WIDE_COLS else 1 if n_cols <= 4 * WIDE_COLS else 0
        return launch.WideTile(WIDE_COLS, 2, min(sums, n_sums), 4, None)

    for tile in ("forward_tile", "backward_tile"):
        monkeypatch.setattr(launch, tile, lambda *_, **__: None)
    monkeypatch.setattr(launch, "wide_tile", wide_tile)


def kept_rows(given: Inputs, outputs: NormOutputs, prologue: Prologue) -> Any:
    """The rows that the backward reads."""
    return {"x": given.x, "stream": outputs.stream, "normed": outputs.normed}[prologue.keep]


def lost_to_the_sum(exact: Inputs, kind: NormKind, prologue: Prologue, rstd: Tensor) -> Tensor | float:
    """What relative errors of the summands become in x_hat: much, where they are large beside the row's deviation."""
    if not prologue.residual and not prologue.dropout:
        return 0.0
    sizes = dataclasses.replace(exact, x=exact.x.abs(), residual=exact.residual.abs())
    return forward(reference, sizes, kind, dataclasses.replace(prologue, keep="stream")).stream * rstd[:, None]


def check(
    given: Inputs,
    subsets: list[Subset] = SUBSETS,
    kind: NormKind = LAYER_NORM,
    prologue: Prologue = PROLOGUES["none"],
    rows: tuple[str, ...] = ("dx", "dresidual"),
    grad_dtype: torch.dtype = torch.float32,
) -> None:
    """Forward and the backwards of the wanted subsets against the definition in float64."""
    dtype, n_rows = given.x.dtype, given.x.shape[0]
    storage, arithmetic = storage_bound(dtype), arithmetic_bound(*given.x.shape)
    twice = 1 + (kind.round_normed or prologue.keep == "stream")
    exact = given.double()
    got, want = forward(norm, given, kind, prologue), forward(reference, exact, kind, prologue)
    assert got.y.dtype == dtype
    gain = 1.0 if given.weight is None else exact.weight.abs() + kind.offset
    size = lost_to_the_sum(exact, kind, prologue, want.rstd)
    assert_close(got.y, want.y, arithmetic + twice * storage, scale=want.y.abs() + size * gain)
    for name in ("stream", "normed"):
        result = getattr(got, name)
        assert (result is None) == (prologue.keep != name)
        if result is not None:
            assert result.dtype == dtype
            scale = getattr(want, name).abs() + (size if name == "normed" else 0)
            assert_close(result, getattr(want, name), arithmetic + storage, scale=scale)

    # The backward is judged on what the forward kept, as it was rounded.
    kept = kept_rows(given, got, prologue)
    rstd = want.rstd
    if prologue.keep != "normed":
        rstd = reference.norm_forward(NormForward(kept.double(), None, None, kind)).rstd
        assert_close(got.rstd, rstd, arithmetic)
    for subset in subsets:
        result = backward(norm, given, kept, got.rstd, kind, prologue, subset, rows, grad_dtype)
        rounded_rstd = got.rstd.double() if prologue.keep == "normed" else rstd
        wanted = backward(
            reference, exact, kept.double(), rounded_rstd, kind, prologue, subset, rows, grad_dtype=torch.float64
        )
        assert [t is None for t in result] == [t is None for t in wanted]
        weight = 1.0 if given.weight is None else exact.weight + kind.offset
        terms = rounded_rstd[:, None] * exact.dy * weight
        if prologue.keep == "stream":
            terms = terms.abs() + exact.dstream.abs()
        scaled = terms * reference.dropout_keep(*terms.shape, prologue.dropout, SEED)
        scaled = scaled * reference.dropout_scale(prologue.dropout)
        for name, scale in (("dx", scaled), ("dresidual", terms)):
            gradient = getattr(result, name)
            if gradient is not None:
                assert gradient.dtype == dtype
                assert_close(gradient, getattr(wanted, name), arithmetic + storage, scale=scale)
        normed = kept.double()
        if prologue.keep != "normed":
            normed = reference.norm_forward(NormForward(normed, None, None, kind)).y
        bound = math.sqrt(n_rows / 2) * ROUNDOFF + storage_bound(grad_dtype)
        of_normed = arithmetic + (storage if kind.round_normed else 0.0)
        for name, terms, extra in (("dweight", exact.dy * normed, of_normed), ("dbias", exact.dy, 4 * ROUNDOFF)):
            gradient, right = getattr(result, name), getattr(wanted, name)
            if gradient is not None:
                assert gradient.dtype == grad_dtype
                assert_close(gradient, right, bound + extra, scale=terms.norm(dim=0) + right.abs())
