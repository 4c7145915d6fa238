"""What runs report, and the rows of results.json that are made of it."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from fastln.bench.suite import Suite
from fastln.models.shapes import is_shape, parse_shape


@dataclass(frozen=True, slots=True)
class Job:
    """One run in a process of its own.

    `kind` says what it does: "check" loads the data and the model, makes the batches of a round and counts the floor
    (once per model and dtype, before the rounds), "speed" measures steps (once per method and round), "quality" trains
    and counts right answers (once per method, at the end).
    """

    suite: Suite  # device and dtypes settled, never "auto"
    kind: Literal["check", "speed", "quality"]
    model: str
    dtype: str
    method: str = ""
    engine: str = ""
    round: int = 0  # from 1

    def __str__(self) -> str:
        what = {"check": "look at", "speed": f"round {self.round}/{self.suite.rounds}", "quality": "quality"}
        model = re.sub(r"[^:,]*/", "", self.model)  # folders by their last names
        dtype = self.dtype if len(self.suite.dtypes) > 1 else ""
        return " ".join(filter(None, (what[self.kind], model, dtype, self.pair)))

    @property
    def batch_size(self) -> int:
        """How many samples a step takes: as the suite has it, unless the model is a shape, which says so itself."""
        return parse_shape(self.model).batch_size if is_shape(self.model) else self.suite.batch_size

    @property
    def pair(self) -> str:
        """The method and engine as a suite writes them."""
        return f"{self.method}/{self.engine}" if self.method else ""


@dataclass(frozen=True, slots=True)
class Floor:
    """What a step of norm tuning cannot go below: see `fastln.cost`."""

    operations: float  # of its products
    operations_per_second: float  # that the machine reached in a product, in the run's dtype

    @property
    def seconds(self) -> float:
        """The products' time."""
        return self.operations / self.operations_per_second


@dataclass(frozen=True, slots=True)
class Checked:
    """What a "check" job found."""

    model_name: str
    random_weights: bool
    data_name: str
    synthetic: bool
    floor: Floor | None = None


@dataclass(frozen=True, slots=True)
class Steps:
    """What a "speed" job measured; times in seconds, memory in bytes."""

    step_seconds: tuple[float, ...]
    peak_memory_bytes: int
    memory_kind: str
    saved_activation_bytes: int | None  # None: not counted in this round
    trainable_parameters: int
    total_parameters: int  # of the model as loaded, whatever a method adds
    final_loss: float


@dataclass(frozen=True, slots=True)
class Quality:
    """What a "quality" job measured."""

    accuracy: dict[str, Any]  # a `fastln.metrics.Accuracy`
    head_epochs: int  # of the head alone, first
    epochs: int  # of all that the method trains, then


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that did not end well."""

    text: str
    user_error: bool = False  # a FastLNError: the message alone says what to put right


@dataclass(frozen=True, slots=True)
class Row:
    """One line of results.json: a method and engine on a model, over all rounds."""

    method: str
    engine: str
    model: str  # its name; the specification is in provenance.suite.models
    dtype: str
    device: str
    batch_size: int
    step_seconds: float | None  # the median of all timed steps
    step_seconds_all: tuple[float, ...]
    step_seconds_by_round: tuple[float, ...]  # medians: entry i of two rows was measured side by side
    samples_per_second: float | None
    peak_memory_bytes: int | None  # the largest of the rounds
    saved_activation_bytes: int | None
    trainable_parameters: int | None
    total_parameters: int | None
    final_loss: float | None  # of the last timed step; same batches for all; None also where it is not finite
    accuracy: dict[str, Any] | None
    accuracy_note: str | None  # why there is none, or how it came about
    error: str | None
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The row as results.json holds it."""
        return dataclasses.asdict(self)


def make_row(
    job: Job,
    model: str,
    rounds: Sequence[Steps],
    accuracy: dict[str, Any] | None,
    accuracy_note: str | None,
    error: str | None,
    provenance: dict[str, Any],
) -> Row:
    """Put together what the rounds of one method measured.

    Args:
        job: Of any round.
        model: What the model is called; `job.model` is how it was asked for.
        rounds: Those that ended well, from the first on.
        accuracy: From the quality run, where there was one.
        accuracy_note: See `Row`.
        error: What went wrong, and in which round.
        provenance: As every row of the suite has it.
    """
    seconds = tuple(second for steps in rounds for second in steps.step_seconds)
    middle = median(seconds) if seconds else None
    saved = [steps.saved_activation_bytes for steps in rounds if steps.saved_activation_bytes is not None]
    return Row(
        method=job.method,
        engine=job.engine,
        model=model,
        dtype=job.dtype,
        device=job.suite.device,
        batch_size=job.batch_size,
        step_seconds=middle,
        step_seconds_all=seconds,
        step_seconds_by_round=tuple(median(steps.step_seconds) for steps in rounds),
        samples_per_second=job.batch_size / middle if middle else None,
        peak_memory_bytes=max((steps.peak_memory_bytes for steps in rounds), default=None),
        saved_activation_bytes=saved[0] if saved else None,
        trainable_parameters=rounds[0].trainable_parameters if rounds else None,
        total_parameters=rounds[0].total_parameters if rounds else None,
        final_loss=rounds[0].final_loss if rounds and math.isfinite(rounds[0].final_loss) else None,
        accuracy=accuracy,
        accuracy_note=accuracy_note,
        error=error,
        provenance=provenance | {"memory": rounds[0].memory_kind if rounds else None},
    )


def by_model(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each model, and of each dtype where there are several, under the name of both."""
    several = len({row.dtype for row in rows}) > 1
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.model}, {row.dtype}" if several else row.model, []).append(row)
    return list(groups.items())


def each(values: Iterable[object]) -> str:
    """Every value once."""
    return ", ".join(dict.fromkeys(map(str, values)))


def data_name(rows: Sequence[Row]) -> str:
    """What the rows' data are called, marked where they are synthetic."""
    found = [row.provenance["data"] for row in rows if row.provenance["data"]]
    names = []
    for data in found or [{"name": rows[0].provenance["suite"]["data"], "synthetic": False}]:
        marked = "synthetic" in data["name"].lower() or not data["synthetic"]
        names.append(data["name"] if marked else f"{data['name']} (synthetic)")
    return each(names)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON; a reader sees the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps([row.to_dict() for row in rows], indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote."""
    return [Row(**{key: _tuple(value) for key, value in entry.items()}) for entry in json.loads(path.read_text())]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
