"""Check and time the norm kernels and their peers on this machine's GPU: one command, one JSON file, one table.

    python scripts/gpu_report.py

Every configuration is checked against the definition in float64 before it is timed; one that fails is not timed, and
its row says why. Times are of CUDA graphs, so that no time of the host is in them, over copies of the inputs that
together exceed the L2 cache several times, so that every call finds its inputs in memory. All implementations of a
configuration, and a plain copy that moves as many bytes, take turns in every round. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastln_kernels import launch, norm, reference
from fastln_kernels.reference import NormKind

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (384, 768, 1024, 1152, 1280, 2048, 4096, 8192, 16384, 32768, 65536)
TENSOR_BYTES = 64 << 20  # of one tensor of rows, unless --rows says how many
CACHE_MULTIPLE = 4  # of the L2 cache that the copies of the inputs fill together
CALLS = 20  # at least, in one graph: what a replay itself costs is then small beside them
DROPOUT = 0.125  # in steps of 1/65536 like fastln's, so that everybody scales by the same number
ROUNDOFF = 2.0**-24
SEED = 0
COPY = "copy"
ROW_RESULTS = frozenset({"y", "stream", "dx", "dresidual"})
GRADIENTS = {"x": "dx", "residual": "dresidual", "weight": "dweight", "bias": "dbias"}

Results = dict[str, Tensor]
Replay = Callable[[], object]


@dataclass(frozen=True)
class Operation:
    """What is asked for.

    Attributes:
        name: As on the command line and in the rows.
        kind: Which norm.
        results: What it has to return: `y` (and `stream`), or gradients.
        dropout: Of `x`, before a residual is added, whose sum `stream` the norm takes; 0 for the norm alone.
    """

    name: str
    kind: NormKind
    results: tuple[str, ...]
    dropout: float = 0.0

    @property
    def backward(self) -> bool:
        """Whether gradients are asked for."""
        return "y" not in self.results


@dataclass(frozen=True)
class Case:
    """An operation at one shape and dtype."""

    operation: Operation
    n_rows: int
    n_cols: int
    dtype: str


@dataclass(frozen=True)
class Inputs:
    """What an operation takes; weight and bias in the dtype of the rows, which is what every peer accepts."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    dstream: Tensor | None
    seed: Tensor


@dataclass(frozen=True)
class Work:
    """An operation on its inputs, ready to run again and again.

    Attributes:
        run: Does what is timed.
        stream: What the forward normalised, where that has run already and something came before the norm.
    """

    run: Callable[[], Results]
    stream: Tensor | None = None


@dataclass(frozen=True)
class Implementation:
    """Somebody's kernels.

    Attributes:
        name: As in the rows.
        prepare: Makes the work; for a backward it runs the forward.
        note: What of an operation is done otherwise than asked, or "".
        roundings: To the dtype, beyond those of the definition, where dropout and the sum come before the norm.
    """

    name: str
    prepare: Callable[[Operation, Inputs], Work]
    note: Callable[[Operation], str] = lambda _: ""
    roundings: int = 0


Loaded = tuple[Implementation | None, str]


@dataclass
class Timing:
    """How long a call took, in seconds; `low` and `high` are the quartiles over the rounds."""

    seconds: list[float]
    median: float
    low: float
    high: float
    gb_per_s: float
    share_of_copy: float


