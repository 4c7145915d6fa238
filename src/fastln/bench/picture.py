"""Plot throughput against peak memory, or peak memory against step time: one panel per model and dtype."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from fastln.bench.front import Place
from fastln.bench.results import Row, by_model, contender_of, data_name, each

# The Okabe-Ito palette, which is safe for colour-blind readers.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = {"fastln": "*", "peft": "s", "torch": "o", "compiled": "D"}
_ENGINES = {"fastln": COLOURS[0], "torch": COLOURS[1], "compiled": COLOURS[2], "peft": COLOURS[3]}
_FRONT = "#999999"
_PANELS = 4  # per row
_OFFSETS = [  # candidate offsets of a label from its point, in points, nearest first
    (x * radius, y * radius)
    for radius in (9, 16, 24, 34, 46, 60)
    for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot as a PNG file.

    Args:
        rows: The rows to plot. Rows without a measurement are skipped.
        path: The file to write.
    """
    groups = by_model(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(methods)}
    figure, panels = _panels(len(groups))
    points = []
    for axes, (title, group) in zip(panels, groups, strict=True):
        points.append([_point(row, colours[row.method]) for row in group if row.step_seconds is not None])
        _panel(axes, title, points[-1], "peak memory, MiB (left is better)", "samples per second (up is better)")
    _finish(figure, panels, points, _title(rows), path)


def draw_fronts(rows: Sequence[Row], found: Sequence[tuple[str, Sequence[Place]]], path: Path) -> None:
    """Write a plot of peak memory against step time as a PNG file, with each panel's front as a line.

    Args:
        rows: All rows of the run.
        found: The panels, as `fastln.bench.front.fronts` returns them.
        path: The file to write.
    """
    figure, panels = _panels(len(found))
    points = []
    methods = {place.row.method for _, places in found for place in places}
    for axes, (title, places) in zip(panels, found, strict=True):
        points.append([_place_point(place, names_method=len(methods) > 1) for place in places])
        _panel(axes, title, points[-1], "seconds of a step (left is better)", "peak memory, MiB (down is better)")
        front = sorted((place.seconds, place.peak / 2**20) for place in places if place.better is None)
        axes.step(*zip(*front, strict=True), where="post", color=_FRONT, linewidth=1, zorder=0) if front else None
    _finish(figure, panels, points, f"{_title(rows)}. Line: the front. Hollow: behind it", path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    n_columns = min(count, _PANELS)
    n_lines = math.ceil(count / n_columns)
    figure = Figure(figsize=(6.4 * n_columns, 4.8 * n_lines), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(n_lines, n_columns, place + 1) for place in range(count)]


def _finish(
    figure: Figure, panels: Sequence[Axes], points: Sequence[Sequence["Point"]], title: str, path: Path
) -> None:
    figure.suptitle(title, fontsize=10)
    figure.canvas.draw()  # computes the layout; the labels are placed afterwards
    figure.set_layout_engine("none")
    for axes, own in zip(panels, points, strict=True):
        place_labels(axes, own)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a panel, with its label."""

    x: float
    y: float
    label: str
    colour: str
    marker: str
    is_filled: bool = True


def _point(row: Row, colour: str) -> Point:
    memory, throughput = row.peak_memory_bytes or 0, row.samples_per_second or 0
    return Point(memory / 2**20, throughput, row.label, colour, _MARKERS.get(row.engine, "o"))


def _place_point(place: Place, *, names_method: bool) -> Point:
    contender = contender_of(place.row)
    words = contender.words or ["exact" if contender.engine == "fastln" else "stock code"]
    label = ", ".join(([f"{contender.method}/{contender.engine}"] if names_method else []) + words)
    kind = "compiled" if contender.compiled is not None else contender.engine
    on_front = place.better is None
    return Point(place.seconds, place.peak / 2**20, label, _ENGINES.get(kind, COLOURS[-1]), _MARKERS[kind], on_front)


def _title(rows: Sequence[Row]) -> str:
    machine = rows[0].provenance["machine"]
    where = machine["gpu"] if rows[0].device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    dtypes, sizes = each(row.dtype for row in rows), each(row.batch_size for row in rows)
    cut_short = "Cut short, runs are missing. " if rows[0].provenance.get("missing") else ""
    return f"{cut_short}Measured: {where}; {dtypes}, batches of {sizes}; {data_name(rows)}"


def _panel(axes: Axes, title: str, points: Sequence[Point], x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(0.22, 0.15)
    for point in points:
        size = 13 if point.marker == "*" else 8
        inside, edge = (point.colour, "white") if point.is_filled else ("white", point.colour)
        axes.plot(point.x, point.y, point.marker, color=inside, markersize=size, markeredgecolor=edge)
    if not points:
        axes.text(0.5, 0.5, "every run failed", ha="center", transform=axes.transAxes)


def place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Put each label at the nearest place where it overlaps points and earlier labels least."""
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    centres = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in centres]
    frame = axes.get_window_extent()

    def overlap(box: Bbox) -> float:
        inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
        return sum(_overlap(box, other) for other in taken) + (0 if inside else 1e6)

    for point in points:
        note = axes.annotate(
            point.label, (point.x, point.y), (0, 0), textcoords="offset points", fontsize=9, color=point.colour
        )

        def box_at(offset: tuple[float, float], note: Annotation = note) -> Bbox:
            x, y = offset
            note.set(
                position=offset,
                ha="left" if x > 0 else "right" if x < 0 else "center",
                va="bottom" if y > 0 else "top" if y < 0 else "center",
            )
            return note.get_window_extent(renderer)

        best = min(_OFFSETS, key=lambda offset: overlap(box_at(offset)))
        box = box_at(best)
        taken.append(box)
        if max(map(abs, best)) > 12:  # far from its point, so draw a line back to it
            x, y = axes.transData.transform((point.x, point.y))
            end = axes.transData.inverted().transform((np.clip(x, box.x0, box.x1), np.clip(y, box.y0, box.y1)))
            axes.plot((point.x, end[0]), (point.y, end[1]), color=point.colour, linewidth=0.7, zorder=1)


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0) * max(height, 0)
