"""Time frozen linear layers on a GPU: in 8 bits by fastln, beside torch in 16 bits and torch's own 8-bit product.

Both products of a layer are timed, `y` and `dx`. "fastln" rounds its rows in every call; "fastln, rows given" does not,
as when a norm has rounded them. "torch int8" is `torch._int_mm` alone, on rows that are given, without the scales.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_timing import CALLS, Bench, Replay, copies_for, interleave, summarise
from norm_cases import DTYPES, Results, Work
from norm_checks import SEED
from report_rows import Row, notes, source_digest
from torch import Tensor

from fastln_kernels import int8, reference_int8

SHAPES = ((1576, 768, 3072), (1576, 3072, 768), (8192, 4096, 4096), (8192, 4096, 11008))
"""Rows, inner columns and columns: an MLP of ViT-B/16 on 8 pictures, and layers of a 7B model on 8,192 tokens."""

LARGEST_ERROR = 0.02
"""The largest relative error of 8-bit results against float32 on normally distributed numbers; about 0.01 is usual."""

BF16 = "torch"
Make = Callable[["Layer"], Callable[[], Tensor]]
Run = Callable[[], Results]


@dataclass(frozen=True)
class Layer:
    """A frozen layer with its rows, ready for both products.

    Attributes:
        x: `(n_rows, n_inner)`.
        dy: `(n_rows, n_cols)`.
        weight: `(n_cols, n_inner)`.
        bias: `(n_cols,)`.
        turned: Whether its 8-bit weight is turned.
    """

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    turned: bool

    @property
    def weight8(self) -> reference_int8.Weight8:
        """The weight in 8 bits."""
        return int8.quantise_weight(self.weight, turned=self.turned)


def make_layer(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int, turned: bool) -> Layer:
    """Return a layer of normally distributed numbers."""
    n_rows, n_inner, n_cols = shape
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    return Layer(draw(n_rows, n_inner), draw(n_rows, n_cols), draw(n_cols, n_inner), draw(n_cols), turned)


def _y(layer: Layer) -> Callable[[], Tensor]:
    weight = layer.weight8
    return lambda: int8.linear(int8.quantise(layer.x, turned=layer.turned), weight, layer.bias, layer.x.dtype)


def _y_given(layer: Layer) -> Callable[[], Tensor]:
    weight, rows = layer.weight8, int8.quantise(layer.x, turned=layer.turned)
    return lambda: int8.linear(rows, weight, layer.bias, layer.x.dtype)


def _dx(layer: Layer) -> Callable[[], Tensor]:
    weight = layer.weight8
    return lambda: int8.linear_backward(int8.quantise(layer.dy, weight.scale), weight, layer.x.dtype)


def _dx_given(layer: Layer) -> Callable[[], Tensor]:
    weight = layer.weight8
    rows = int8.quantise(layer.dy, weight.scale)
    return lambda: int8.linear_backward(rows, weight, layer.x.dtype)


def _int_mm(layer: Layer) -> Callable[[], Tensor]:
    weight, rows = layer.weight8, int8.quantise(layer.x, turned=layer.turned)
    return lambda: torch._int_mm(rows.values, weight.values.t())


def _int_mm_dx(layer: Layer) -> Callable[[], Tensor]:
    weight = layer.weight8
    rows = int8.quantise(layer.dy, weight.scale)
    return lambda: torch._int_mm(rows.values, weight.values)


MAKERS: dict[str, dict[str, Make]] = {
    "y": {
        BF16: lambda layer: lambda: F.linear(layer.x, layer.weight, layer.bias),
        "fastln": _y,
        "fastln, rows given": _y_given,
        "torch int8": _int_mm,
    },
    "dx": {
        BF16: lambda layer: lambda: layer.dy @ layer.weight,
        "fastln": _dx,
        "fastln, rows given": _dx_given,
        "torch int8": _int_mm_dx,
    },
}
"""What is timed, by result and by library."""


def error_of(got: Tensor, layer: Layer, result: str) -> float:
    """Return the relative root-mean-square error of a result against float32."""
    x, dy, weight, bias = (t.float() for t in (layer.x, layer.dy, layer.weight, layer.bias))
    want = F.linear(x, weight, bias) if result == "y" else dy @ weight
    return float((got.float() - want).norm() / want.norm())


def measure_linear(shape: tuple[int, int, int], dtype: str, turned: bool, bench: Bench) -> Iterator[Row]:
    """Check and time both products of a layer. Yields a row for each product and library (`measure_beside_torch`)."""
    n_rows, n_inner, n_cols = shape
    n_bytes = (n_rows * (n_inner + n_cols) + n_inner * n_cols) * DTYPES[dtype].itemsize
    n_copies = copies_for(n_bytes, bench.l2_bytes)
    layers = [make_layer(shape, DTYPES[dtype], bench.device, SEED + i, turned) for i in range(n_copies)]
    for result, makers in MAKERS.items():
        case = f"linear-{result}{'-turned' if turned else ''} ({n_inner} to {n_cols})"

        def new_row(name: str, case: str = case) -> Row:
            return Row(bench.machine, dtype, dtype, n_cols, n_rows, case, name, source_digest(), n_bytes, measured={})

        def runs(make: Make, result: str = result) -> list[Run]:
            return [_named(result, make(layer)) for layer in layers]

        def errors(results: Results, result: str = result) -> dict[str, float]:
            got = results[result]
            return {} if got.dtype == torch.int32 else {result: error_of(got, layers[0], result)}

        makers_of_runs = {name: functools.partial(runs, make) for name, make in makers.items()}
        operations = 2 * n_rows * n_inner * n_cols
        yield from measure_beside_torch(new_row, makers_of_runs, errors, LARGEST_ERROR, operations, bench)


def _named(result: str, run: Callable[[], Tensor]) -> Run:
    return lambda: {result: run()}


def measure_beside_torch(
    new_row: Callable[[str], Row],
    makers: Mapping[str, Callable[[], list[Run]]],
    errors_of: Callable[[Results], dict[str, float]],
    bound: float,
    operations: int,
    bench: Bench,
) -> Iterable[Row]:
    """Check and time what several libraries compute, on copies of the inputs. One that is wrong is not timed.

    A row's `measured` has the figures of `gpu_timing.Timing` (share_of_copy is left out), `operations_per_second` and
    `over_torch`: how many times as long torch takes, the median over rounds.

    Args:
        new_row: Makes a library's row.
        makers: Make a library's runs, one for each copy of the inputs.
        errors_of: The relative errors of the first copy's results; none if they cannot be compared.
        bound: The largest error that is allowed.
        operations: Of one run.
        bench: The settings.
    """
    rows: dict[str, Row] = {}
    replays: dict[str, Replay] = {}
    n_copies, n_calls = {}, {}
    for name, make in makers.items():
        row = rows[name] = new_row(name)
        # Any error, such as a shape that torch._int_mm does not take, goes into the row.
        try:
            runs = make()
            errors = errors_of(runs[0]())
            if errors:
                row.measured = {"errors": errors, "bounds": dict.fromkeys(errors, bound)}
            wrong = [f"relative error of {name}: {error:.2g}" for name, error in errors.items() if not error <= bound]
            if wrong:
                row.error = notes(*wrong)
                continue
            n_cycles = math.ceil(CALLS / len(runs))
            replays[name] = bench.record([Work(run) for run in runs], n_cycles)
            n_copies[name], n_calls[name] = len(runs), n_cycles * len(runs)
        except Exception as error:
            row.error = notes(type(error).__name__, next(iter(str(error).splitlines()), ""))
    times = interleave(replays, bench.rounds, bench.clock)
    seconds = {name: [one / n_calls[name] for one in own] for name, own in times.items()}
    for name, own in seconds.items():
        row = rows[name]
        timing = dataclasses.asdict(summarise(own, own, row.useful_bytes))
        del timing["share_of_copy"]
        timing["operations_per_second"] = operations / timing["median"]
        if BF16 in seconds:
            timing["over_torch"] = statistics.median(t / o for t, o in zip(seconds[BF16], own, strict=True))
        row.measured = (row.measured or {}) | {"n_copies": n_copies[name]} | timing
    return rows.values()


def linear_table(rows: Sequence[Row]) -> str:
    """Render the rows of linear layers in Markdown. All figures are measured."""
    lines = [
        "| case | dtype | rows | library | µs, median (quartiles) | 10¹² operations/s | torch takes | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.case, row.dtype, str(row.n_rows), row.library]
        if not row.measured or "median" not in row.measured:
            cells += ["–", "–", "–", notes(f"not timed: {row.error}", row.note)]
        else:
            low, median, high = (f"{1e6 * row.measured[which]:.1f}" for which in ("low", "median", "high"))
            over = row.measured.get("over_torch")
            cells += [f"{median} ({low}–{high})", f"{row.measured['operations_per_second'] / 1e12:.0f}"]
            cells += ["–" if over is None else f"{over:.2f}", row.note]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)
