"""Compile the kernels of norms, 8-bit linears and codes, and Liger-Kernel's norms, for real GPUs; report their code.

No GPU is needed.

*Compiled* figures (registers, spills, width of the accesses, barriers, bytes that a warp requests before it waits) are
read from the machine code. A share of the memory bandwidth is *predicted* from them and the GPUs' data sheets; see
scripts/prediction.py.

    python scripts/compile_report.py                 # everything, into benchmarks/results/compile.json
    python scripts/compile_report.py --resume        # continue an interrupted run
    python scripts/compile_report.py --machines sm_90 --widths 768 --dtypes bf16 --dry-run

The rows of one GPU, dtype and width are written when they are finished, and replace the file's rows for the same. The
run fails and keeps the old rows if a fastln kernel spills or has no 128-bit access to its rows. Up to 8,192 columns it
also fails if a kernel takes more registers than in the file, has fewer 128-bit accesses, or is not in the file.
`--accept` writes the new figures anyway.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest import mock

import machine_code
import torch
from code_cases import CODE_CASES
from int8_cases import CASES8, Case8
from machine_code import Launch
from machines import MACHINES, Machine
from norm_cases import CASES, DTYPES, WIDTHS, Case, Work, make_inputs
from norm_peers import Implementation, load_fastln, load_liger
from prediction import LATENCY, in_flight, predict, predict_product
from ratchet import worse
from report_rows import LIBRARIES, RESULTS, Row, load, save, source_digest

from fastln_kernels import launch, norm

N_ROWS = 8192
PARAMETERS = "fp32"  # dtype of weight and bias: training uses it, and it takes the most registers
READ_TWICE = {
    "forward_wide_kernel": ("x_ptr", "residual_ptr", "stream_ptr"),
    "backward_wide_kernel": ("dy_ptr", "saved_ptr"),
    "quantise_wide_kernel": ("x_ptr",),
}
"""Tensors that a kernel reads a second time. A forward that writes the stream rereads only the stream."""

ALL: dict[str, Case | Case8] = {**CASES, **CASES8, **CODE_CASES}

Kernel = dict[str, Any]
Group = tuple[str, str, int]


def launches(
    implementation: Implementation, case: Case | Case8, machine: Machine, n_cols: int, dtype: str
) -> list[Launch]:
    """Return what an implementation launches for a case on a machine, using tensors without storage."""
    with (
        mock.patch.object(launch, "sm_count", return_value=machine.sms),
        mock.patch.object(launch, "LANES", machine.lanes),
        mock.patch.object(launch, "is_tight", return_value=machine.tight),
        mock.patch.object(launch, "is_hopper", return_value=machine.hopper),
    ):
        if isinstance(case, Case8):
            of_8_bits = functools.partial(torch.empty, device="meta")
            run = case.prepare(N_ROWS, n_cols, DTYPES[dtype], lambda shape, dtype: of_8_bits(shape, dtype=dtype))
            return machine_code.noted_launches(run)
        draw = functools.partial(torch.empty, dtype=DTYPES[dtype], device="meta")
        seed = torch.zeros(1, dtype=torch.int64, device="meta")
        inputs = make_inputs(case, N_ROWS, n_cols, draw, DTYPES[PARAMETERS], seed)
        works: list[Work] = []
        machine_code.noted_launches(lambda: works.append(implementation.prepare(case, inputs)))
        noted = machine_code.noted_launches(works[0].run)
    if implementation.name != "liger":
        return noted
    noted = [_on_every_sm(one, machine) for one in noted]
    return [*noted, *(last for one in noted for last in _last_sums(one, n_cols))]


def _on_every_sm(one: Launch, machine: Machine) -> Launch:
    """Give Liger's backward the number of programs it has on the machine, one per SM. Without a GPU it has one."""
    names = one.kernel.arg_names
    if "rows_per_program" not in names:
        return one
    position, rows_per_program = names.index("rows_per_program"), math.ceil(N_ROWS / machine.sms)
    if position < len(one.arguments):
        arguments = (*one.arguments[:position], rows_per_program, *one.arguments[position + 1 :])
        return dataclasses.replace(one, arguments=arguments, grid=(machine.sms,))
    options = one.options | {"rows_per_program": rows_per_program}
    return dataclasses.replace(one, options=options, grid=(machine.sms,))


def _last_sums(one: Launch, n_cols: int) -> list[Launch]:
    """Return the launch that adds a Liger kernel's partial sums: our kernel, where Liger uses torch."""
    wanted = [one.given.get(name, False) for name in ("COMPUTE_DW", "COMPUTE_DB")]
    if not any(wanted):
        return []
    rows, row = (torch.empty(shape, device="meta") for shape in ((one.programs, n_cols), (n_cols,)))
    partials, sums = ([tensor if want else None for want in wanted] for tensor in (rows, row))
    return machine_code.noted_launches(lambda: norm.finish(partials, sums))


