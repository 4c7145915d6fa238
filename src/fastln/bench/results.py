"""The results of runs, and the rows of results.json made from them."""

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

from fastln.bench.suite import Contender, Suite
from fastln.files import json_text
from fastln.models.shapes import is_shape, parse_shape


@dataclass(frozen=True, slots=True)
class Job:
    """One run in its own process.

    `kind` says what the run does:

    - "check" loads the data and the model, makes the batches of a round and counts the floor. It runs once per model
      and dtype, before the rounds.
    - "speed" measures steps. It runs once per method and round.
    - "quality" trains, then counts correct answers. It runs once per method, at the end.
    """

    suite: Suite  # with device and dtypes resolved, never "auto"
    kind: Literal["check", "speed", "quality"]
    model: str
    dtype: str
    method: str = ""
    engine: str = ""
    round: int = 0  # from 1
    products: str = "exact"  # this and the next four: as in `Contender`
    activations: str = "exact"
    memory_budget: str | None = None
    checkpointing: bool = False
    compiled: float | None = None

    def __str__(self) -> str:
        what = {"check": "look at", "speed": f"round {self.round}/{self.suite.rounds}", "quality": "quality"}
        model = re.sub(r"[^:,]*/", "", self.model)  # only the last part of folder names
        dtype = self.dtype if len(self.suite.dtypes) > 1 else ""
        return " ".join(filter(None, (what[self.kind], model, dtype, self.pair)))

    @property
    def batch_size(self) -> int:
        """The number of samples in a step: a shape's own batch size, or else the suite's."""
        return parse_shape(self.model).batch_size if is_shape(self.model) else self.suite.batch_size

    @property
    def pair(self) -> str:
        """The method and engine, as in a suite file, and what sets them apart."""
        return "/".join(filter(None, (self.method, self.engine, *contender_of(self).words)))


def contender_of(one: "Job | Row") -> Contender:
    """Return what a job or a row runs."""
    return Contender(*(getattr(one, name) for name in Contender._fields))


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time that a step of norm tuning can take: its matrix products alone. See `fastln.cost`."""

    operations: float  # in the step's matrix products
    operations_per_second: float  # measured on this machine for a matrix product in the run's dtype
    linear_operations: float = 0.0  # of these, in frozen linear layers, which 8 bits may compute
    int8_operations_per_second: float | None = None  # measured likewise in 8 bits; None if not asked for, or not there

    def seconds(self, products: str) -> float:
        """Return the time that the products take, in the form that a row's `products` says."""
        in_8_bits = self.linear_operations if products == "int8" and self.int8_operations_per_second else 0.0
        floats = (self.operations - in_8_bits) / self.operations_per_second
        return floats + in_8_bits / (self.int8_operations_per_second or 1.0)


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of a "check" job."""

    model_name: str
    random_weights: bool
    data_name: str
    synthetic: bool
    floor: Floor | None = None


@dataclass(frozen=True, slots=True)
class Steps:
    """The result of a "speed" job, with times in seconds and memory in bytes."""

    step_seconds: tuple[float, ...]
    peak_memory_bytes: int
    memory_kind: str
    saved_activation_bytes: int | None  # None if not counted in this round
    trainable_parameters: int
    total_parameters: int  # of the model as loaded, without what a method adds
    final_loss: float
    learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)  # of the groups that train
    predicted_peak_bytes: int | None = None  # None if not predicted in this round, or there is no prediction
    storage_note: str | None = None  # what a memory budget chose


@dataclass(frozen=True, slots=True)
class Quality:
    """The result of a "quality" job."""

    accuracy: dict[str, Any]  # a `fastln.metrics.Accuracy`
    head_epochs: int  # first these epochs train the head alone
    epochs: int  # then these train everything that the method trains


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed run."""

    text: str
    user_error: bool = False  # a FastLNError, whose message says how to fix it


@dataclass(frozen=True, slots=True)
class Row:
    """One row of results.json: one method and engine on one model, over all rounds."""

    method: str
    engine: str
    model: str  # the name; the spec is in provenance.suite.models
    dtype: str
    device: str
    batch_size: int
    step_seconds: float | None  # the median of all timed steps
    step_seconds_all: tuple[float, ...]
    step_seconds_by_round: tuple[float, ...]  # each round's median; rows measured entry i in the same round
    samples_per_second: float | None
    peak_memory_bytes: int | None  # the largest over the rounds
    saved_activation_bytes: int | None
    trainable_parameters: int | None
    total_parameters: int | None
    final_loss: float | None  # of the last timed step, on the same batches for all methods; None if it is not finite
    accuracy: dict[str, Any] | None
    accuracy_note: str | None  # why accuracy is missing, or how it was measured
    error: str | None
    provenance: dict[str, Any]
    learning_rates: dict[str, float] | None = None  # of the groups that train; None in files of earlier versions
    activations: str = "exact"  # what fastln's operations kept for backward
    products: str = "exact"  # the form in which their matrix products ran
    memory_budget: str | None = None  # what fastln fitted the storage of each block to; this and the next two: as in
    checkpointing: bool = False  # `Contender`
    compiled: float | None = None
    predicted_peak_bytes: int | None = None  # what `fastln.peak` says of a step; libraries do not count
    storage_note: str | None = None  # what the budget chose

    @property
    def label(self) -> str:
        """The method, with the engine in brackets, and what sets it apart."""
        return f"{self.method} ({', '.join((self.engine, *contender_of(self).words))})"

    def to_dict(self) -> dict[str, Any]:
        """Return the row as results.json stores it."""
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
    """Combine the rounds of one method into a row.

    Args:
        job: The job of any round.
        model: The model's name. `job.model` is its spec.
        rounds: The rounds that succeeded, in order.
        accuracy: The result of the quality run, if there was one.
        accuracy_note: See `Row`.
        error: What went wrong, and in which round.
        provenance: The provenance that all rows of the suite share.
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
        learning_rates=rounds[0].learning_rates if rounds else None,
        predicted_peak_bytes=next(filter(None, (steps.predicted_peak_bytes for steps in rounds)), None),
        storage_note=next(filter(None, (steps.storage_note for steps in rounds)), None),
        **{name: getattr(job, name) for name in Contender._fields[2:]},
    )


def by_model(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Group rows by model, and by dtype if there are several. Return (title, rows) pairs."""
    several = len({row.dtype for row in rows}) > 1
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.model}, {row.dtype}" if several else row.model, []).append(row)
    return list(groups.items())


def each(values: Iterable[object]) -> str:
    """Join the distinct values with commas."""
    return ", ".join(dict.fromkeys(map(str, values)))


def data_name(rows: Sequence[Row]) -> str:
    """Return the name of the rows' data, marked if it is synthetic."""
    found = [row.provenance["data"] for row in rows if row.provenance["data"]]
    names = []
    for data in found or [{"name": rows[0].provenance["suite"]["data"], "synthetic": False}]:
        marked = "synthetic" in data["name"].lower() or not data["synthetic"]
        names.append(data["name"] if marked else f"{data['name']} (synthetic)")
    return each(names)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON, atomically: a reader sees the old file or the new one, never part of one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json_text([row.to_dict() for row in rows], indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_rows(path: Path) -> list[Row]:
    """Read rows written by `write_rows`."""
    return [
        Row(**{key: _tuple(value) for key, value in entry.items()})
        for entry in json.loads(path.read_text(encoding="utf-8"))
    ]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
