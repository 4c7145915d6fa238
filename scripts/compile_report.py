"""What the norm kernels compile to on real GPUs, beside Liger-Kernel's compiled the same way; no GPU needed.

*Compiled* figures (registers, spills, width of the accesses, barriers, bytes a warp asks for before it waits) are read
off the machine code. From them and the data sheets a share of the memory's bandwidth is *predicted*:

    share = useful bytes / bandwidth / sum over kernels of max(moved bytes / bandwidth / flight, issue time)

- useful: what any kernel must move for these results; moved: what this one does, rows that it reads twice and partial
  sums included (all of it counted as traffic with memory, though a second read is mostly served by a cache);
- flight, at most 1: bytes in flight over bytes wanted in flight. In flight is what a warp asks for before it first
  waits, times the warps that an SM holds; wanted is bandwidth times a latency of 600 ns (Little's law): 15 KB for each
  SM of an H100;
- issue time: four warp instructions a cycle and SM, for the loop's instructions (the whole kernel's without a loop);
  left out of account where a row takes several turns of the loop. On gfx942 no loop is looked for: the whole kernel
  stands for it.

It is no measurement: caches, latencies that vary and launch times are not in it. It says which kernel has a reason to
be slow, and why.

    python scripts/compile_report.py                 # everything, into benchmarks/results/compile.json
    python scripts/compile_report.py --machines sm_90 --widths 768 --dtypes bf16 --dry-run

The run fails, and leaves the file as it was, where a fastln kernel up to 8,192 columns spills, has no 128-bit access to
its rows or takes more registers than the file says; `--accept` takes the new figures all the same. Of the file's rows,
those that are compiled anew are replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import machine_code
import torch
from machine_code import MACHINES, Launch, Machine

from fastln_kernels import launch, norm
from fastln_kernels.reference import NormKind

N_ROWS = 8192
LATENCY = 600e-9
WIDTHS = (384, 768, 1024, 1152, 1280, 2048, 4096, 8192, 16384, 32768, 65536)
RATCHET_WIDTH = 8192
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "compile.json"

LAYER, RMS = NormKind(1e-5), NormKind(1e-6, centre=False)
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One operation for one set of results.

    Attributes:
        name: what the table calls it.
        tensors: how many tensors of rows any kernel must read and write for it.
        fastln: calls fastln's launching function, given rows, a vector, statistics and a seed.
        liger: likewise for Liger, or None where it has no such operation.
    """

    name: str
    tensors: int
    fastln: Callable[..., Any]
    liger: Callable[..., Any] | None = None


def _backward(kind: NormKind, rows: torch.Tensor, vector: torch.Tensor, stats: torch.Tensor, **wanted: Any) -> Any:
    need_rows = wanted.get("need_dx", False)
    return norm.norm_backward(
        rows,
        rows if need_rows or wanted.get("need_dweight") else None,
        vector if need_rows else None,
        stats,
        kind,
        **wanted,
    )


def _liger_layer_backward(rows: torch.Tensor, vector: torch.Tensor, stats: torch.Tensor, **needs: bool) -> Any:
    from liger_kernel.ops.layer_norm import layer_norm_backward

    return layer_norm_backward(rows, rows, vector, vector, stats, stats, **needs)


def _liger_layer_forward(rows: torch.Tensor, vector: torch.Tensor) -> Any:
    from liger_kernel.ops.layer_norm import layer_norm_forward

    return layer_norm_forward(rows, vector, vector, 1e-5)


def _liger_rms_forward(rows: torch.Tensor, vector: torch.Tensor) -> Any:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    return rms_norm_forward(rows, vector, 1e-6, 0.0, "gemma", None)


def _liger_rms_backward(rows: torch.Tensor, vector: torch.Tensor, stats: torch.Tensor) -> Any:
    from liger_kernel.ops.rms_norm import calculate_settings, rms_norm_backward

    settings = calculate_settings(rows.shape[1])
    return rms_norm_backward(rows, rows, vector, stats, 0.0, 1, *settings, True, None)


