"""Present rows: a table on the terminal, the same table in Markdown, and a plot of throughput against memory."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastln.bench.front import Place, fronts, times_over
from fastln.bench.picture import draw, draw_fronts
from fastln.bench.results import Floor, Row, by_model, contender_of, data_name, each

TABLE = "results.md"
PICTURE = "results.png"
FILES = (TABLE, PICTURE)

BASELINES = {"layernorm/torch": "plain unfreezing", "layernorm/peft": "peft's way of tuning norms"}
OURS = "layernorm/fastln"
PEERS = "peft"  # the engine to compare ours with

_COLUMNS = (
    "method (engine)",
    "step s (range)",
    "speed (range)",
    "samples (per s)",
    "peak (MiB)",
    "saved (MiB)",
    "trained (%)",
    "last loss",
    "accuracy % (closed, open)",
)
_SHOWN = 12  # missing runs that the header names
_WIDE = 150  # terminal columns; on a narrower terminal, text in brackets goes on a second line


@dataclass(frozen=True, slots=True)
class Section:
    """One table: `cells` has one line per row and one entry per column."""

    title: str
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()  # errors, and reasons why accuracies are missing
    columns: tuple[str, ...] = _COLUMNS


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write `results.md` and `results.png` into `folder`: with rows of several storage modes, a picture of fronts."""
    (folder / TABLE).write_text(to_markdown(rows), encoding="utf-8")
    if found := fronts(rows):
        draw_fronts(rows, found, folder / PICTURE)
    else:
        draw(rows, folder / PICTURE)


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the tables, to stdout by default."""
    console = console or Console()
    for line in _header(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for table in (*tables(rows), *peers(rows), *memory(rows)):
        grid = Table(title=table.title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
        fold = _two_lines if console.width < _WIDE else str
        for index, column in enumerate(table.columns):
            grid.add_column(fold(column), justify="right" if index else "left", overflow="fold")
        for cells in table.cells:
            grid.add_row(*map(fold, cells))
        console.print(grid)
        for note in table.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def _two_lines(cell: str) -> str:
    return cell.replace(" (", "\n").removesuffix(")")


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the tables as Markdown."""
    parts = ["\n\n".join(_header(rows))]
    for table in (*tables(rows), *peers(rows), *memory(rows)):
        parts.append(section(table))
    return "\n\n".join(parts) + "\n"


def section(table: Section) -> str:
    """Return one table as Markdown, with its title and notes."""
    rule = ("---", *["---:"] * (len(table.columns) - 1))
    grid = "\n".join(f"| {' | '.join(line)} |" for line in (table.columns, rule, *table.cells))
    notes = "\n".join(f"- {_escape(note)}" for note in table.notes)
    return f"## {table.title}\n\n{grid}" + (f"\n\n{notes}" if notes else "")


def tables(rows: Sequence[Row]) -> list[Section]:
    """Return one table per model and dtype, in the rows' order."""
    result = []
    baseline = _baseline(rows)
    for title, group in by_model(rows):
        base = _find(group, baseline)
        errors = [f"{row.label} failed: {row.error}" for row in group if row.error]
        reasons: dict[str, list[str]] = {}
        for row in group:
            if row.accuracy_note and not row.error:
                reasons.setdefault(row.accuracy_note, []).append(row.label)
        notes = [
            f"Accuracy{' of ' + ', '.join(names) if len(reasons) > 1 else ''}: {reason}."
            for reason, names in reasons.items()
        ]
        result.append(Section(title, tuple(_cells(row, base) for row in group), (*errors, *notes)))
    return result


def peers(rows: Sequence[Row]) -> list[Section]:
    """Return a table that compares fastln's norm tuning with peft's methods, one line per model.

    A model without a result for fastln's norm tuning is skipped. The list is empty if nothing is left to compare.
    """
    others = list(dict.fromkeys(row.label for row in rows if row.engine == PEERS))
    lines = []
    for title, group in by_model(rows):
        for ours in group:
            if f"{ours.method}/{ours.engine}" != OURS or ours.step_seconds is None or not others:
                continue
            words = ", ".join(contender_of(ours).words)
            ratios = {row.label: speedups(ours, row) for row in group}
            floor = ours.provenance.get("floor")
            least = Floor(**floor).seconds(ours.products) if floor else None
            lines.append(
                (
                    f"{title}, {words}" if words else title,
                    _number(ours.step_seconds, "#.3g"),
                    "–" if least is None else f"{least:#.3g} ({100 * least / ours.step_seconds:.0f}%)",
                    *(_spread(ratios.get(other, []), ".2f") for other in others),
                )
            )
    columns = ("model", "step s of fastln", "floor s (share)", *(f"over {other}" for other in others))
    note = (
        "Ratios: the other method's step time divided by fastln's in the same round, median over the rounds (range). "
        "Floor: the time of the step's matrix products alone, at the rate measured on this machine for a product of a "
        "layer's size."
    )
    return [Section("fastln beside peft", tuple(lines), (note,), columns)] if lines else []


def memory(rows: Sequence[Row]) -> list[Section]:
    """Return a table of peak memory against step time for each model of which rows differ in what they keep."""
    return [_memory(title, found) for title, found in fronts(rows)]


