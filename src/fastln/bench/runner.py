"""Run a suite in interleaved rounds: one process per run, results written to disk after every run."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from fastln.bench import isolate, report
from fastln.bench.progress import Progress
from fastln.bench.provenance import settle
from fastln.bench.results import Checked, Failure, Job, Quality, Row, Steps, make_row, write_rows
from fastln.bench.suite import Suite
from fastln.bench.worker import work
from fastln.errors import FastLNError
from fastln.files import user_path

Worker = Callable[[Job], Checked | Steps | Quality]
Expected = TypeVar("Expected", Checked, Steps, Quality)

RESULTS = "results.json"


def run_suite(
    suite: Suite, out: Path, *, overwrite: bool = False, argv: Sequence[str] = (), worker: Worker = work
) -> list[Row]:
    """Run every method of a suite on every model and write the results.

    All methods run once per round (A B C, A B C, ...), each in a fresh process. So if the machine slows down or speeds
    up, all methods are affected alike. Then, if the suite has epochs, each method trains once and its correct answers
    are counted. A failed run becomes a row with its error and is not repeated. `results.json` is written after every
    run; until the last one, `missing` in its provenance lists the runs to come. `results.md` and `results.png` are
    written at the end, even if the user interrupts, and then they say what is missing.

    Args:
        suite: From `fastln.bench.suite.load_suite`.
        out: The output folder. It is created if needed.
        overwrite: Replace the files of an earlier run in `out`, after the data and models have loaded without errors.
            Other files in the folder stay.
        argv: The command line, to record it.
        worker: The function that each process calls with its job. It must be importable by name.

    Returns:
        One row per model and method, in the suite's order. `step_seconds` is None where nothing was measured.

    Raises:
        FastLNError: If `out` already holds a run or is not a folder, if the data or a model cannot be loaded, or if
            there is too little data for a batch. Nothing is written in these cases.
        KeyboardInterrupt: If the user interrupts, after the results so far have been written.
    """
    out = user_path(out)
    _refuse(out, overwrite)
    started = _now()
    looks = len(suite.models) * len(suite.dtypes)
    runs = len(suite.models) * sum(len(suite.contenders(dtype)) for dtype in suite.dtypes) * suite.rounds
    with Progress(total=looks + runs) as progress:
        settled = isolate.call(settle, suite.device, *suite.dtypes, timeout_seconds=suite.timeout_seconds)
        if isinstance(settled, Failure):
            raise FastLNError(settled.text) if settled.user_error else RuntimeError(settled.text)
        device, dtypes, origin = settled
        suite = dataclasses.replace(suite, device=device, dtypes=dtypes)
        origin |= {
            "seed": suite.seed,
            "argv": [Path(argv[0]).name, *argv[1:]] if argv else [],
            "suite": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(suite).items()
            },
            "started": started,
        }
        table = _Table(suite, origin, out / RESULTS)
        _check(suite, worker, table, progress)
        _make_room(out)
        try:
            _run(suite, worker, table, progress)
        finally:
            rows = table.write()
            if rows:
                report.write(rows, out)
    return rows


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _refuse(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FastLNError(f"{out}: is a file; --out must be a folder")
    present = [path for path in _files(out) if path.exists()]
    if present and not overwrite:
        raise FastLNError(f"{out}: already holds a run ({present[0].name}); give another folder, or overwrite it")


def _make_room(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in _files(out):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise FastLNError(f"{out}: cannot create the folder or remove old results: {error.strerror}") from error


def _files(out: Path) -> list[Path]:
    return [out / name for name in (RESULTS, *report.FILES)]


@dataclass
class _Entry:
    """The results so far of one method on one model."""

    job: Job
    rounds: list[Steps] = field(default_factory=list)
    quality: Quality | None = None
    error: str | None = None

    @property
    def begun(self) -> bool:
        return bool(self.rounds or self.error)


class _Table:
    """The rows so far, in the suite's order."""

    def __init__(self, suite: Suite, origin: dict[str, Any], path: Path):
        self.entries = [
            _Entry(Job(suite, "speed", model, dtype, **contender._asdict()))
            for model, dtype in itertools.product(suite.models, suite.dtypes)
            for contender in suite.contenders(dtype)
        ]
        self._checked: dict[tuple[str, str], Checked] = {}
        self._origin = origin
        self._path = path

    def check(self, job: Job, checked: Checked) -> None:
        """Store the result of a "check" job."""
        self._checked[job.model, job.dtype] = checked

    def checked(self, job: Job) -> Checked | None:
        """Return the "check" result for the job's model; None if the check failed."""
        return self._checked.get((job.model, job.dtype))

    def missing(self) -> list[str]:
        """Return the runs that are still to come: the rounds of each row, and its quality run."""
        to_come = []
        for entry in self.entries:
            if entry.error is not None:
                continue
            suite, pair = entry.job.suite, f"{entry.job.pair} on {self._name(entry.job)}"
            if left := suite.rounds - len(entry.rounds):
                to_come.append(f"{pair}: {left} of {suite.rounds} rounds")
            if entry.quality is None and _worth_training(entry, self):
                to_come.append(f"{pair}: answers")
        return to_come

    def write(self) -> list[Row]:
        self._origin["missing"] = self.missing()
        rows = [self._row(entry) for entry in self.entries if entry.begun]
        if rows:  # write no file if no run has finished
            write_rows(rows, self._path)
        return rows

    def _name(self, job: Job) -> str:
        checked = self.checked(job)
        if checked is None:
            return job.model
        specs = {spec for (spec, _), other in self._checked.items() if other.model_name == checked.model_name}
        return checked.model_name if len(specs) == 1 else job.model  # two specs can have the same model name

    def _row(self, entry: _Entry) -> Row:
        checked = self.checked(entry.job)
        provenance = self._origin | {
            "data": {"name": checked.data_name, "synthetic": checked.synthetic} if checked else None,
            "floor": dataclasses.asdict(checked.floor) if checked and checked.floor else None,
            "finished": _now(),
        }
        accuracy = entry.quality.accuracy if entry.quality else None
        note = _accuracy_note(entry, checked)
        return make_row(entry.job, self._name(entry.job), entry.rounds, accuracy, note, entry.error, provenance)


