"""A forecast in words, as JSON, and as a picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastln.bench.picture import COLOURS, Point, place_labels
from fastln.peak import Saved, by_kind, by_layer
from fastln.planning.forecast import Forecast, Row
from fastln.step_time import COSTS

MIB, GIB = 1 << 20, 1 << 30


def render(found: Forecast) -> str:
    """Format a forecast as text."""
    return "\n".join(line for part in (_head, _memory, _times, _others, _modes, _end) for line in part(found))


def _head(found: Forecast) -> Iterator[str]:
    request = found.request
    yield (
        f"plan of {found.model} ({found.n_parameters:,} parameters, {found.dtype}), {found.ours.label}: every number "
        "is predicted; nothing ran"
    )
    yield f"batch: {found.batch.describe()}"
    if (corpus := found.corpus) is not None:
        words = (
            f"data: {corpus.name}, {corpus.n_samples:,} training questions of {corpus.mean_tokens} tokens in the mean "
        )
        yield f"{words}and {corpus.most_tokens} at most ({corpus.counted})" + (
            f"; {corpus.images}" if corpus.images else ""
        )
        if found.size != found.usual:
            yield "  memory is that of the longest texts, time that of texts of mean length"
    if found.budget is not None:
        where = f"of {found.device.name}" if request.budget is None else "asked for"
        yield f"budget: {found.budget / GIB:,.2f} GiB {where}; drivers, libraries and their contexts need part of it"


def _memory(found: Forecast) -> Iterator[str]:
    memory = found.ours.memory
    yield "memory of a step, MiB, predicted"
    parts = {
        "weights": memory.weights,
        f"gradients ({found.ours.n_trained:,} trained)": memory.gradients,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "saved for backward": memory.saved_bytes,
        "workspace": memory.workspace,
    }
    yield from (f"  {name:34} {size / MIB:12,.1f}" for name, size in parts.items())
    yield f"  {f'peak, in the {memory.phase}':34} {memory.peak / MIB:12,.1f}"
    if not memory.kept:
        return
    total = sum(part.n_bytes for part in memory.kept)
    yield f"saved from forward to backward, MiB, predicted: {total / MIB:,.1f}"
    yield "  by kind: " + ", ".join(f"{kind} {size / MIB:,.1f}" for kind, size in by_kind(memory.kept).items())
    yield "  by layer: " + ", ".join(_layers(memory.kept))


def _layers(saved: tuple[Saved, ...]) -> Iterator[str]:
    """Yield each run of layers that keep the same."""
    sizes = [(re.sub(r"\d+$", "", name), name, size) for name, size in by_layer(saved).items()]
    for (stem, size), run in groupby(sizes, key=lambda entry: (entry[0], entry[2])):
        names = [name for _, name, _ in run]
        numbers = [name.removeprefix(stem) for name in names]
        if len(names) == 1:
            yield f"{names[0] or 'the model itself'} {size / MIB:,.1f}"
        else:
            yield f"{stem}{numbers[0]}-{numbers[-1]} {size / MIB:,.1f} each"


def _times(found: Forecast) -> Iterator[str]:
    work = found.ours.work
    yield (
        f"a step, predicted: {work.operations / 1e12:,.3g} TFLOP in matrix products, {work.n_bytes / 1e9:,.3g} GB "
        f"moved by other operations, {work.n_calls:,} calls"
    )
    rows = [["device", "s per step", "samples per s", *(["minutes per epoch"] if found.corpus else []), "peak fits"]]
    for name, (device, parts) in found.times.items():
        epoch = []
        if found.corpus is not None:
            epoch = [f"{found.corpus.n_steps(found.batch.n_samples) * parts.total / 60:,.1f}"]
        rate = found.batch.n_samples / parts.total
        budget = found.request.budget or device.memory
        fits = "yes" if found.ours.memory.peak <= budget else "no"
        _, served = device.rate(found.dtype)
        note = "" if served == found.dtype else f" ({served} units)"
        rows.append([name + note, f"{parts.total:.3g}", f"{rate:,.3g}", *epoch, fits])
    yield "time, predicted"
    yield from table(rows)
    kinds = {device.kind for device, _ in found.times.values()}
    yield from (
        f"  {'this CPU' if kind == 'cpu' else 'GPUs'}: coefficients {COSTS[kind].source}" for kind in sorted(kinds)
    )


def _others(found: Forecast) -> Iterator[str]:
    yield f"side by side, predicted: MiB, and seconds on {found.device.name}"
    yield from table([_COLUMNS, *(_cells(row, found) for row in (found.ours, *found.others))])
    yield from (f"  missing: {note}" for note in found.notes)


_COLUMNS = ["method", "trained", "weights", "optimizer", "saved", "workspace", "peak", "s per step", "largest batch"]


def _cells(row: Row, found: Forecast) -> list[str]:
    memory = row.memory
    sizes = (memory.weights, memory.gradients + memory.optimizer, memory.saved_bytes, memory.workspace, memory.peak)
    batch = "-" if row.largest_batch is None else f"{row.largest_batch:,}"
    return [row.label, f"{row.n_trained:,}", *(f"{size / MIB:,.0f}" for size in sizes), f"{row.time.total:.3g}", batch]


def _modes(found: Forecast) -> Iterator[str]:
    if not found.modes:
        return
    yield f"storage modes, predicted: MiB, and seconds on {found.device.name}"
    front = {row.label for row in found.front}
    head = ["activations", "saved", "peak", "s per step", "largest batch", ""]
    rows = []
    for row in found.modes:
        batch = "-" if row.largest_batch is None else f"{row.largest_batch:,}"
        fits = "" if found.budget is None or row.memory.peak <= found.budget else "does not fit"
        words = fits or ("" if row.label in front else "another is smaller and faster")
        sizes = (row.memory.saved_bytes, row.memory.peak)
        name = row.candidate.settings.activations
        rows.append([name, *(f"{size / MIB:,.0f}" for size in sizes), f"{row.time.total:.3g}", batch, words])
    yield from table([head, *rows])


def _end(found: Forecast) -> Iterator[str]:
    if found.largest_image is not None:
        yield f"largest images that fit, predicted: {found.largest_image}², {found.batch.n_samples} in a batch"
    if not found.modes:
        return
    best, n_samples = found.best, found.batch.n_samples
    if best is not None:
        why = "the fastest" if found.budget is None else "the fastest that fits"
        yield f"take: --activations {best.candidate.settings.activations}, {why}"
        return
    least = min(found.modes, key=lambda row: row.memory.peak)
    batch = max(found.modes, key=lambda row: row.largest_batch or 0)
    words = f"no mode fits {n_samples} samples: the least is {least.memory.peak / GIB:,.2f} GiB ({least.label})"
    fits = f"; the largest batch that fits is {batch.largest_batch} ({batch.label})" if batch.largest_batch else ""
    yield words + (fits or "; not even one sample fits")


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, the first row of which is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column == 0 or (column == len(row) - 1 and not rows[0][-1]) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join(cells).rstrip()


def as_json(found: Forecast) -> dict[str, Any]:
    """Return a forecast as what `json.dumps` takes."""
    corpus = found.corpus
    return {
        "predicted": True,
        "model": found.model,
        "parameters": found.n_parameters,
        "dtype": found.dtype,
        "batch": found.batch.describe(),
        "budget_bytes": found.budget,
        "data": None if corpus is None else vars(corpus),
        "ours": _row(found.ours),
        "others": [_row(row) for row in found.others],
        "storage_modes": [_row(row) for row in found.modes],
        "take": None if found.best is None else found.best.candidate.settings.activations,
        "largest_image_size": found.largest_image,
        "devices": {name: _device(found, name) for name in found.times},
        "missing": list(found.notes),
    }


def _device(found: Forecast, name: str) -> dict[str, Any]:
    device, parts = found.times[name]
    steps = None if found.corpus is None else found.corpus.n_steps(found.batch.n_samples)
    return {
        "memory_bytes": device.memory,
        "bytes_per_second": device.bandwidth,
        "operations_per_second": dict(device.rates),
        "source": device.source,
        "coefficients": COSTS[device.kind].source,
        "step_seconds": parts._asdict(),
        "minutes_per_epoch": None if steps is None else steps * parts.total / 60,
    }


def _row(row: Row) -> dict[str, Any]:
    memory, settings = row.memory, row.candidate.settings
    return {
        "label": row.label,
        "method": settings.method,
        "engine": settings.engine,
        "activations": settings.activations,
        "products": settings.products,
        "trained_parameters": row.n_trained,
        "weights_bytes": memory.weights,
        "gradients_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "batch_bytes": memory.batch,
        "saved_bytes": memory.saved_bytes,
        "workspace_bytes": memory.workspace,
        "peak_bytes": memory.peak,
        "peak_in": memory.phase,
        "saved_by_kind": by_kind(memory.kept),
        "saved_by_layer": by_layer(memory.kept),
        "operations": row.work.operations,
        "moved_bytes": row.work.n_bytes,
        "calls": row.work.n_calls,
        "step_seconds": row.time._asdict(),
        "largest_batch": row.largest_batch,
    }


def draw(found: Forecast, path: Path) -> None:
    """Write a picture of peak memory against step time: every storage mode, and the other methods."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    modes = found.modes or (found.ours,)
    rows = [*((row, COLOURS[1], "*") for row in modes), *((row, COLOURS[0], "o") for row in found.others)]
    points = [Point(row.memory.peak / MIB, row.time.total, row.label, colour, mark) for row, colour, mark in rows]
    for point in points:
        axes.plot(point.x, point.y, point.marker, color=point.colour, markersize=9, markeredgecolor="white")
    front = [(row.memory.peak / MIB, row.time.total) for row in found.front]
    axes.plot(*zip(*front, strict=True), color=COLOURS[1], linewidth=1, zorder=1) if front else None
    if found.budget is not None:
        axes.axvline(found.budget / MIB, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("peak memory, MiB, predicted (left is better)")
    axes.set_ylabel(f"seconds per step on {found.device.name}, predicted (down is better)")
    axes.set_title(f"Predicted: {found.model}, {found.dtype}, {found.batch.describe()}", fontsize=10)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_xscale("log")
    axes.margins(0.2, 0.15)
    figure.canvas.draw()  # computes the layout; the labels are placed afterwards
    figure.set_layout_engine("none")
    place_labels(axes, points)
    figure.savefig(path, dpi=150)