CASES = (
    Case(
        "layer norm forward",
        2,
        lambda rows, vector, stats, seed: norm.norm_forward(rows, vector, vector, LAYER),
        lambda rows, vector, stats: _liger_layer_forward(rows, vector),
    ),
    Case(
        "layer norm dx dγ dβ",
        3,
        lambda rows, vector, stats, seed: _backward(
            LAYER, rows, vector, stats, need_dx=True, need_dweight=True, need_dbias=True
        ),
        lambda rows, vector, stats: _liger_layer_backward(rows, vector, stats),
    ),
    Case(
        "layer norm dγ dβ",
        2,
        lambda rows, vector, stats, seed: _backward(LAYER, rows, vector, stats, need_dweight=True, need_dbias=True),
        lambda rows, vector, stats: _liger_layer_backward(rows, vector, stats),
    ),
    Case(
        "layer norm dx",
        3,
        lambda rows, vector, stats, seed: _backward(LAYER, rows, vector, stats, need_dx=True),
        lambda rows, vector, stats: _liger_layer_backward(rows, vector, stats, needs_dw=False, needs_db=False),
    ),
    Case(
        "rms norm forward",
        2,
        lambda rows, vector, stats, seed: norm.norm_forward(rows, vector, None, RMS),
        lambda rows, vector, stats: _liger_rms_forward(rows, vector),
    ),
    Case(
        "rms norm dx dγ",
        3,
        lambda rows, vector, stats, seed: _backward(RMS, rows, vector, stats, need_dx=True, need_dweight=True),
        lambda rows, vector, stats: _liger_rms_backward(rows, vector, stats),
    ),
    Case(
        "dropout + residual + layer norm forward",
        4,
        lambda rows, vector, stats, seed: norm.norm_forward(
            rows, vector, vector, LAYER, residual=rows, dropout=0.1, seed=seed, want_stream=True
        ),
    ),
    Case(
        "dropout + residual + layer norm, all gradients",
        5,
        lambda rows, vector, stats, seed: _backward(
            *(LAYER, rows, vector, stats),
            dstream=rows,
            dropout=0.1,
            seed=seed,
            need_dx=True,
            need_dresidual=True,
            need_dweight=True,
            need_dbias=True,
        ),
    ),
)


def fastln_launches(case: Case, machine: Machine, n_cols: int, dtype: torch.dtype) -> list[Launch]:
    """The launches of fastln for a case on a machine."""
    rows, vector, stats = _tensors(n_cols, dtype)
    with (
        mock.patch.object(launch, "sm_count", return_value=machine.sms),
        mock.patch.object(launch, "LANES", machine.target.warp_size),
    ):
        noted = machine_code.noted_launches(lambda: case.fastln(rows, vector, stats, torch.zeros(1, dtype=torch.int64)))
    return machine_code.unique(noted)


def liger_launches(case: Case, machine: Machine, n_cols: int, dtype: torch.dtype) -> list[Launch]:
    """The launches of Liger for a case on a machine: one program per SM in its backward."""
    assert case.liger is not None
    rows, vector, stats = _tensors(n_cols, dtype)
    noted = machine_code.noted_launches(lambda: case.liger(rows, vector, stats))  # type: ignore[misc]
    rows_per_program = math.ceil(N_ROWS / machine.sms)
    for index, one in enumerate(noted):
        if "rows_per_program" in one.kernel.arg_names:
            position = one.kernel.arg_names.index("rows_per_program")
            arguments, options = list(one.arguments), dict(one.options)
            if position < len(arguments):
                arguments[position] = rows_per_program
            else:
                options["rows_per_program"] = rows_per_program
            noted[index] = dataclasses.replace(one, arguments=tuple(arguments), options=options, grid=(machine.sms,))
    return machine_code.unique(noted)


