"""The rows of both reports and their JSON: one shape for what is compiled, predicted and measured."""

from __future__ import annotations

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

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "benchmarks" / "results"
LIBRARIES = ("fastln", "liger", "flash-attn", "torch eager", "torch.compile", "copy")


@dataclass
class Row:
    """One library's figures for one case on one machine.

    Attributes:
        machine: What the code was compiled for, or the name of the GPU that it ran on.
        dtype: Of the rows, a name from `norm_cases.DTYPES`.
        parameters: Of weight and bias, likewise.
        width: Columns of a tensor.
        n_rows: Rows of a tensor.
        case: A name from `norm_cases.CASES`.
        library: Whose kernels.
        source: Digest of the code that the figures were had from, `source_digest`.
        useful_bytes: What must move, whoever does the work.
        note: What is done otherwise than asked, or "".
        error: Why figures are missing, or None.
        compiled: What was read off the machine code, for each kernel; None where nothing was compiled.
        predicted: What follows from that by arithmetic; None where nothing was compiled.
        measured: What a run on the machine gave; None where nothing ran.
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
        """Rows that are compiled together."""
        return self.machine, self.dtype, self.width


def source_digest() -> str:
    """A digest of the kernels and of the scripts that are in use; other code may give other figures."""
    modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    scripts = {Path(name) for name in modules if name and Path(name).parent == HERE}
    digest = hashlib.sha256()
    for path in sorted([*scripts, *Path(fastln_kernels.__file__).parent.glob("*.py")], key=lambda path: path.name):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def save(path: Path, provenance: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write a report, a row a line without what is as by default; whoever interrupts it finds the file as it was."""
    lines = ",\n".join(map(_line, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(f'{{"provenance": {json.dumps(provenance, ensure_ascii=False)}, "rows": [\n{lines}\n]}}\n')
    os.replace(beside, path)


def load(path: Path) -> list[Row]:
    """Read a report's rows; none where there is no file, or one of another shape."""
    if not path.is_file():
        return []
    rows = json.loads(path.read_text())["rows"]
    return [Row(**row) for row in rows if _REQUIRED <= row.keys() <= _NAMES]


_NAMES = {field.name for field in dataclasses.fields(Row)}
_REQUIRED = {field.name for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING}


def _line(row: Row) -> str:
    written = {name: value for name, value in dataclasses.asdict(row).items() if name in _REQUIRED or value}
    return json.dumps(written, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def notes(*parts: str) -> str:
    """What there is to say, on one line."""
    return "; ".join(part for part in parts if part)
