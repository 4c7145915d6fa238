"""Plot throughput against peak memory: one panel per model and dtype, one point per method and engine."""

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

from fastln.bench.results import Row, by_model, data_name, each

# The Okabe-Ito palette, which is safe for colour-blind readers.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = {"fastln": "*", "peft": "s", "torch": "o"}
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
    n_columns = min(len(groups), _PANELS)
    n_lines = math.ceil(len(groups) / n_columns)
    methods = list(dict.fromkeys(row.method for row in rows))
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(methods)}
    figure = Figure(figsize=(6.4 * n_columns, 4.8 * n_lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(n_lines, n_columns, place + 1) for place in range(len(groups))]
    points = []
    for axes, (title, group) in zip(panels, groups, strict=True):
        points.append([_point(row, colours[row.method]) for row in group if row.step_seconds is not None])
        _panel(axes, title, points[-1])
    figure.suptitle(_title(rows), fontsize=10)
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


def _point(row: Row, colour: str) -> Point:
    memory, throughput = row.peak_memory_bytes or 0, row.samples_per_second or 0
    return Point(memory / 2**20, throughput, row.label, colour, _MARKERS.get(row.engine, "o"))


def _title(rows: Sequence[Row]) -> str:
    machine = rows[0].provenance["machine"]
    where = machine["gpu"] if rows[0].device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    dtypes, sizes = each(row.dtype for row in rows), each(row.batch_size for row in rows)
    cut_short = "Cut short, runs are missing. " if rows[0].provenance.get("missing") else ""
    return f"{cut_short}Measured: {where}; {dtypes}, batches of {sizes}; {data_name(rows)}"


def _panel(axes: Axes, title: str, points: Sequence[Point]) -> None:
    axes.set_title(title)
    axes.set_xlabel("peak memory, MiB (left is better)")
    axes.set_ylabel("samples per second (up is better)")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(0.22, 0.15)
    for point in points:
        size = 13 if point.marker == "*" else 8
        axes.plot(point.x, point.y, point.marker, color=point.colour, markersize=size, markeredgecolor="white")
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