def _tensors(n_cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.empty(N_ROWS, n_cols, dtype=dtype, device="meta")
    return rows, torch.empty(n_cols, device="meta"), torch.empty(N_ROWS, device="meta")


READ_TWICE = {
    "forward_wide_kernel": ("x_ptr", "residual_ptr"),
    "backward_row_wide_kernel": ("dy_ptr", "saved_ptr"),
}


def moved_bytes(one: Launch, sums: int, n_cols: int) -> int:
    """Bytes that a launch moves: the rows' tensors, those twice that it reads twice, and partial sums."""
    given = dict(zip(one.kernel.arg_names, one.arguments, strict=False))
    twice = READ_TWICE.get(one.kernel.__name__, ())
    total = 0
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] == n_cols:
            total += value.numel() * value.element_size() * (2 if name in twice else 1)
    if "liger_kernel" in one.kernel.__module__:
        # Written by one program per SM, read by a sum of torch's; in its arguments, on a CPU, they are one row.
        total += 2 * sums * one.grid[0] * n_cols * 4
    return total


def compiled(one: Launch, machine: Machine, n_cols: int) -> Row:
    """Compile a launch and read it."""
    figures = machine_code.read(machine_code.build(one, machine.target), machine.target)
    warps = one.options.get("num_warps", 4)
    sums = one.options.get("COMPUTE_DW", 0) + one.options.get("COMPUTE_DB", 0)
    return {
        "kernel": one.kernel.__name__,
        "warps": warps,
        "programs": one.programs,
        "resident_warps": min(
            machine_code.resident_warps(machine, figures, warps), math.ceil(one.programs / machine.sms) * warps
        ),
        "specialises_on_rows": machine_code.specialises_on(one.kernel, ("n_rows", "n_partials", "rows_per_program")),
        "tile_rows": one.options.get("ROWS", 1),
        "moved": moved_bytes(one, sums, n_cols),
        **figures,
    }


def seconds(kernel: Row, machine: Machine) -> float:
    """The predicted time of a kernel; see the head of this file."""
    wanted = machine.bandwidth * LATENCY / machine.sms
    flight = min(1.0, kernel["resident_warps"] * kernel["in_flight"] / wanted)
    moving = kernel["moved"] / machine.bandwidth / flight
    if "_wide_" in kernel["kernel"] or kernel["kernel"] in ("finish_kernel", "backward_parameters_kernel"):
        return moving
    instructions = kernel.get("loop_instructions") or kernel["instructions"]
    issued = math.ceil(N_ROWS / kernel["tile_rows"]) * kernel["warps"] * instructions
    return max(moving, issued / (4 * machine.clock * machine.sms))


