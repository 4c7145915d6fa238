"""Regenerate the generated blocks of README.md and docs/ from the committed results.

    python scripts/tables.py            # or `make readme-tables`: rewrite every block
    python scripts/tables.py --check    # write nothing; list the pages that differ, and exit with status 1 if any do

A block is the text between `<!-- generated: NAME -->` and `<!-- /generated: NAME -->`. `BLOCKS` lists the function that
makes it from a file in benchmarks/results/. This script measures nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import gradient_cosines
import impressions as impressions_runs
import quality_table
import report_rows
import stored_table
from int8_cases import CASES8
from machines import MACHINES
from prediction import in_flight

from fastln.bench.report import memory as report_of_memory
from fastln.bench.report import section, speedups, to_markdown
from fastln.bench.results import Floor, Row, each, read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {
    "BertForMaskedLM:8x128": "BERT-base, masked words, 8×128",
    "ViTForImageClassification:8x224": "ViT-B/16, 8×224²",
    "BlipForQuestionAnswering:2x480": "BLIP-VQA, 2×480²",
    "LlamaForCausalLM:2x640": "Llama, 8 layers of 1,024, 2×640",
    "dual:dinov2-small,all-MiniLM-L6-v2": "dual encoder on VQA-RAD, batches of 32, data loading included",
}
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
PRODUCTS = {"exact": "exact", "int8": "8 bits"}
_BLOCK = re.compile(r"<!-- generated: (?P<name>[\w-]+) -->\n.*?<!-- /generated: (?P=name) -->", re.DOTALL)


def cpu(file: str = "cpu") -> str:
    """Return the suite `cpu`: norm tuning by fastln beside norm tuning and LoRA by peft, each in its faster dtype."""
    columns = ("step s of fastln", "floor s (share)", "norm tuning by peft takes", "LoRA by peft takes")
    sizes = ("peak MiB: fastln, peft's norms, LoRA", "saved MiB")
    lines = [_row("model", "products", *columns, *sizes), "|---|---|" + "---:|" * 6]
    for ours, norms, lora in _triples(file):
        least = Floor(**ours.provenance["floor"]).seconds(ours.products)
        seconds = ours.step_seconds or 0.0
        lines.append(
            _row(
                MODELS.get(ours.model, ours.model),
                PRODUCTS[ours.products],
                f"{seconds:#.3g}, {DTYPES[ours.dtype]}",
                f"{least:#.3g} ({least / seconds:.0%})",
                _times(ours, norms),
                _times(ours, lora),
                ", ".join(_mib(row.peak_memory_bytes) for row in (ours, norms, lora)),
                ", ".join(_mib(row.saved_activation_bytes) for row in (ours, norms, lora)),
            )
        )
    return f"{_measured_rows(read_rows(RESULTS / f'{file}.json'))}\n\n" + "\n".join(lines)


def cpu_summary() -> str:
    """Return the suite `cpu` for README: a line for each model."""
    takes = ("norm tuning by peft takes", "LoRA by peft takes")
    lines = [
        _row("model", "exact step s", takes[0], "8-bit step s", *takes, "peak MiB: exact, 8 bits, peft's norms, LoRA"),
        "|---|" + "---:|" * 6,
    ]
    of_model: dict[str, dict[str, tuple[Row, Row, Row]]] = defaultdict(dict)
    for ours, norms, lora in _triples("cpu"):
        of_model[ours.model][ours.products] = (ours, norms, lora)
    for model, found in of_model.items():
        (exact, norms, lora), (int8, *_) = found["exact"], found["int8"]
        steps = [f"{row.step_seconds:#.3g}, {DTYPES[row.dtype]}" for row in (exact, int8)]
        peaks = ", ".join(_mib(row.peak_memory_bytes) for row in (exact, int8, norms, lora))
        ratios = (_times(int8, norms), _times(int8, lora))
        lines.append(_row(MODELS.get(model, model), steps[0], _times(exact, norms), steps[1], *ratios, peaks))
    return f"{_measured_rows(read_rows(RESULTS / 'cpu.json'))}\n\n" + "\n".join(lines)


def zen4_predicted() -> str:
    """Return what products in 8 bits should bring on the Zen 4, whose rows are exact: arithmetic from its rates.

    One instruction for 8-bit numbers (vpdpbusd) multiplies twice as many as one for bfloat16 (vdpbf16ps), and a Zen 4
    issues as many of either. So the products of frozen linear layers should take half of their bfloat16 time; all else
    is taken to stay as it is.
    """
    linear = {ours.model: ours.provenance["floor"].get("linear_operations", 0.0) for ours, _, _ in _triples("cpu")}
    columns = ("exact, s (measured)", "8 bits, s (predicted)", "norm tuning by peft takes", "LoRA by peft takes")
    lines = [_row("model", *columns), "|---|" + "---:|" * 4]
    for ours, norms, lora in _triples("cpu-zen4"):
        if linear.get(ours.model) and ours.step_seconds:
            saved = linear[ours.model] / ours.provenance["floor"]["operations_per_second"] / 2
            seconds = ours.step_seconds - saved
            ratios = (f"{(row.step_seconds or 0.0) / seconds:.1f}" for row in (norms, lora))
            lines.append(
                _row(MODELS.get(ours.model, ours.model), f"{ours.step_seconds:#.3g}", f"{seconds:#.2g}", *ratios)
            )
    return "\n".join(lines)


def _triples(file: str) -> Iterator[tuple[Row, Row, Row]]:
    """Yield norm tuning by fastln (each form of products), norm tuning by peft and LoRA by peft, by model.

    Of rows that differ in their dtype alone, the fastest counts. All were measured in the same rounds.
    """
    measured = [row for row in read_rows(RESULTS / f"{file}.json") if row.step_seconds]
    for model in dict.fromkeys(row.model for row in measured):
        rows = [row for row in measured if row.model == model]
        norms, lora = (_fastest(rows, method, "peft", "exact") for method in ("layernorm", "lora"))
        for products in dict.fromkeys(row.products for row in rows if row.engine == "fastln"):
            yield _fastest(rows, "layernorm", "fastln", products), norms, lora


def _fastest(rows: Iterable[Row], method: str, engine: str, products: str) -> Row:
    found = (row for row in rows if (row.method, row.engine, row.products) == (method, engine, products))
    return min(found, key=lambda row: row.step_seconds or 0.0)


def _measured_rows(rows: list[Row]) -> str:
    return _measured([row.provenance for row in rows])


def _measured(provenances: list[dict[str, Any]]) -> str:
    """Say when, where and with which commands rows were measured."""
    commands: dict[str, str] = {}
    for provenance in provenances:
        commit = provenance["commit"]
        short = commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
        commands[shlex.join(provenance["argv"])] = short
    machine, versions = provenances[0]["machine"], provenances[0]["versions"]
    date = provenances[0]["started"].partition("T")[0]
    runs = "; ".join(f"`{command}` (commit {commit})" for command, commit in commands.items())
    return (
        f"*Measured* on {date}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
        + f". Commands: {runs}."
    )


def _times(ours: Row, other: Row) -> str:
    ratios = speedups(ours, other)
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}), {DTYPES[other.dtype]}"


def _mib(n_bytes: int | None) -> str:
    return "–" if n_bytes is None else f"{n_bytes / 2**20:,.0f}"


def cosines() -> str:
    """Return the cosines of norms' gradients in 8 bits and in bfloat16 with exact ones."""
    return _rows_of("cosines", gradient_cosines.table)