@dataclass
class Row:
    """One implementation of one case: checked and timed, or the reason why not.

    Attributes:
        operation: Name of the operation.
        implementation: Name of the implementation.
        dtype: A name from `DTYPES`.
        n_rows: Rows of a tensor.
        n_cols: Columns of a tensor.
        note: What is done otherwise than asked, or "".
        bytes: That must move, from `moved_bytes`.
        n_copies: Of the inputs, taken in turn.
        errors: Relative root-mean-square error of each result; None for one that is not finite.
        bounds: What they may be.
        error: Why there is no timing, or None.
        timing: None where the check failed or the implementation did.
    """

    operation: str
    implementation: str
    dtype: str
    n_rows: int
    n_cols: int
    note: str
    bytes: int
    n_copies: int
    errors: dict[str, float | None] = dataclasses.field(default_factory=dict)
    bounds: dict[str, float] = dataclasses.field(default_factory=dict)
    error: str | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class Bench:
    """What measuring depends on, apart from what is measured.

    Attributes:
        device: Where the tensors are.
        l2_bytes: Size of the cache that must stay cold.
        rounds: How often each implementation takes its turn.
        record: Makes, of works to run in turn and how many times over, something that replays them all.
        clock: The seconds that one replay takes.
    """

    device: torch.device
    l2_bytes: int
    rounds: int
    record: Callable[[Sequence[Work], int], Replay]
    clock: Callable[[Replay], float]


LAYER_NORM = NormKind(1e-5)
RMS_NORM = NormKind(1e-6, centre=False)
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("layer_norm-forward", LAYER_NORM, ("y",)),
        Operation("layer_norm-backward", LAYER_NORM, ("dx", "dweight", "dbias")),
        Operation("layer_norm-backward-parameters", LAYER_NORM, ("dweight", "dbias")),
        Operation("layer_norm-backward-dx", LAYER_NORM, ("dx",)),
        Operation("rms_norm-forward", RMS_NORM, ("y",)),
        Operation("rms_norm-backward", RMS_NORM, ("dx", "dweight")),
        Operation("dropout_add_layer_norm-forward", LAYER_NORM, ("y", "stream"), DROPOUT),
        Operation("dropout_add_layer_norm-backward", LAYER_NORM, ("dx", "dresidual", "dweight", "dbias"), DROPOUT),
    )
}


# Cases and sizes


