"""Check and time the norm kernels, 8-bit linears and their peers on this machine's GPU: one command, one JSON file.

    python scripts/gpu_report.py

Every configuration is checked against the definition in float64 before it is timed. One that fails is not timed, and
its row says why. Times are of CUDA graphs, so they contain no host time. The inputs are copied until they exceed the L2
cache several times, so every call reads its inputs from memory. All implementations of a configuration, and a plain
copy that moves as many bytes, take turns in every round. Without a GPU, nothing is measured. `gpu_linears.py` says how
linear layers are timed: in 8 bits, plain and turned, beside torch in the same dtype. `gpu_blocks.py` does the same for
an MLP, with and without rounding where rows are made.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_linears import SHAPES, linear_table, measure_linear
from gpu_timing import Bench, gpu_seconds, measure, record_graph
from norm_cases import CASES, DTYPES, WIDTHS
from norm_checks import Configuration
from norm_peers import load_all
from report_rows import RESULTS, Row, notes, save

from fastln_kernels import launch

TENSOR_BYTES = 64 << 20  # size of one tensor of rows, unless --rows is given


def rows_for(n_cols: int, itemsize: int) -> int:
    """Return the number of rows in a tensor of about `TENSOR_BYTES`, but at least one tile of `launch.COLUMN_TILE`."""
    return max(TENSOR_BYTES // (n_cols * itemsize), launch.COLUMN_TILE.rows)


def configurations(
    cases: Sequence[str], dtypes: Sequence[str], widths: Sequence[int], n_rows: int | None
) -> list[Configuration]:
    """Return every combination. If `n_rows` is None, use `rows_for`."""
    return [
        Configuration(CASES[name], n_rows or rows_for(n_cols, DTYPES[dtype].itemsize), n_cols, dtype)
        for dtype in dtypes
        for n_cols in widths
        for name in cases
    ]


def describe(device: torch.device, argv: Sequence[str]) -> dict[str, Any]:
    """Return the provenance of the rows."""
    # Not at the top: fastln imports transformers, which takes seconds and is not needed for the rest.
    from fastln.bench import provenance
    from fastln.versions import package_version

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


def table(rows: Sequence[Row]) -> str:
    """Render the rows in Markdown. All figures are measured."""
    lines = [
        "| case | dtype | rows × columns | library | µs, median (quartiles) | GB/s | of copy | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.case, row.dtype, f"{row.n_rows} × {row.width}", row.library]
        if row.measured is None or "median" not in row.measured:
            cells += ["–", "–", "–", notes(f"not timed: {row.error}", row.note)]
        else:
            low, median, high = (f"{1e6 * row.measured[which]:.1f}" for which in ("low", "median", "high"))
            cells += [f"{median} ({low}–{high})", f"{row.measured['gb_per_s']:.0f}"]
            cells += [f"{row.measured['share_of_copy']:.0%}", row.note]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser for whole numbers of at least `least` on the command line."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line. Without a GPU the exit status is 0 too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json", help="JSON file to write")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--widths", nargs="+", type=at_least(1), default=WIDTHS, help="columns")
    parser.add_argument("--rows", type=at_least(1), help="rows of a tensor; by default as many as fill 64 MiB")
    parser.add_argument("--rounds", type=at_least(2), default=20, help="turns for each implementation")
    parser.add_argument("--linears", type=at_least(0), default=len(SHAPES), help="how many shapes of linear layers")
    parser.add_argument("--blocks", type=at_least(0), help="how many shapes of MLPs; all by default")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this machine has no CUDA GPU: nothing was measured")
        return 0
    import gpu_blocks  # slow, as it imports fastln

    device = torch.device("cuda", torch.cuda.current_device())
    origin = describe(device, sys.argv if arguments is None else arguments)
    implementations, missing = load_all()
    origin["missing"] = missing
    todo = configurations(options.cases, options.dtypes, options.widths, options.rows)
    gpu = origin["gpu"]
    bench = Bench(gpu["name"], device, gpu["l2_bytes"], options.rounds, record_graph, gpu_seconds)
    rows: list[Row] = []
    # A backward runs on the stream of its forward, and graphs cannot be recorded on the default stream.
    with torch.cuda.stream(torch.cuda.Stream()):
        for i, one in enumerate(todo, 1):
            print(f"{i}/{len(todo)} {one.case.name} {one.n_rows} × {one.n_cols} {one.dtype}", file=sys.stderr)
            rows += measure(one, implementations, bench)
            save(options.out, origin, rows)
        linears: list[Row] = []
        for dtype, shape, turned in itertools.product(options.dtypes, SHAPES[: options.linears], (False, True)):
            print(f"linear {' × '.join(map(str, shape))} {dtype}{' turned' * turned}", file=sys.stderr)
            linears += measure_linear(shape, dtype, turned, bench)
            save(options.out, origin, rows + linears)
        for dtype, shape in itertools.product(options.dtypes, gpu_blocks.SHAPES[: options.blocks]):
            print(f"mlp {' × '.join(map(str, shape))} {dtype}", file=sys.stderr)
            linears += gpu_blocks.measure_mlp(shape, dtype, bench)
            save(options.out, origin, rows + linears)
    print(table(rows))
    print(f"\n{linear_table(linears)}")
    for name, reason in missing.items():
        print(f"\n{name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