def storage_cosines() -> str:
    """Return the cosines of norms' gradients with rounded storage with exact ones."""
    return _rows_of("storage_cosines", gradient_cosines.table)


def impressions() -> str:
    """Return the scores of trained language models, exact beside 8 bits."""
    return _rows_of("impressions", impressions_runs.table)


def _rows_of(name: str, table: Callable[[list[dict[str, Any]]], str]) -> str:
    """Return a table of rows that hold their provenance, or that there are none."""
    file = RESULTS / f"{name}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return f"{_measured([row['provenance'] for row in rows])}\n\n{table(rows)}" if rows else "Not measured yet."


def suite(name: str) -> Callable[[], str]:
    """Return a function that gives a whole suite as in results.md of `fastln bench`, one heading level deeper."""
    return lambda: to_markdown(read_rows(RESULTS / f"{name}.json")).replace("\n## ", "\n### ").rstrip("\n")


def memory() -> str:
    """Return the suite `memory`: peak memory against step time, a table for each model."""
    file = RESULTS / "memory.json"
    if not file.exists():
        return "Not measured yet."
    rows = read_rows(file)
    parts = [f"#{section(table)}" for table in report_of_memory(rows)]
    return "\n\n".join([f"{_measured_rows(rows)} Numbers in {each(row.dtype for row in rows)}.", *parts])