def rows_for(n_cols: int, itemsize: int) -> int:
    """How many rows make a tensor of about `TENSOR_BYTES`; at least those of one tile of the kernels for wide rows."""
    return max(TENSOR_BYTES // (n_cols * itemsize), launch.COLUMN_TILE.rows)


def make_cases(
    operations: Sequence[str], dtypes: Sequence[str], widths: Sequence[int], n_rows: int | None
) -> list[Case]:
    """Every combination; `n_rows` of None is `rows_for`."""
    return [
        Case(OPERATIONS[name], n_rows or rows_for(n_cols, DTYPES[dtype].itemsize), n_cols, dtype)
        for dtype in dtypes
        for n_cols in widths
        for name in operations
    ]


def moved_bytes(case: Case) -> int:
    """The bytes that must move, whoever does the work; statistics, weight and bias are small beside the rows.

    A forward reads x (and the residual); a backward reads dy, what was normalised unless dbias alone is wanted, and the
    gradient of the stream where it goes on into dx or dresidual. Results that are rows are written.
    """
    operation = case.operation
    results = set(operation.results)
    written = len(results & ROW_RESULTS)
    if operation.backward:
        read = 1 + bool(results - {"dbias"}) + bool(operation.dropout and written)
    else:
        read = 1 + bool(operation.dropout)
    return (read + written) * case.n_rows * case.n_cols * DTYPES[case.dtype].itemsize


def copies_for(bytes_per_call: int, l2_bytes: int) -> int:
    """How many copies of the inputs to take in turn, so that they fill the cache `CACHE_MULTIPLE` times."""
    return max(2, math.ceil(CACHE_MULTIPLE * l2_bytes / bytes_per_call))


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random inputs: rows that are normal, a weight near 1 as a trained norm has it."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, dtype=DTYPES[case.dtype], device=device, generator=generator)
    shape, dropout = (case.n_rows, case.n_cols), case.operation.dropout
    return Inputs(
        x=draw(shape),
        dy=draw(shape),
        weight=1 + 0.1 * draw(case.n_cols),
        bias=draw(case.n_cols) if case.operation.kind.centre else None,
        residual=draw(shape) if dropout else None,
        dstream=draw(shape) if dropout else None,
        seed=torch.tensor([seed], device=device),
    )


# Implementations


def kernel_work(kernels: Any, operation: Operation, given: Inputs) -> Work:
    """The work of a module with the functions of `fastln_kernels.reference`."""
    dropout: dict[str, Any] = {"dropout": operation.dropout, "seed": given.seed} if operation.dropout else {}
    forward = functools.partial(
        kernels.norm_forward,
        *(given.x, given.weight, given.bias, operation.kind),
        residual=given.residual,
        want_stream=bool(dropout),
        **dropout,
    )
    if not operation.backward:
        return Work(lambda: pick(forward(), operation.results))
    kept = forward()
    backward = functools.partial(
        kernels.norm_backward,
        *(given.dy, kept.stream if dropout else given.x, given.weight, kept.rstd, operation.kind),
        dstream=given.dstream,
        grad_dtype=given.x.dtype,
        **{f"need_{name}": True for name in operation.results},
        **dropout,
    )
    return Work(lambda: pick(backward(), operation.results), kept.stream)


def pick(outputs: Any, names: Sequence[str]) -> Results:
    """The named fields of what a kernel's launching function returned."""
    return {name: getattr(outputs, name) for name in names}


Leaves = dict[str, Tensor]
Function = Callable[[Leaves], tuple[Tensor, Tensor | None]]
Norm = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def autograd_work(function_for: Callable[[Operation, Inputs], Function], operation: Operation, given: Inputs) -> Work:
    """The work of a peer that is called through autograd, as its users call it.

    A forward is that of training, where every input wants a gradient; a backward is asked for the wanted ones alone.

    Args:
        function_for: Returns what computes `y` and the stream, or None, from the leaves.
        operation: What to do.
        given: The inputs.
    """
    leaves: Leaves = {}
    for name, gradient in GRADIENTS.items():
        tensor = getattr(given, name)
        if tensor is not None:
            leaves[name] = tensor.detach().requires_grad_(not operation.backward or gradient in operation.results)
    function = function_for(operation, given)
    if not operation.backward:
        return Work(
            lambda: {name: t for name, t in zip(("y", "stream"), function(leaves), strict=True) if t is not None}
        )
    y, stream = function(leaves)
    wanted = {gradient: leaves[name] for name, gradient in GRADIENTS.items() if gradient in operation.results}
    # Copies, since Liger writes its dx where dy was; what later calls then find there makes them no more work.
    outputs, gradients = [y], [given.dy.clone()]
    if stream is not None:
        assert given.dstream is not None
        outputs, gradients = [*outputs, stream], [*gradients, given.dstream.clone()]

    def run() -> Results:
        found = torch.autograd.grad(outputs, list(wanted.values()), gradients, retain_graph=True)
        return dict(zip(wanted, found, strict=True))

    return Work(run, None if stream is None else stream.detach())


def composed(operation: Operation, norm_function: Norm) -> Function:
    """Torch's dropout and sum where the operation has them, then the norm: for peers that do not fuse the three."""
    dropout = operation.dropout

    def function(leaves: Leaves) -> tuple[Tensor, Tensor | None]:
        x, weight, bias = leaves["x"], leaves["weight"], leaves.get("bias")
        if not dropout:
            return norm_function(x, weight, bias), None
        stream = leaves["residual"] + F.dropout(x, dropout)
        return norm_function(stream, weight, bias), stream

    return function


def torch_function(operation: Operation) -> Function:
    """The operation in torch's own functions."""
    eps = operation.kind.eps

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    return composed(operation, layer_norm if operation.kind.centre else rms_norm)


COMPOSED = "dropout and sum by torch, apart"


def notes(*parts: str) -> str:
    """What there is to say, on one line."""
    return "; ".join(part for part in parts if part)


def surplus(operation: Operation, always: Sequence[str]) -> str:
    """Say which gradients are computed though nobody wants them, of those that always are."""
    has_bias = operation.kind.centre
    extra = [name for name in always if name not in operation.results and (has_bias or name != "dbias")]
    return f"computes {' and '.join(extra)} too" if operation.backward and extra else ""


def load_fastln() -> Loaded:
    """These kernels, without the operators above them: a graph holds nothing of those anyway."""
    return Implementation("fastln", functools.partial(kernel_work, norm)), ""


def load_torch() -> Loaded:
    """Torch, one operation after the other."""

    def note(operation: Operation) -> str:
        return "dropout, sum and norm apart" if operation.dropout else ""

    prepare = functools.partial(autograd_work, lambda operation, given: torch_function(operation))
    return Implementation("torch eager", prepare, note, roundings=2), ""


def load_compile() -> Loaded:
    """The same through torch.compile, its default mode."""
    import torch._dynamo
    import torch._functorch.config

    # Otherwise a compiled backward can run only once, and here it is recorded several times.
    torch._functorch.config.donated_buffer = False

    @functools.lru_cache(maxsize=1)
    def compiled(operation: Operation, shape: torch.Size, dtype: torch.dtype) -> Function:
        # After a few shapes of one function dynamo gives up, or compiles it for any shape.
        torch._dynamo.reset()
        return torch.compile(torch_function(operation), dynamic=False)

    def function_for(operation: Operation, given: Inputs) -> Function:
        return compiled(operation, given.x.shape, given.x.dtype)

    return Implementation("torch.compile", functools.partial(autograd_work, function_for), roundings=2), ""


def load_liger() -> Loaded:
    """Liger-Kernel: layer_norm and rms_norm, neither with dropout nor with a residual, nor without dx."""
    try:
        ops = importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        return None, f"not installed ({error})"

    def function_for(operation: Operation, given: Inputs) -> Function:
        eps = operation.kind.eps

        def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return ops.LigerLayerNormFunction.apply(x, weight, bias, eps)

        def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            # All in float32 ("gemma"), no offset: the definition's arithmetic.
            return ops.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma")

        return composed(operation, layer_norm if operation.kind.centre else rms_norm)

    def note(operation: Operation) -> str:
        in_place = operation.backward and not operation.kind.centre
        return notes(
            COMPOSED if operation.dropout else "",
            surplus(operation, ("dx",)),
            "writes dx over dy" if in_place else "",
        )

    return Implementation("liger", functools.partial(autograd_work, function_for), note, roundings=2), ""


def load_flash() -> Loaded:
    """flash-attention's Triton norm, with dropout and residual fused; it computes every gradient."""
    try:
        module = importlib.import_module("flash_attn.ops.triton.layer_norm")
    except ImportError as error:
        return None, f"not installed ({error})"

    def function_for(operation: Operation, given: Inputs) -> Function:
        def function(leaves: Leaves) -> tuple[Tensor, Tensor | None]:
            outputs = module.layer_norm_fn(
                *(leaves["x"], leaves["weight"], leaves.get("bias")),
                residual=leaves.get("residual"),
                eps=operation.kind.eps,
                dropout_p=operation.dropout,
                prenorm=operation.dropout > 0,
                is_rms_norm=not operation.kind.centre,
            )
            return outputs if operation.dropout else (outputs, None)

        return function

    def note(operation: Operation) -> str:
        return surplus(operation, ("dx", "dweight", "dbias"))

    return Implementation("flash-attn", functools.partial(autograd_work, function_for), note), ""


LOADERS = {
    "fastln": load_fastln,
    "torch eager": load_torch,
    "torch.compile": load_compile,
    "liger": load_liger,
    "flash-attn": load_flash,
}


def load_all() -> tuple[list[Implementation], dict[str, str]]:
    """Every implementation that is here, and why the others are not."""
    found, missing = [], {}
    for name, load in LOADERS.items():
        implementation, reason = load()
        if implementation is None:
            missing[name] = reason
        else:
            found.append(implementation)
    return found, missing


# Checking


def storage_bound(dtype: torch.dtype) -> float:
    """What rounding to `dtype` costs at most, relative; for bfloat16 of a cast that truncates."""
    if dtype == torch.float32:
        return 0.0
    return torch.finfo(dtype).eps / (math.sqrt(3) if dtype == torch.bfloat16 else 2 * math.sqrt(3))


def bounds_for(case: Case, roundings: int) -> dict[str, float]:
    """What the relative root-mean-square error of each result may be; tests/kernels/test_norm.py derives the bounds.

    Args:
        case: What was computed.
        roundings: As in `Implementation`; each may cost what storing a result costs.
    """
    operation = case.operation
    storage = storage_bound(DTYPES[case.dtype]) * (1 + (roundings if operation.dropout else 0))
    elementwise = 4 * ROUNDOFF + storage
    summed = (4 + math.sqrt(case.n_rows / 2)) * ROUNDOFF + storage
    # The stream is rounded before it is normalised.
    y = elementwise + (storage_bound(DTYPES[case.dtype]) if operation.dropout else 0.0)
    bounds = {"y": y, "dweight": summed, "dbias": summed}
    return {name: bounds.get(name, elementwise) for name in operation.results}


def expected(
    operation: Operation, given: Inputs, keep: Tensor | None, stream: Tensor | None
) -> tuple[Results, Results]:
    """The results in float64, and the sizes of the terms that each is made of, which errors are relative to.

    Args:
        operation: What is asked for.
        given: The inputs.
        keep: Which elements of `x` dropout kept, or None without dropout.
        stream: What the backward's forward normalised, as it was rounded, or None where that was `x`.
    """
    doubles: dict[str, Any] = {name: None if t is None else t.double() for name, t in vars(given).items()}
    exact = Inputs(**doubles)
    kind = operation.kind
    mask = None if keep is None else keep * reference.dropout_scale(operation.dropout)
    if not operation.backward:
        x = exact.x if mask is None else exact.x * mask
        outputs = reference.norm_forward(
            x, exact.weight, exact.bias, kind, residual=exact.residual, want_stream=mask is not None
        )
        want = pick(outputs, operation.results)
        return want, want
    saved = exact.x if stream is None else stream.double()
    plain = reference.norm_forward(saved, None, None, kind)
    gradients = reference.norm_backward(
        *(exact.dy, saved, exact.weight, plain.rstd, kind),
        dstream=exact.dstream,
        need_dresidual=True,
        need_dweight=True,
        need_dbias=True,
        grad_dtype=torch.float64,
    )
    assert gradients.dresidual is not None
    terms = plain.rstd[:, None] * exact.dy * (exact.weight + kind.offset)
    if exact.dstream is not None:
        terms = terms.abs() + exact.dstream.abs()
    dx, dx_terms = (gradients.dresidual, terms) if mask is None else (gradients.dresidual * mask, terms * mask)
    want = {"dx": dx, **pick(gradients, ("dresidual", "dweight", "dbias"))}
    scale = {"dx": dx_terms, "dresidual": terms}
    for name, of_one_row in (("dweight", exact.dy * plain.y), ("dbias", exact.dy)):
        scale[name] = of_one_row.norm(dim=0) + want[name].abs()
    return {name: want[name] for name in operation.results}, {name: scale[name] for name in operation.results}


def relative_error(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """Root mean square of the error, relative to that of `scale`."""

    def size(tensor: Tensor) -> float:
        return tensor.square().mean().sqrt().item()

    return size(got.double() - want) / (size(scale) + 1e-30)


def seeded_run(implementation: Implementation, operation: Operation, given: Inputs) -> tuple[Results, Work]:
    """Run once, with the random numbers that every such run has."""
    torch.manual_seed(SEED)
    work = implementation.prepare(operation, given)
    results = work.run()
    return {name: tensor.detach() for name, tensor in results.items()}, work


def kept_by_dropout(implementation: Implementation, operation: Operation, given: Inputs) -> Tensor:
    """Which elements dropout keeps in a seeded run: ones are sent through it, as `x` or as its gradient."""
    if operation.backward:
        probe = dataclasses.replace(given, dy=torch.zeros_like(given.dy), dstream=torch.ones_like(given.dy))
        return seeded_run(implementation, operation, probe)[0]["dx"] != 0
    probe = dataclasses.replace(given, x=torch.ones_like(given.x), residual=torch.zeros_like(given.x))
    return seeded_run(implementation, operation, probe)[0]["stream"] != 0


def dropout_fault(keep: Tensor, dropout: float) -> str | None:
    """Say that dropout keeps more or fewer elements than it should: more than 5 standard deviations off."""
    rate, n = keep.double().mean().item(), keep.numel()
    if abs(rate - (1 - dropout)) <= 5 * math.sqrt(dropout * (1 - dropout) / n):
        return None
    return f"dropout keeps {rate:.4f} of the elements where {1 - dropout:.4f} is asked for"


def check(
    implementation: Implementation, case: Case, given: Inputs
) -> tuple[dict[str, float | None], dict[str, float], str | None]:
    """Compare every result with the definition in float64.

    Returns:
        The errors, what they may be, and what is wrong, or None.
    """
    operation, dtype = case.operation, DTYPES[case.dtype]
    bounds = bounds_for(case, implementation.roundings)
    errors: dict[str, float | None] = {}
    faults = []
    keep = kept_by_dropout(implementation, operation, given) if operation.dropout else None
    if keep is not None:
        faults.append(dropout_fault(keep, operation.dropout))
    got, work = seeded_run(implementation, operation, given)
    want, scale = expected(operation, given, keep, work.stream)
    for name, bound in bounds.items():
        if got[name].shape != want[name].shape or got[name].dtype != dtype:
            faults.append(f"{name} is {(*got[name].shape,)} {got[name].dtype}")
            continue
        error = relative_error(got[name], want[name], scale[name])
        errors[name] = error if math.isfinite(error) else None
        if not error <= bound:
            faults.append(f"relative error of {name} {error:.1e}, above {bound:.1e}")
    return errors, bounds, notes(*(fault for fault in faults if fault)) or None


# Timing


def copy_work(n_bytes: int, device: torch.device) -> Work:
    """A plain copy that moves `n_bytes`: it reads half of them and writes the other half."""
    source = torch.zeros(n_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Work(lambda: {"copy": target.copy_(source)})


def record_graph(works: Sequence[Work], n_cycles: int) -> Replay:
    """Record the works in turn, over and over, in one CUDA graph; on the stream that prepared them."""
    for work in works:  # compiles and tunes whatever has not been
        work.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A call's results stay until its turn comes again, so that the calls before that write elsewhere.
    results: list[Results] = [{} for _ in works]
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(n_cycles):
            for i, work in enumerate(works):
                results[i] = {}
                results[i] = work.run()

    def replay() -> Sequence[Work]:
        graph.replay()
        return works  # the graph reads their memory, so they have to live as long

    return replay


def gpu_seconds(replay: Replay) -> float:
    """The time of a replay by the GPU's clock, after one that is not timed.

    While that one runs the other is launched, so that its launch is no part of its time.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(replays: dict[str, Replay], rounds: int, clock: Callable[[Replay], float]) -> dict[str, list[float]]:
    """Time each of them once a round, in an order that changes with the round, the same in every run."""
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    order, shuffle = list(replays), random.Random(SEED)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(clock(replays[name]))
    return seconds


def summarise(seconds: Sequence[float], copy_seconds: Sequence[float], n_bytes: int) -> Timing:
    """The timing of one implementation; `copy_seconds` are of the copy of as many bytes, in the same rounds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    share = statistics.median(copy / own for copy, own in zip(copy_seconds, seconds, strict=True))
    return Timing(list(seconds), median, low, high, n_bytes / median / 1e9, share)


def measure_case(case: Case, implementations: Sequence[Implementation], bench: Bench) -> list[Row]:
    """Check and time every implementation, and the copy, on one case."""
    n_bytes = moved_bytes(case)
    n_copies = copies_for(n_bytes, bench.l2_bytes)
    n_cycles = math.ceil(CALLS / n_copies)
    inputs = [make_inputs(case, bench.device, seed) for seed in range(n_copies)]

    def new_row(name: str, note: str) -> Row:
        return Row(case.operation.name, name, case.dtype, case.n_rows, case.n_cols, note, n_bytes, n_copies)

    rows = {COPY: new_row(COPY, "")}
    replays = {COPY: bench.record([copy_work(n_bytes, bench.device) for _ in inputs], n_cycles)}
    for implementation in implementations:
        row = rows[implementation.name] = new_row(implementation.name, implementation.note(case.operation))
        # Whatever a peer raises, an unsupported width or too many registers, belongs in its row.
        try:
            row.errors, row.bounds, row.error = check(implementation, case, inputs[0])
            if row.error is None:
                works = [implementation.prepare(case.operation, given) for given in inputs]
                replays[implementation.name] = bench.record(works, n_cycles)
        except Exception as error:
            row.error = notes(type(error).__name__, next(iter(str(error).splitlines()), ""))
    n_calls = n_cycles * n_copies
    seconds = {
        name: [replay / n_calls for replay in own]
        for name, own in interleave(replays, bench.rounds, bench.clock).items()
    }
    for name, own in seconds.items():
        rows[name].timing = summarise(own, seconds[COPY], n_bytes)
    return list(rows.values())


# Reporting


def describe(device: torch.device, argv: Sequence[str]) -> dict[str, Any]:
    """Where the rows come from."""
    # Here, because fastln brings transformers, which takes seconds to import and has no part in the rest.
    from fastln.bench import provenance
    from fastln.machine import package_version

    found: dict[str, Any] = provenance.settle("cuda", "auto")[2]
    found["versions"] |= {name: package_version(name) for name in ("liger-kernel", "flash-attn")}
    found["versions"] |= {"cuda": torch.version.cuda}
    properties = torch.cuda.get_device_properties(device)
    found["gpu"] = {
        "name": properties.name,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }
    return found | {"argv": list(argv)}


def save(path: Path, origin: dict[str, Any], missing: dict[str, str], rows: Sequence[Row]) -> None:
    """Write the report as JSON."""
    report = {"provenance": origin, "missing": missing, "rows": [dataclasses.asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Render the rows in Markdown."""
    lines = [
        "| operation | dtype | rows × columns | implementation | µs, median (quartiles) | GB/s | of copy | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.operation, row.dtype, f"{row.n_rows} × {row.n_cols}", row.implementation]
        if row.timing is None:
            cells += ["–", "–", "–", notes(f"not timed: {row.error}", row.note)]
        else:
            low, median, high = (f"{1e6 * t:.1f}" for t in (row.timing.low, row.timing.median, row.timing.high))
            cells += [f"{median} ({low}–{high})", f"{row.timing.gb_per_s:.0f}", f"{row.timing.share_of_copy:.0%}"]
            cells += [row.note]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def at_least(least: int) -> Callable[[str], int]:
    """What parses a whole number of that size or more from the command line."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit status is 0 without a GPU too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"), help="JSON file to write")
    parser.add_argument("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--widths", nargs="+", type=at_least(1), default=WIDTHS, help="columns")
    parser.add_argument("--rows", type=at_least(1), help="of a tensor; by default as many as make 64 MiB")
    parser.add_argument("--rounds", type=at_least(2), default=20, help="turns that each implementation takes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was measured")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    origin = describe(device, sys.argv if arguments is None else arguments)
    implementations, missing = load_all()
    cases = make_cases(options.operations, options.dtypes, options.widths, options.rows)
    bench = Bench(device, origin["gpu"]["l2_bytes"], options.rounds, record_graph, gpu_seconds)
    rows: list[Row] = []
    # A backward runs on the stream of its forward, and graphs are recorded on any stream but the default one.
    with torch.cuda.stream(torch.cuda.Stream()):
        for i, case in enumerate(cases, 1):
            print(f"{i}/{len(cases)} {case.operation.name} {case.n_rows} × {case.n_cols} {case.dtype}", file=sys.stderr)
            rows += measure_case(case, implementations, bench)
            save(options.out, origin, missing, rows)
    print(table(rows))
    for name, reason in missing.items():
        print(f"\n{name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