def accuracy_means_nothing(job: Job, checked: Checked | None) -> str | None:
    """Return why accuracy would mean nothing for a row; None if it is worth measuring."""
    if checked and checked.random_weights:
        return "random weights: accuracy means nothing"
    if checked and checked.synthetic:
        return "synthetic data: accuracy means nothing"
    if job.suite.epochs == 0:
        return "not counted (--epochs N trains each method first)"
    if job.checkpointing or job.compiled is not None:
        how = "checkpointing" if job.checkpointing else "compilation"
        return f"not counted: stock code gives the same answers without {how}"
    return None


def _worth_training(entry: _Entry, table: _Table) -> bool:
    return entry.error is None and accuracy_means_nothing(entry.job, table.checked(entry.job)) is None


def _accuracy_note(entry: _Entry, checked: Checked | None) -> str | None:
    if reason := accuracy_means_nothing(entry.job, checked):
        return reason
    if entry.quality:
        return f"test split, after {_training(entry.quality)}"
    return "failed" if entry.error else "not measured yet"


def _training(quality: Quality) -> str:
    head, whole = (f"{epochs} epoch{'' if epochs == 1 else 's'}" for epochs in (quality.head_epochs, quality.epochs))
    if not quality.head_epochs:
        return whole
    return f"{head} of the head alone" + (f" and {whole} of all that trains" if quality.epochs else "")


def _check(suite: Suite, worker: Worker, table: _Table, progress: Progress) -> None:
    for model, dtype in itertools.product(suite.models, suite.dtypes):
        job = Job(suite, "check", model, dtype)
        checked = _call(worker, job, Checked, progress)
        if isinstance(checked, Checked):
            table.check(job, checked)
        elif checked.user_error:
            raise FastLNError(checked.text)  # every run of this model would fail in the same way


def _run(suite: Suite, worker: Worker, table: _Table, progress: Progress) -> None:
    for number in range(1, suite.rounds + 1):
        for entry in table.entries:
            if entry.error is None:
                steps = _call(worker, dataclasses.replace(entry.job, round=number), Steps, progress)
                if isinstance(steps, Steps):
                    entry.rounds.append(steps)
                else:
                    entry.error = f"round {number}: {steps.text}"
                    progress.drop(suite.rounds - number)
                table.write()
    worthy = [entry for entry in table.entries if _worth_training(entry, table)]
    progress.add(len(worthy))
    for entry in worthy:
        quality = _call(worker, dataclasses.replace(entry.job, kind="quality"), Quality, progress)
        if isinstance(quality, Quality):
            entry.quality = quality
        else:
            entry.error = f"quality: {quality.text}"
        table.write()


def _call(worker: Worker, job: Job, expected: type[Expected], progress: Progress) -> Expected | Failure:
    progress.begin(str(job))
    outcome = isolate.call(worker, job, timeout_seconds=job.suite.timeout_seconds)
    progress.end(_brief(outcome))
    if isinstance(outcome, expected | Failure):
        return outcome
    raise TypeError(f"{job}: the worker returned {type(outcome).__name__}, not {expected.__name__}")


def _brief(outcome: Checked | Steps | Quality | Failure) -> str:
    match outcome:
        case Checked():
            return f"{outcome.model_name} on {outcome.data_name}"
        case Steps():
            return f"{median(outcome.step_seconds):.3f} s a step"
        case Quality():
            return f"{outcome.accuracy['all']:.1f}% right"
        case Failure():
            return "FAILED: " + outcome.text.splitlines()[0]