def report(machine_name: str, dtype_name: str, n_cols: int, with_liger: bool = True) -> list[Row]:
    """Rows of the report: one per case and library."""
    machine, dtype = MACHINES[machine_name], DTYPES[dtype_name]
    rows = []
    for case in CASES:
        libraries = [("fastln", fastln_launches)]
        if with_liger and case.liger is not None:
            libraries.append(("liger", liger_launches))
        for library, find in libraries:
            row: Row = {"machine": machine_name, "dtype": dtype_name, "width": n_cols, "case": case.name}
            row["library"] = library
            try:
                kernels = [compiled(one, machine, n_cols) for one in find(case, machine, n_cols, dtype)]
            except Exception as error:
                rows.append(row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
                continue
            useful = case.tensors * N_ROWS * n_cols * dtype.itemsize
            predicted = sum(seconds(kernel, machine) for kernel in kernels)
            row["predicted_share"] = round(useful / machine.bandwidth / predicted, 3)
            row["moved_per_element"] = round(sum(kernel["moved"] for kernel in kernels) / N_ROWS / n_cols, 3)
            row["kernels"] = kernels
            rows.append(row)
    return rows


def _key(row: Row, kernel: Row) -> tuple[Any, ...]:
    return row["machine"], row["dtype"], row["width"], row["case"], kernel["kernel"]


def worse(rows: list[Row], before: list[Row]) -> Iterator[str]:
    """Say what is worse than before, or bad in itself, in fastln's kernels up to `RATCHET_WIDTH` columns."""
    if not before:
        yield "there are no earlier figures to compare with"
    earlier = {_key(row, kernel): kernel for row in before for kernel in row.get("kernels", ())}
    for row in rows:
        if row["library"] != "fastln" or row["width"] > RATCHET_WIDTH:
            continue
        if "error" in row:
            yield f"{row['machine']} {row['dtype']} {row['width']} {row['case']}: {row['error']}"
        for kernel in row.get("kernels", ()):
            key = _key(row, kernel)
            where = " ".join(map(str, key))
            if kernel["spills"]:
                yield f"{where}: {kernel['spills']} instructions spill"
            if not kernel["loads_128"]:
                yield f"{where}: no 128-bit loads"
            # Sums leave as single rows. AMD's compiler writes 16-bit results 8 bytes at a time: whole lines too.
            writes_rows = row["case"].endswith("forward") or "dx" in row["case"] or "all gradients" in row["case"]
            by_rows = kernel["kernel"] in ("forward_kernel", "backward_kernel")
            if writes_rows and by_rows and row["machine"] != "gfx942" and not kernel["stores_128"]:
                yield f"{where}: no 128-bit stores"
            if kernel["specialises_on_rows"]:
                yield f"{where}: compiles anew for another number of rows"
            if kernel.get("truncations"):
                yield f"{where}: truncates to bfloat16"
            if kernel.get("nan_dropped"):
                yield f"{where}: a NaN would be dropped"
            if key in earlier:
                for what, sign in (("registers", 1), ("loads_128", -1), ("stores_128", -1)):
                    now, then = kernel[what], earlier[key][what]
                    if sign * now > sign * then:
                        yield f"{where}: {what} {now}, {then} before"


def table(rows: list[Row]) -> str:
    """Render each case's kernel that moves the most bytes, fastln's beside Liger's."""
    lines = [
        "| GPU | dtype | width | case | library | registers | spills | warps an SM | KB in flight an SM "
        "| barriers in the loop | bytes moved per element | predicted share of peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = [row["machine"], row["dtype"], f"{row['width']:,}", row["case"], row["library"]]
        if "error" in row:
            lines.append("| " + " | ".join([*head, *["-"] * 6, row["error"]]) + " |")
            continue
        main = max(row["kernels"], key=lambda kernel: kernel["moved"])
        cells = [
            *(main["registers"], max(kernel["spills"] for kernel in row["kernels"]), main["resident_warps"]),
            f"{main['resident_warps'] * main['in_flight'] / 1024:.0f}",
            main.get("loop_barriers", "-"),
            f"{row['moved_per_element']:.2f}",
            f"{100 * row['predicted_share']:.0f}%",
        ]
        lines.append("| " + " | ".join(map(str, [*head, *cells])) + " |")
    return "\n".join(lines)


def main() -> int:
    """Compile, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--no-liger", action="store_true", help="leave Liger out")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--dry-run", action="store_true", help="compare and print the table, but write nothing")
    parser.add_argument("--accept", action="store_true", help="write figures that are worse than before, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    jobs = [(m, d, w) for m in options.machines for d in options.dtypes for w in options.widths]
    rows: list[Row] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(report, *job, with_liger=not options.no_liger) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            rows += future.result()
            print("compiled", *job, file=sys.stderr, flush=True)
    before: list[Row] = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    complaints = list(worse(rows, before))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if options.dry_run:
        print(table(rows))
    if options.dry_run or (complaints and not options.accept):
        return 1 if complaints else 0
    rows += [row for row in before if (row["machine"], row["dtype"], row["width"]) not in jobs]
    order = [*MACHINES, *DTYPES, *(case.name for case in CASES)]
    rows.sort(key=lambda row: [row["width"], *(order.index(row[key]) for key in ("machine", "dtype", "case"))])
    provenance = {"triton": machine_code.triton.__version__, "n_rows": N_ROWS, "latency": LATENCY}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    options.out.write_text(f'{{"provenance": {json.dumps(provenance)}, "rows": [\n{lines}\n]}}\n')
    options.out.with_suffix(".md").write_text(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
