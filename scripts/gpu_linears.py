"""Time frozen linear layers on a GPU: in 8 bits by fastln, beside torch in 16 bits and torch's own 8-bit product.

Both products of a layer are timed, `y` and `dx`. "fastln" rounds its rows in every call; "fastln, rows given" does not,
as when a norm has rounded them. "torch int8" is `torch._int_mm` alone, on rows that are given, without the scales.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_timing import CALLS, Bench, Replay, copies_for, interleave, summarise
from norm_cases import DTYPES, Work
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
    """Check and time both products of a layer. Yields a row for each product and library.

    A row's `measured` has the figures of `gpu_timing.Timing` (share_of_copy is left out), `operations_per_second` and
    `over_torch`: how many times as long torch's product in `dtype` takes, the median over rounds.
    """
    n_rows, n_inner, n_cols = shape
    n_bytes = (n_rows * (n_inner + n_cols) + n_inner * n_cols) * DTYPES[dtype].itemsize
    n_copies = copies_for(n_bytes, bench.l2_bytes)
    n_cycles = math.ceil(CALLS / n_copies)
    layers = [make_layer(shape, DTYPES[dtype], bench.device, SEED + i, turned) for i in range(n_copies)]
    for result, makers in MAKERS.items():
        case = f"linear-{result}{'-turned' if turned else ''} ({n_inner} to {n_cols})"
        rows: dict[str, Row] = {}
        replays: dict[str, Replay] = {}
        for name, make in makers.items():
            row = Row(bench.machine, dtype, dtype, n_cols, n_rows, case, name, source_digest(), n_bytes, measured={})
            rows[name] = row
            # Any error, such as a shape that torch._int_mm does not take, goes into the row.
            try:
                runs = [make(layer) for layer in layers]
                got = runs[0]()
                if got.dtype != torch.int32:
                    error = error_of(got, layers[0], result)
                    row.measured = {"errors": {result: error}, "bounds": {result: LARGEST_ERROR}}
                    if not error <= LARGEST_ERROR:
                        row.error = f"relative error of {result}: {error:.2g}"
                        continue
                replays[name] = bench.record([_work(result, run) for run in runs], n_cycles)
            except Exception as error:
                row.error = notes(type(error).__name__, next(iter(str(error).splitlines()), ""))
        n_calls = n_cycles * n_copies
        seconds = {
            name: [one / n_calls for one in own] for name, own in interleave(replays, bench.rounds, bench.clock).items()
        }
        for name, own in seconds.items():
            timing = dataclasses.asdict(summarise(own, own, n_bytes))
            del timing["share_of_copy"]
            timing["operations_per_second"] = 2 * n_rows * n_inner * n_cols / timing["median"]
            if BF16 in seconds:
                timing["over_torch"] = statistics.median(t / o for t, o in zip(seconds[BF16], own, strict=True))
            rows[name].measured = (rows[name].measured or {}) | {"n_copies": n_copies} | timing
        yield from rows.values()


def _work(result: str, run: Callable[[], Tensor]) -> Work:
    return Work(lambda: {result: run()})


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
