"""Fit the coefficients of predicted step times (`fastln.step_time`) to the steps that were measured on a CPU.

    python scripts/fit_step_time.py benchmarks/results/cpu.json            # of fastln bench
    python scripts/fit_step_time.py benchmarks/results/plan.json --write   # of scripts/plan_accuracy.py

With `--write` each row gets `predicted_step_seconds`, by the coefficients in `fastln.step_time`, not by this fit.
`fastln plan --accuracy` shows them.

Run it on the machine that measured, while it does nothing else. Rates are the best of those that the rows recorded, or
else measured now, as the bandwidth is. What each step does is counted on meta. The fit makes the sum of squared
relative errors least, with no coefficient below zero, and `MOST_PER_CALL` as the most that a call may cost. Attention's
products get the efficiency of linear layers': the rows do not tell them apart.

It prints `CPU_COSTS` for `fastln.step_time`, and each row's prediction: by this fit, and by one to the other models'
rows, which says how well a model is predicted that was not there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from plan_accuracy import MODELS, Combination, batch_of, put

from fastln.devices import Device
from fastln.models.shapes import is_shape
from fastln.planning.candidate import Candidate
from fastln.settings import MethodSettings
from fastln.step_time import CPU_COSTS, Costs, Work, step_seconds, step_work, this_cpu

MOST_PER_CALL = 1e-4
"""More would be other costs in disguise: calls and bytes grow together."""


class Measured(NamedTuple):
    """A row of the benchmark, and what its step does."""

    label: str
    model: str
    seconds: float
    work: Work


def measured(rows: Sequence[dict[str, Any]]) -> list[Measured]:
    """Count the work of every row that was measured on a CPU with random batches."""
    return [Measured(_label(row), row["model"], row["step_seconds"], _work(row)) for row in rows if _is_known(row)]


def _is_known(row: dict[str, Any]) -> bool:
    is_accuracy = "measured_peak_bytes" in row
    return is_accuracy or (is_shape(row["model"]) and row["device"] == "cpu" and row["step_seconds"] is not None)


def _label(row: dict[str, Any]) -> str:
    return " ".join(row[name] for name in ("model", "method", "engine", "dtype", "products"))


def _work(row: dict[str, Any]) -> Work:
    if "measured_peak_bytes" in row:
        one = Combination(*(row[name] for name in Combination._fields))
        family = MODELS[one.model]
        with torch.device("meta"):
            model = family.make(one.size, family.n_layers)
        return step_work(put(model, one), batch_of(family, one))
    products = row["products"] if row["engine"] == "fastln" else "exact"
    return Candidate(
        row["model"], MethodSettings.of(row["method"], row["engine"], products=products), row["dtype"]
    ).memory_and_work()[1]


def best_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the best rates that rows recorded, by dtype."""
    rates: dict[str, float] = {}
    for row in rows:
        floor = row.get("provenance", {}).get("floor") or {}
        for dtype, name in ((row["dtype"], "operations_per_second"), ("int8", "int8_operations_per_second")):
            rates[dtype] = max(rates.get(dtype, 0.0), floor.get(name) or 0.0)
    return {dtype: rate for dtype, rate in rates.items() if rate}


def fit(rows: Sequence[Measured], device: Device, source: str) -> Costs:
    """Return the costs that make the sum of squared relative errors least."""
    whole = Costs(dict.fromkeys(("linear", "attention", "int8"), 1.0), 1.0, 0.0, overlaps=False, source="")
    columns = []
    for row in rows:
        parts = {"linear": 0.0, "int8": 0.0, "other": 0.0}
        for call, n in row.work.calls.items():
            alone = step_seconds(Work({call: n}), device, whole).total
            parts["linear" if call.kind == "attention" else call.kind] += alone
        columns.append([*parts.values(), row.work.n_calls * 1.0])
    seconds = np.array([row.seconds for row in rows])
    matrix = np.array(columns) / seconds[:, None]
    best = _least(matrix, np.ones(len(rows)))
    if best[-1] > MOST_PER_CALL:
        best = np.array([*_least(matrix[:, :-1], 1 - matrix[:, -1] * MOST_PER_CALL), MOST_PER_CALL])
    linear, int8, other = (float(f"{1 / x:.3g}") if x else float("inf") for x in best[:-1])
    efficiency = {"linear": linear, "attention": linear, "int8": int8}
    return Costs(efficiency, other, float(f"{best[-1]:.2g}"), overlaps=False, source=source)


def _least(matrix: Any, wanted: Any) -> Any:
    """Solve least squares with no negative coefficient, by trying every set of positive ones."""
    n = matrix.shape[1]
    solutions = []
    for chosen in (list(c) for size in range(1, n + 1) for c in combinations(range(n), size)):
        x = np.zeros(n)
        x[chosen] = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
        if (x >= 0).all():
            solutions.append((float(np.linalg.norm(matrix @ x - wanted)), x))
    return min(solutions, key=lambda solution: solution[0])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="rows of fastln bench or of scripts/plan_accuracy.py")
    parser.add_argument("--write", action="store_true", help="write predictions into the rows of plan_accuracy.py")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    content = json.loads(options.results.read_text())
    rows = content if isinstance(content, list) else content["rows"]
    here = this_cpu()
    device = Device(here.name, here.memory, here.bandwidth, {**here.rates, **best_rates(rows)}, here.source, kind="cpu")
    found = measured(rows)
    machine = (rows[0] if isinstance(content, list) else content)["provenance"]["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads"
    source = f"fitted to {len(found)} rows of {os.path.relpath(options.results)}: {where}"
    costs = fit(found, device, source)
    print(costs)
    print(f"rates: {device.rates}; bandwidth {device.bandwidth / 1e9:.1f} GB/s")
    errors = []
    for row in found:
        others = fit([other for other in found if other.model != row.model], device, source)
        predicted = [step_seconds(row.work, device, each).total for each in (costs, others, CPU_COSTS)]
        errors.append([seconds / row.seconds - 1 for seconds in predicted])
        words = ", ".join(f"{s:6.2f} ({e:+.0%})" for s, e in zip(predicted, errors[-1], strict=True))
        print(f"{row.label:62} {row.seconds:6.2f} s, predicted {words}")
    for name, column in zip(
        ("by this fit", "by the other models", "committed"), zip(*errors, strict=True), strict=True
    ):
        within = sum(abs(error) <= 0.25 for error in column)
        print(f"{name}: {within} of {len(column)} within 25%, the worst {max(column, key=abs):+.0%}")
    if options.write:
        if isinstance(content, list):
            parser.error("--write is for the rows of scripts/plan_accuracy.py")
        for row, one in zip(rows, found, strict=True):
            row["predicted_step_seconds"] = step_seconds(one.work, device).total
        options.results.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
