"""What every test needs: Triton's interpreter, one thread a worker, the folder of real data."""

import os

# Before anything imports Triton, which looks at it when kernels are defined.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Warnings of the C++ compiler are errors for all tests, so that kernels are compiled once and not again to see them.
os.environ.setdefault("FASTLN_CPU_WARNINGS", "1")

import hashlib
from pathlib import Path

import pytest
import torch

from fastln.late.graph import Rows

pytest_plugins = ["sampling"]

# What torch.compile keeps on disk is known by the names of our operators, not by the shapes that these return.
_OPERATORS = sorted((Path(__file__).parents[1] / "src" / "fastln" / "ops").glob("*.py"))
torch.compiler.config.cache_key_tag = hashlib.sha256(b"".join(map(Path.read_bytes, _OPERATORS))).hexdigest()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fastln_data() -> Path:
    """The folder of real data and models that FASTLN_DATA names; without one the test is skipped."""
    if "FASTLN_DATA" not in os.environ:
        pytest.skip("FASTLN_DATA is not set: no folder of real data")
    return Path(os.environ["FASTLN_DATA"]).resolve()


@pytest.fixture
def computed_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each function of rows that waited was computed for, in order."""
    counts: list[int] = []
    make = Rows.__init__

    def counting(rows: Rows, function, *args) -> None:
        make(rows, lambda *parts: counts.append(len(parts[0])) or function(*parts), *args)

    monkeypatch.setattr(Rows, "__init__", counting)
    return counts
