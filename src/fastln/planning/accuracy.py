"""How far predictions were from measured runs: the committed table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastln.errors import FastLNError
from fastln.planning.report import table

NAME = "plan.json"
PLACES = (Path(__file__).parent / NAME, Path(__file__).parents[3] / "benchmarks" / "results" / NAME)
"""Where the rows are: in an installed package, and in the repository."""

COMMANDS = "python scripts/plan_accuracy.py; python scripts/fit_step_time.py benchmarks/results/plan.json --write"


def accuracy_table(places: tuple[Path, ...] = PLACES) -> str:
    """Format the committed rows: predicted and measured peaks and step times.

    Raises:
        FastLNError: If there are none.
    """
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FastLNError(f"there is no table of the accuracy here; in the repository, make it: {COMMANDS}")
    found = json.loads(path.read_text(encoding="utf-8"))
    machine = found["provenance"]["machine"]
    rows = [_HEAD, *(_row(row) for row in found["rows"])]
    lines = [f"predicted beside measured on {machine['cpu']}, {machine['threads']} threads ({COMMANDS})", *table(rows)]
    for what, (predicted, measured) in {
        "peaks": ("predicted_peak_bytes", "measured_peak_bytes"),
        "step times": ("predicted_step_seconds", "step_seconds"),
    }.items():
        errors = [abs(row[predicted] / row[measured] - 1) for row in found["rows"] if row.get(predicted)]
        if errors:
            lines.append(f"{what}: {len(errors)} combinations, the largest error {max(errors):.1%}")
    return "\n".join(lines)


_HEAD = ["what", "peak, predicted MiB", "measured", "error", "step, predicted s", "measured", "error"]


def _row(row: dict[str, Any]) -> list[str]:
    words = (f"{row['model']}:{row['batch_size']}x{row['size']}", row["method"], row["engine"], row["dtype"])
    modes = [row[name] for name in ("activations", "products") if row[name] != "exact"]
    peaks = row["predicted_peak_bytes"], row["measured_peak_bytes"]
    seconds = row.get("predicted_step_seconds"), row["step_seconds"]
    cells = [f"{peak / 2**20:,.0f}" for peak in peaks] + [f"{peaks[0] / peaks[1] - 1:+.1%}"]
    if seconds[0] is None:
        return [" ".join((*words, *modes)), *cells, "-", f"{seconds[1]:.2f}", "-"]
    return [" ".join((*words, *modes)), *cells, *(f"{s:.2f}" for s in seconds), f"{seconds[0] / seconds[1] - 1:+.0%}"]