def work_of(one: Launch, n_cols: int) -> Kernel:
    """Return how many bytes a launch moves, and in how many turns.

    Returns:
        `moved`: bytes of the tensors of rows and of partial sums. `read_twice`: bytes that it reads a second time.
        `row_tiles`: the number of tiles of whole rows. `turns`: the number of tiles.
    """
    if "BITS" in one.given or "REPEATS" in one.given:
        # Codes are narrower than rows, and rows may lie in one: so count every tensor, and each program as a tile.
        tensors = [value for value in one.given.values() if isinstance(value, torch.Tensor)]
        moved = sum(value.numel() * value.element_size() for value in tensors)
        return {"moved": moved, "read_twice": 0, "row_tiles": one.programs, "turns": one.programs}
    twice = READ_TWICE.get(one.name, ())
    if one.given.get("stream_ptr") is not None:
        twice = tuple(name for name in twice if name == "stream_ptr")
    moved = again = 0
    for name, value in one.given.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] == n_cols:
            moved += value.numel() * value.element_size()
            again += value.numel() * value.element_size() if name in twice else 0
    if one.kernel.__module__.startswith("liger_kernel"):
        # One row per program. Without a GPU there is only one row, which is counted above.
        sums = one.given.get("COMPUTE_DW", 0) + one.given.get("COMPUTE_DB", 0)
        moved += sums * (one.programs - 1) * n_cols * 4
    row_tiles = math.ceil(N_ROWS / one.given.get("ROWS", 1))
    # For a kernel with groups of blocks, a turn is a whole row.
    blocks = 1 if "GROUP" in one.given else math.ceil(n_cols / one.given.get("COLS", n_cols))
    turns = row_tiles * blocks
    return {"moved": moved, "read_twice": again, "row_tiles": row_tiles, "turns": turns}


class Compiler:
    """Compiles launches for one machine, and each distinct kernel only once."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self._figures: dict[str, machine_code.Figures] = {}

    def figures(self, one: Launch) -> machine_code.Figures:
        """Return the figures of a launch's machine code."""
        special = machine_code.specialise(one)
        if special.key not in self._figures:
            binary = machine_code.build(special, self.machine.target)
            self._figures[special.key] = machine_code.read(binary, self.machine.target)
        return self._figures[special.key]

    def kernels(self, noted: Sequence[Launch], n_cols: int) -> Iterator[Kernel]:
        """Yield the figures of launches. A number in the name distinguishes launches of the same kernel."""
        times: collections.Counter[str] = collections.Counter()
        for one in noted:
            times[one.name] += 1
            figures, warps = self.figures(one), one.warps
            programs = self.machine.resident_programs(figures["registers"], figures["shared"], warps)
            yield {
                "kernel": one.name if times[one.name] == 1 else f"{one.name} {times[one.name]}",
                "warps": warps,
                "programs": one.programs,
                "resident_warps": min(programs, math.ceil(one.programs / self.machine.sms)) * warps,
                "specialises_on_rows": machine_code.specialises_on(
                    one.kernel, ("n_rows", "n_partials", "rows_per_program")
                ),
                **work_of(one, n_cols),
                **figures,
            }


def has(library: str, case: Case | Case8, dtype: str, n_cols: int) -> bool:
    """Whether there is a kernel of a library to compile for a case.

    Liger leaves residuals to torch, and has no 8 bits. The 8-bit kernels are not compiled in fp16 beside bf16, from
    which only casts differ, and at the case's own widths alone.
    """
    if isinstance(case, Case8):
        return library == "fastln" and dtype != "fp16" and n_cols in case.widths
    return library == "fastln" or not case.residual


def compile_group(group: Group, cases: Sequence[str], with_liger: bool, source: str) -> list[Row]:
    """Return the rows of a machine, a dtype and a width: one per case and library."""
    machine_name, dtype, n_cols = group
    machine = MACHINES[machine_name]
    compiler = Compiler(machine)
    implementations = [load_fastln()[0], load_liger()[0] if with_liger else None]
    rows = []
    for name, implementation in itertools.product(cases, implementations):
        case = ALL[name]
        if implementation is None or not has(implementation.name, case, dtype, n_cols):
            continue
        useful = case.useful_bytes(N_ROWS, n_cols, DTYPES[dtype].itemsize)
        row = Row(machine_name, dtype, PARAMETERS, n_cols, N_ROWS, case.name, implementation.name, source, useful)
        row.note = "" if isinstance(case, Case8) else implementation.note(case)
        rows.append(row)
        # Any error from a compiler goes into the row.
        try:
            noted = launches(implementation, case, machine, n_cols, dtype)
            row.compiled = list(compiler.kernels(noted, n_cols))
            if isinstance(case, Case8) and case.product:
                (kernel,), turns = row.compiled, math.ceil(n_cols / noted[0].given["INNER"])
                operations = case.operations(N_ROWS, n_cols)
                row.predicted = predict_product(kernel, operations, turns, N_ROWS * n_cols, machine)
            else:
                row.predicted = predict(row.compiled, useful, N_ROWS * n_cols, machine)
        except Exception as error:
            row.compiled, row.error = None, f"{type(error).__name__}: {error}".splitlines()[0]
    return rows


def _wanted(cases: Sequence[str], group: Group) -> list[str]:
    return [name for name in cases if has("fastln", ALL[name], *group[1:])]