def quality() -> str:
    """Return the answer quality of every method, with the time and memory of its steps."""
    runs = json.loads((RESULTS / "quality.json").read_text())["runs"]
    rows = json.loads((RESULTS / "vqa-rad.json").read_text())
    return quality_table.table(
        runs,
        {
            (row["method"], row["engine"]): row
            for row in rows
            if not row["error"] and row.get("products", "exact") == "exact"
        },
    )


def stored() -> str:
    """Return what a layer stores for backward."""
    return stored_table.table(json.loads((RESULTS / "stored.json").read_text())["rows"])


def compiled_backward() -> str:
    """Return the figures of LayerNorm's compiled backward kernels on an H100 at 768 columns, and Liger-Kernel's."""
    wanted = ("layer_norm-dx-dweight-dbias", "layer_norm-dweight-dbias", "layer_norm-dbias")
    names = {"fastln": "fastln", "liger": "Liger-Kernel"}
    columns = ("gradients", "library", "KB in flight per SM", "barriers in the loop", "share of peak, predicted")
    lines = [_row(*columns), "|---|---|" + "---:|" * 3]
    rows = [
        row
        for row in report_rows.load(RESULTS / "compile.json")
        if (row.machine, row.dtype, row.width) == ("sm_90", "bf16", 768) and row.case in wanted
    ]
    for row in sorted(rows, key=lambda row: wanted.index(row.case)):
        assert row.compiled
        assert row.predicted
        main = max(row.compiled, key=lambda kernel: kernel["moved"])
        gradients = row.case.removeprefix("layer_norm-").replace("-", ", ")
        figures = (f"{in_flight(main) / 1024:.0f}", str(main["loop_barriers"]), f"{row.predicted['share']:.0%}")
        lines.append(_row(gradients, names[row.library], *figures))
    return "\n".join(lines)


def compiled_products() -> str:
    """Return the figures of the compiled 8-bit products, 8,192 rows in bfloat16 and a weight of 4,096 x 4,096."""
    names = {"int8-linear": "y", "int8-linear-dx": "dx", "int8-linear-dx-turned": "dx, turned back"}
    of_groups, of_warps, mfma = "wgmma", "mma.sync", "mfma"
    columns = ("GPU", "result", "8-bit instruction", "registers", "spills", "share of peak", "over bfloat16's peak")
    lines = [_row(*columns), "|---|---|---|" + "---:|" * 4]
    for row in report_rows.load(RESULTS / "compile.json"):
        if row.case not in names or (row.dtype, row.width) != ("bf16", 4096):
            continue
        assert row.compiled
        (kernel,) = row.compiled
        amd = MACHINES[row.machine].target.backend == "hip"
        instruction = mfma if amd else of_groups if kernel["matrix_of_groups"] else of_warps
        share = f"{row.predicted['share']:.0%}" if row.predicted else "not known"
        over = f"{row.predicted['over_bf16']:.1f}" if row.predicted else "not known"
        figures = (str(kernel["registers"]), str(kernel["spills"]), share, over)
        lines.append(_row(MACHINES[row.machine].name, names[row.case], instruction, *figures))
    return "\n".join(lines)


