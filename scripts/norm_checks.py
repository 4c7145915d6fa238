"""Check an implementation of a case against the definition in float64, before it is timed."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from norm_cases import DTYPES, Case, Inputs, Results, Work, make_inputs, pick
from norm_peers import Implementation
from report_rows import notes
from torch import Tensor

from fastln_kernels import reference
from fastln_kernels.reference import NormBackward, NormForward

ROUNDOFF = 2.0**-24
SEED = 0


@dataclass(frozen=True)
class Configuration:
    """A case at one shape and dtype. `dtype` is a name from `DTYPES`, for rows, weight and bias."""

    case: Case
    n_rows: int
    n_cols: int
    dtype: str

    @property
    def moved_bytes(self) -> int:
        """The bytes that any implementation must move, without the small tensors such as weight and bias."""
        return self.case.tensors * self.n_rows * self.n_cols * DTYPES[self.dtype].itemsize


def random_inputs(configuration: Configuration, device: torch.device, seed: int) -> Inputs:
    """Return inputs with normally distributed rows. Weight and bias have the rows' dtype, which every peer accepts."""
    dtype = DTYPES[configuration.dtype]
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, dtype=dtype, device=device, generator=generator)
    shape = (configuration.n_rows, configuration.n_cols)
    return make_inputs(configuration.case, *shape, draw, dtype, torch.tensor([seed], device=device))