def _memory(title: str, found: Sequence[Place]) -> Section:
    first = found[0].row if found else None
    columns = (
        "method (engine)",
        "step s",
        f"time over {first.label if first else '–'}",
        "peak (MiB)",
        "predicted (MiB)",
        "over measured (%)",
        "saved (MiB)",
        "on the front",
    )
    lines, notes = [], []
    for place in found:
        row, predicted = place.row, place.row.predicted_peak_bytes
        lines.append(
            (
                row.label,
                f"{place.seconds:#.3g}",
                _spread(times_over(row, first or row), ".2f"),
                _number(place.peak, ",.0f", 2**20),
                _number(predicted, ",.0f", 2**20),
                "–" if predicted is None else f"{100 * (predicted / place.peak - 1):+.1f}",
                _number(row.saved_activation_bytes, ",.1f", 2**20),
                "no" if place.better else "yes",
            )
        )
        if row.storage_note:
            notes.append(f"{row.label}: {row.storage_note}.")
        if place.better and row.engine == "fastln":
            notes.append(_why_not(place, place.better))
    return Section(f"{title}: peak memory against time", tuple(lines), tuple(notes), columns)


def _why_not(place: Place, better: Place) -> str:
    times = times_over(better.row, place.row)
    noise = "; the rounds do not agree which is faster" if min(times) < 1 < max(times) else ""
    return (
        f"{place.row.label} is not on the front: {better.row.label} takes {better.seconds / place.seconds:.2f} of its "
        f"time ({min(times):.2f}–{max(times):.2f}) and {better.peak / place.peak:.3f} of its memory{noise}."
    )


def _find(rows: Sequence[Row], pair: str | None) -> Row | None:
    """Return the row of a method/engine pair as it usually runs."""
    return next((row for row in rows if f"{row.method}/{row.engine}" == pair and not contender_of(row).words), None)


def _baseline(rows: Sequence[Row]) -> str | None:
    return next((pair for pair in BASELINES if _find(rows, pair)), None)


def speedups(row: Row, base: Row | None) -> list[float]:
    """Return how many times as fast as `base` a row was, for each round that both finished."""
    if base is None:
        return []
    return [theirs / ours for ours, theirs in zip(row.step_seconds_by_round, base.step_seconds_by_round, strict=False)]


def _cells(row: Row, base: Row | None) -> tuple[str, ...]:
    if row.step_seconds is None:
        return (row.label, "failed", *["–"] * (len(_COLUMNS) - 2))
    return (
        row.label,
        _spread(row.step_seconds_by_round, "#.3g", row.step_seconds),
        _spread(speedups(row, base), ".2f"),
        _number(row.samples_per_second, ".1f"),
        _number(row.peak_memory_bytes, ",.0f", 2**20),
        _number(row.saved_activation_bytes, ",.1f", 2**20),
        _trained(row),
        _number(row.final_loss, ".4f"),
        _accuracy(row.accuracy),
    )


def _spread(values: Sequence[float], form: str, middle: float | None = None) -> str:
    if not values:
        return "–"
    middle = median(values) if middle is None else middle
    return f"{middle:{form}} ({min(values):{form}}–{max(values):{form}})"


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "–" if value is None else f"{value / unit:{form}}"


def _trained(row: Row) -> str:
    if row.trainable_parameters is None or not row.total_parameters:
        return "–"
    return f"{row.trainable_parameters:,} ({100 * row.trainable_parameters / row.total_parameters:.3g}%)"


def _accuracy(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return "–"
    overall, closed, open_ = (_number(accuracy[part], ".1f") for part in ("all", "closed", "open"))
    return f"{overall} ({closed}, {open_})"


def _escape(text: str) -> str:
    return text.replace("\n", "\n  ").replace("|", "\\|")


def _speed(rows: Sequence[Row]) -> str:
    base = _find(rows, pair := _baseline(rows))
    if base is None or pair is None:
        return ""
    return (
        f"Speed: how many times as fast as {base.label}, which is {BASELINES[pair]}, in the same round: median over "
        "the rounds (range). "
    )


def _cut_short(missing: Sequence[str]) -> list[str]:
    """Return a paragraph about runs that a suite has not done, if any."""
    if not missing:
        return []
    shown = "; ".join(missing[:_SHOWN]) + (f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    return [f"**Cut short.** Missing: {shown}. Ratios and ranges are of fewer rounds than planned."]


def _header(rows: Sequence[Row]) -> list[str]:
    """Return paragraphs that say what was measured, on which machine, with which command."""
    row = rows[0]
    origin = row.provenance
    suite, machine, versions = origin["suite"], origin["machine"], origin["versions"]
    kinds = sorted({row.provenance["memory"] for row in rows if row.provenance["memory"]})
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    dtypes, sizes = each(row.dtype for row in rows), each(row.batch_size for row in rows)
    command = f"`{shlex.join(origin['argv'])}`" if origin["argv"] else "not recorded"
    return [
        *_cut_short(origin.get("missing", [])),
        f"*Measured*, suite {suite['name']}, {origin['started']}. Command: {command}",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB{gpu}, {machine['kernel']}; device {row.device}, {dtypes}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", commit {origin['commit'] or 'unknown'}.",
        f"Data: {data_name(rows)}; batches of {sizes}, seed {origin['seed']}. "
        f"Every run has its own process. Rounds are interleaved: {suite['rounds']} rounds, each with {suite['steps']} "
        f"timed steps after {suite['warmup_steps']} for warm-up. A step is data loading, forward, backward and "
        "optimizer.",
        f"Step seconds: the median of all timed steps (range of the rounds' medians). {_speed(rows)}"
        f"Peak: {', '.join(kinds) or 'not measured'}. Saved: what autograd keeps for backward.",
    ]
