"""The rows of both reports and their JSON format, for compiled, predicted and measured figures."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastln_kernels
from fastln import devices

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
LIBRARIES = ("fastln", "liger", "flash-attn", "torch eager", "torch.compile", "copy")


@dataclass
class Row:
    """One library's figures for one case on one machine.

    Attributes:
        machine: The machine that the code was compiled for, or the name of the GPU that it ran on.
        dtype: The dtype of the rows, a name from `norm_cases.DTYPES`.
        parameters: The dtype of weight and bias, likewise.
        width: Columns of a tensor.
        n_rows: Rows of a tensor.
        case: A name from `norm_cases.CASES`.
        library: The library whose kernels these are.
        source: Digest of the code that gave the figures, from `source_digest`.
        useful_bytes: The bytes that any implementation must move.
        note: How the library does the case differently than requested, or "".
        error: Why figures are missing, or None.
        compiled: Figures from the machine code, for each kernel; None if nothing was compiled.
        predicted: Figures computed from those; None if nothing was compiled.
        measured: Figures of a run on the machine; None if nothing ran.
    """

    machine: str
    dtype: str
    parameters: str
    width: int
    n_rows: int
    case: str
    library: str
    source: str
    useful_bytes: int
    note: str = ""
    error: str | None = None
    compiled: list[dict[str, Any]] | None = None
    predicted: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None

    @property
    def group(self) -> tuple[str, str, int]:
        """The machine, dtype and width. Rows with the same group are compiled together."""
        return self.machine, self.dtype, self.width


def source_digest() -> str:
    """Return a digest of the kernels, the imported scripts and the data sheets: others may give different figures."""
    modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    scripts = {Path(name) for name in modules if name and Path(name).parent == HERE} | {Path(devices.__file__)}
    digest = hashlib.sha256()
    for path in sorted([*scripts, *Path(fastln_kernels.__file__).parent.glob("*.py")], key=lambda path: path.name):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def save(path: Path, provenance: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write a report atomically, with one row per line, without defaults and zeros."""
    lines = ",\n".join(map(_line, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(f'{{"provenance": {json.dumps(provenance, ensure_ascii=False)}, "rows": [\n{lines}\n]}}\n')
    os.replace(beside, path)


def load(path: Path) -> list[Row]:
    """Read a report's rows. Return none if there is no file, and skip rows of another format."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())["rows"]
    rows = [Row(**row) for row in found if _REQUIRED <= row.keys() <= _NAMES]
    for row in rows:
        row.compiled = row.compiled and [collections.defaultdict(int, kernel) for kernel in row.compiled]
    return rows


_NAMES = {field.name for field in dataclasses.fields(Row)}
_REQUIRED = {field.name for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING}


def _line(row: Row) -> str:
    written = {name: value for name, value in vars(row).items() if name in _REQUIRED or value}
    if row.compiled:
        written["compiled"] = [{name: figure for name, figure in kernel.items() if figure} for kernel in row.compiled]
    return json.dumps(written, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def notes(*parts: str) -> str:
    """Join the non-empty parts on one line."""
    return "; ".join(part for part in parts if part)