def compiled_rounding() -> str:
    """Return the predicted shares of peak bandwidth of the compiled kernels that round rows of 4,096 to 8 bits."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in report_rows.load(RESULTS / "compile.json"):
        if row.case in CASES8 and not CASES8[row.case].product and (row.dtype, row.width) == ("bf16", 4096):
            assert row.compiled
            assert row.predicted
            registers = max(kernel["registers"] for kernel in row.compiled)
            found[row.case][row.machine] = f"{row.predicted['share']:.0%} ({registers})"
    lines = [_row("kernel", *MACHINES), "|---|" + "---:|" * len(MACHINES)]
    for name in CASES8:
        if name in found:
            lines.append(_row(name.removeprefix("int8-"), *(found[name].get(machine, "–") for machine in MACHINES)))
    return "\n".join(lines)


def compiled_passes() -> str:
    """Return how many times as long as a norm that rounds one and a pass take, as predicted: in bfloat16, float32."""
    rows = [row for row in report_rows.load(RESULTS / "compile.json") if row.library == "fastln"]
    seconds = {(row.case, row.machine, row.dtype, row.width): row.predicted["seconds"] for row in rows if row.predicted}

    def ratio(name: str, machine: str, dtype: str, width: int) -> str:
        rounding = "-factors" if name.endswith(("-dx", "-backward")) else "-turned" * name.endswith("-turned")
        alone = name.removeprefix("int8-").removesuffix("-turned")
        apart, fused = (alone, f"int8-quantise{rounding}"), (name,)
        times = (sum(seconds[case, machine, dtype, width] for case in cases) for cases in (apart, fused))
        return f"{next(times) / next(times):.2f}"

    norms = {row.case.removeprefix("int8-").removesuffix("-turned") for row in rows if not row.case.startswith("int8-")}
    lines = [_row("kernel", "columns", *MACHINES), "|---|---:|" + "---:|" * len(MACHINES)]
    for name, width in itertools.product(CASES8, CASES8["int8-quantise"].widths[:-1]):  # the last has a pass anyway
        if name.removeprefix("int8-").removesuffix("-turned") in norms:
            cells = (", ".join(ratio(name, each, dtype, width) for dtype in ("bf16", "fp32")) for each in MACHINES)
            lines.append(_row(name.removeprefix("int8-"), f"{width:,}", *cells))
    return "\n".join(lines)


def predicted_losses() -> str:
    """Return where Liger-Kernel's norms are predicted to be faster: how many cases, and by how many points of peak."""
    shares: dict[tuple[str, int], dict[tuple[str, str], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in report_rows.load(RESULTS / "compile.json"):
        if row.predicted:
            shares[row.machine, row.width][row.dtype, row.case][row.library] = row.predicted["share"]
    widths = sorted({width for _, width in shares})
    cells = {width: [_losses(shares[machine, width]) for machine in MACHINES] for width in widths}
    lines = [_row("columns", *MACHINES), "|---|" + "---|" * len(MACHINES)]
    for found, group in itertools.groupby(widths, key=lambda width: cells[width]):
        same = list(group)
        name = f"{same[0]:,}" if len(same) == 1 else f"{same[0]:,} to {same[-1]:,}"
        lines.append(_row(name, *found))
    return "\n".join(lines)


def _losses(cases: dict[tuple[str, str], dict[str, float]]) -> str:
    behind = [pair["liger"] - pair["fastln"] for pair in cases.values() if {"liger", "fastln"} <= pair.keys()]
    if not behind:
        return "no case to compare"
    lost = [points for points in behind if points > 0]
    return f"{len(lost)} of {len(behind)}" + (f", by up to {100 * max(lost):.0f}" if lost else "")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


BLOCKS: dict[str, Callable[[], str]] = {
    "cpu": cpu,
    "cpu-zen4": lambda: cpu("cpu-zen4"),
    "cpu-zen4-predicted": zen4_predicted,
    "cpu-summary": cpu_summary,
    "cosines": cosines,
    "storage-cosines": storage_cosines,
    "impressions": impressions,
    "quick": suite("quick"),
    "vqa-rad": suite("vqa-rad"),
    "memory": memory,
    "quality": quality,
    "stored": stored,
    "compiled-backward": compiled_backward,
    "compiled-products": compiled_products,
    "compiled-passes": compiled_passes,
    "compiled-rounding": compiled_rounding,
    "predicted-losses": predicted_losses,
}
"""The function that makes each block, by the block's name."""


def pages() -> list[Path]:
    """Return the files that may contain blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """Return a page with every block regenerated."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- generated: {name} -->\n{BLOCKS[name]()}\n<!-- /generated: {name} -->"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    options = parser.parse_args()
    changed = {page: new for page in pages() if (new := filled(page.read_text())) != page.read_text()}
    for page, text in changed.items():
        if options.check:
            print(f"{page.relative_to(ROOT)} differs from the results; run make readme-tables")
        else:
            page.write_text(text)
            print(f"{page.relative_to(ROOT)} rewritten")
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