def storage_bound(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to `dtype`. For bfloat16 it allows a cast that truncates."""
    if dtype == torch.float32:
        return 0.0
    return torch.finfo(dtype).eps / (math.sqrt(3) if dtype == torch.bfloat16 else 2 * math.sqrt(3))


def bounds_for(configuration: Configuration, roundings: int) -> dict[str, float]:
    """Return the bound on each result's relative root-mean-square error; tests/kernels/test_norm.py derives the bounds.

    Args:
        configuration: The configuration that was computed.
        roundings: As in `Implementation`. Each may cost as much as storing a result.
    """
    case = configuration.case
    storage = storage_bound(DTYPES[configuration.dtype])
    stored = 1 + (roundings if case.residual else 0)
    if case.kind.round_normed:
        stored += 2  # x_hat, and the weight that peers multiply it with, in the same dtype
    if case.backward and case.keeps_normed:
        stored += 2  # the stored x_hat or sum enters two products
    elementwise = 4 * ROUNDOFF + stored * storage
    summed = (4 + math.sqrt(configuration.n_rows / 2)) * ROUNDOFF + stored * storage
    # The stream is rounded before the norm.
    y = elementwise + (storage if case.returns_stream else 0.0)
    bounds = {"y": y, "dweight": summed, "dbias": summed}
    return {name: bounds.get(name, elementwise) for name in case.results}


def expected(case: Case, given: Inputs, keep: Tensor | None, stream: Tensor | None) -> tuple[Results, Results]:
    """Return the results in float64, and the sizes of the terms that each result sums. Errors are relative to these.

    Args:
        case: The case.
        given: The inputs.
        keep: Which elements of `x` dropout kept, or None without dropout.
        stream: The rounded sum that the forward normalised; None if that was `x` or is not known.
    """
    doubles: dict[str, Any] = {name: None if t is None else t.double() for name, t in vars(given).items()}
    exact = Inputs(**doubles)
    kind = case.kind
    mask = None if keep is None else keep * reference.dropout_scale(case.dropout)
    x = exact.x if mask is None else exact.x * mask
    if not case.backward:
        outputs = reference.norm_forward(
            NormForward(x, exact.weight, exact.bias, kind, residual=exact.residual, want_stream=case.returns_stream)
        )
        want = pick(outputs, case.results)
        return want, want
    summed = x if exact.residual is None else x + exact.residual
    saved = summed if stream is None else stream.double()
    plain = reference.norm_forward(NormForward(saved, None, None, kind))
    gradients = reference.norm_backward(
        NormBackward(
            exact.dy,
            saved,
            exact.weight,
            plain.rstd,
            kind,
            dstream=exact.dstream,
            need_dresidual=True,
            need_dweight=True,
            need_dbias=True,
            grad_dtype=torch.float64,
        )
    )
    assert gradients.dresidual is not None
    terms = plain.rstd[:, None] * exact.dy * (1.0 if exact.weight is None else exact.weight + kind.offset)
    if exact.dstream is not None:
        terms = terms.abs() + exact.dstream.abs()
    dx, dx_terms = (gradients.dresidual, terms) if mask is None else (gradients.dresidual * mask, terms * mask)
    want = {"dx": dx, **pick(gradients, ("dresidual", "dweight", "dbias"))}
    scale = {"dx": dx_terms, "dresidual": terms}
    for name, of_one_row in (("dweight", exact.dy * plain.y), ("dbias", exact.dy)):
        scale[name] = of_one_row.norm(dim=0) + want[name].abs()
    return {name: want[name] for name in case.results}, {name: scale[name] for name in case.results}


def relative_error(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """Return the root mean square of the error, relative to that of `scale`."""

    def size(tensor: Tensor) -> float:
        return tensor.square().mean().sqrt().item()

    return size(got.double() - want) / (size(scale) + 1e-30)


def seeded_run(implementation: Implementation, case: Case, given: Inputs) -> tuple[Results, Work]:
    """Run once, with the same random numbers in every such run."""
    torch.manual_seed(SEED)
    work = implementation.prepare(case, given)
    results = work.run()
    return {name: tensor.detach() for name, tensor in results.items()}, work


def kept_by_dropout(implementation: Implementation, case: Case, given: Inputs) -> Tensor:
    """Return which elements dropout keeps in a seeded run.

    It sends ones through dropout, as `x` or as its gradient. If the sum is not returned, it looks at dx instead, which
    is 0 for dropped elements.
    """
    if case.keeps_normed:
        of_x = dataclasses.replace(case, results=("dx",))
        return seeded_run(implementation, of_x, given)[0]["dx"] != 0
    if case.backward:
        probe = dataclasses.replace(given, dy=torch.zeros_like(given.dy), dstream=torch.ones_like(given.dy))
        return seeded_run(implementation, case, probe)[0]["dx"] != 0
    probe = dataclasses.replace(given, x=torch.ones_like(given.x), residual=torch.zeros_like(given.x))
    return seeded_run(implementation, case, probe)[0]["stream"] != 0


def dropout_fault(keep: Tensor, dropout: float) -> str | None:
    """Describe the fault if dropout keeps too many or too few elements, by more than 5 standard deviations."""
    rate, n = keep.double().mean().item(), keep.numel()
    if abs(rate - (1 - dropout)) <= 5 * math.sqrt(dropout * (1 - dropout) / n):
        return None
    return f"dropout keeps {rate:.4f} of the elements instead of {1 - dropout:.4f}"


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        errors: Relative root-mean-square error of each result; None if it is not finite.
        bounds: The bounds on the errors.
        fault: What is wrong, or None.
    """

    errors: dict[str, float | None]
    bounds: dict[str, float]
    fault: str | None


def check(implementation: Implementation, configuration: Configuration, given: Inputs) -> Verdict:
    """Compare every result with the definition in float64."""
    case, dtype = configuration.case, DTYPES[configuration.dtype]
    bounds = bounds_for(configuration, implementation.roundings)
    errors: dict[str, float | None] = {}
    faults = []
    keep = kept_by_dropout(implementation, case, given) if case.dropout else None
    if keep is not None:
        faults.append(dropout_fault(keep, case.dropout))
    got, work = seeded_run(implementation, case, given)
    want, scale = expected(case, given, keep, work.stream)
    for name, bound in bounds.items():
        if got[name].shape != want[name].shape or got[name].dtype != dtype:
            faults.append(f"{name} is {(*got[name].shape,)} {got[name].dtype}")
            continue
        error = relative_error(got[name], want[name], scale[name])
        errors[name] = error if math.isfinite(error) else None
        if not error <= bound:
            faults.append(f"relative error of {name} is {error:.1e}, above {bound:.1e}")
    return Verdict(errors, bounds, notes(*(fault for fault in faults if fault)) or None)