HEAD = f"""# What the kernels compile to

Made by `python scripts/compile_report.py`, without a GPU. *Compiled*, read from the machine code: KB that an SM has
requested before it waits, registers per lane, instructions that spill. *Predicted* from these and the data sheets
(`scripts/prediction.py`): share of peak bandwidth, bytes exchanged with memory per element. Each cell has fastln's
figure, then Liger-Kernel's if it has the operation. KB and registers are for the kernel that moves the most bytes;
spills are for the worst kernel. {N_ROWS:,} rows, weight and bias in {PARAMETERS}. Liger always computes dx. The share
of an 8-bit product (`int8-linear…`, with a square weight) is that of the peak of 8-bit operations.
"""


def table(rows: Sequence[Row]) -> str:
    """Render the rows in Markdown: a section per machine and dtype, with fastln and Liger side by side."""
    lines = [HEAD]
    for (name, dtype), section in itertools.groupby(rows, lambda row: (row.machine, row.dtype)):
        lines += [
            *("", f"## {name} ({MACHINES[name].name}), {dtype}", ""),
            "| width | case | share of peak, predicted | KB in flight per SM | registers | spills "
            "| bytes per element |",
            "|---|---|---|---|---|---|---|",
        ]
        for (width, case), pair in itertools.groupby(section, lambda row: (row.width, row.case)):
            cells = [_cells(row) for row in pair]
            figures = [" · ".join(figure) for figure in zip(*cells, strict=True)]
            lines.append(f"| {width:,} | {case} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    if row.compiled is None:
        return ("fails", *("–",) * 4)
    main = max(row.compiled, key=lambda kernel: kernel["moved"])
    product = row.case in CASES8 and CASES8[row.case].product
    return (
        f"{row.predicted['share']:.0%}" if row.predicted else "not known",
        "–" if product else f"{in_flight(main) / 1024:.0f}",
        str(main["registers"]),
        str(max(kernel["spills"] for kernel in row.compiled)),
        f"{row.predicted['bytes_per_element']:.2f}" if row.predicted else "–",
    )


def merged(rows: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """Return the earlier rows, updated with the new ones, in the order of MACHINES, DTYPES, widths and CASES."""
    latest = {(*row.group, row.case, row.library): row for row in (*before, *rows) if row.case in ALL}
    orders = [{name: i for i, name in enumerate(names)} for names in (MACHINES, DTYPES, ALL, LIBRARIES)]

    def place(row: Row) -> tuple[int, ...]:
        machine, dtype, case, library = orders
        return machine[row.machine], dtype[row.dtype], row.width, case[row.case], library[row.library]

    return sorted(latest.values(), key=place)


def provenance(argv: Sequence[str]) -> dict[str, Any]:
    """Return the provenance of the rows."""
    # Not at the top: fastln imports transformers, which takes seconds and is not needed for the rest.
    from fastln.bench import provenance
    from fastln.versions import package_version

    found: dict[str, Any] = provenance.settle("cpu", "auto")[2]
    found["versions"] |= {"liger-kernel": package_version("liger-kernel")}
    return found | {"latency": LATENCY, "argv": list(argv)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--cases", nargs="+", choices=ALL, default=list(ALL), metavar="CASE")
    parser.add_argument("--no-liger", action="store_true", help="skip Liger")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--dry-run", action="store_true", help="compare and print the table, but write nothing")
    parser.add_argument("--accept", action="store_true", help="also write figures that are worse than before")
    parser.add_argument("--resume", action="store_true", help="skip what the file already has from the same code")
    parser.add_argument("--out", type=Path, default=RESULTS / "compile.json")
    options = parser.parse_args(arguments)
    before, source = load(options.out), source_digest()
    groups = list(itertools.product(options.machines, options.dtypes, options.widths))
    if options.resume:
        done = collections.defaultdict(set)
        for row in before:
            case = ALL[row.case]
            if row.source == source and (
                options.no_liger or row.library == "liger" or not has("liger", case, row.dtype, row.width)
            ):
                done[row.group].add(row.case)
        groups = [group for group in groups if not done[group] >= set(_wanted(options.cases, group))]
    origin = {} if options.dry_run else provenance(sys.argv if arguments is None else arguments)
    rows: list[Row] = []
    failed = False
    with ProcessPoolExecutor(options.jobs) as pool:
        jobs = {
            pool.submit(compile_group, group, options.cases, not options.no_liger, source): group for group in groups
        }
        for i, job in enumerate(as_completed(jobs), 1):
            print(f"{i}/{len(jobs)} compiled", *jobs[job], file=sys.stderr, flush=True)
            new = job.result()
            complaints = list(worse(new, before))
            for complaint in complaints:
                print(complaint, file=sys.stderr)
            failed |= bool(complaints)
            if options.dry_run:
                rows += new
            elif options.accept or not complaints:
                before = merged(new, before)
                save(options.out, origin, before)
                options.out.with_suffix(".md").write_text(table(before) + "\n")
    if options.dry_run:
        print(table(merged(rows, [])))
    return int(failed and (options.dry_run or not options.accept))


if __name__ == "__main__":
    sys.exit(main())
