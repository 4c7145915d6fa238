"""fastln train: trains a model by its options and writes it to a folder."""

from __future__ import annotations

import logging
import shlex
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from fastln.data import DataOptions, Source, VQADataset, digest, load_source
from fastln.engines import check_finishes
from fastln.errors import FastLNError
from fastln.files import expanded, user_path, written_whole
from fastln.machine import settle_device
from fastln.methods import get_method
from fastln.metrics import Accuracy, ReportScores, check_scorable
from fastln.models import VQATask, load_task
from fastln.models.sources import MODEL, RECORD, expanded_sources
from fastln.processes import is_first_process
from fastln.rates import settle_dtype
from fastln.settings import EXACT
from fastln.training.checkpoints import checkpoints_in
from fastln.training.config import TrainConfig, TrainFiles, TrainResult
from fastln.training.evaluate import evaluate, print_scores
from fastln.training.features import check_frozen
from fastln.training.preview import preview
from fastln.training.record import check_same_data, check_same_options, is_finished, write_json
from fastln.training.tasks import groups_that_train
from fastln.training.tensor_store import TensorStore
from fastln.training.train import check_settings, tell_unused, train_task

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
ADAPTER_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class TrainRun:
    """The options of one `fastln train`.

    Attributes:
        data: "phantom", or a dataset's folder or file.
        model: as `fastln.models.load_task` takes it.
        engine: the engine that runs the method; None for the method's first.
        config: how to train.
        validation: fraction of the training images whose questions are held out and scored like the test questions.
        dtype: "float32", "bfloat16" or "auto".
        device: "cpu", "cuda" or "auto".
        options: how the data is read.
        adapter_dtype: dtype of the norms in the adapter, "float32" or "float16".
        image_size: as `fastln.models.load_task` takes it.
    """

    data: str
    model: str
    engine: str | None
    config: TrainConfig
    validation: float = 0.0
    dtype: str = "auto"
    device: str = "auto"
    options: DataOptions = field(default_factory=DataOptions)
    adapter_dtype: str = "float32"
    image_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", expanded(self.data))
        object.__setattr__(self, "model", expanded_sources(self.model))
        if self.adapter_dtype not in ADAPTER_DTYPES:
            raise FastLNError(
                f"unknown dtype {self.adapter_dtype!r} of an adapter (valid: {', '.join(ADAPTER_DTYPES)})"
            )
        engine = self.config.settings(self.engine).engine
        if self.adapter_dtype != "float32" and engine == "peft":
            raise FastLNError(
                f"adapter_dtype {self.adapter_dtype!r} is for norms that fastln trains; peft writes the adapter of "
                f"method {self.config.method!r} in its own dtype, so leave it out"
            )


@dataclass(frozen=True)
class Outcome:
    """The result of a run: the scores on `test` and `validation` (None if the data has none), and the training."""

    test: Accuracy | ReportScores | None
    validation: Accuracy | ReportScores | None
    training: TrainResult


def run_training(
    run: TrainRun,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    features: TensorStore | None = None,
    dry_run: bool = False,
) -> Outcome | None:
    """Train, save to `out/model` and `out/adapter`, score, and write a record to `out/run.json`.

    If no adapter can hold what the method trains, none is written, and the log says why. With several processes
    (torchrun), all train, and only the first reads and writes `out` and scores.

    Args:
        run: the options.
        out: a new or empty folder, or the folder of the run to resume.
        resume: continue from the last checkpoint in `out`.
        overwrite: delete an earlier run in `out` first.
        features: keeps the frozen vision tower's output for each image; None for no caching.
        dry_run: print what would train, the memory it takes and the first batch; write nothing and return None.

    Returns:
        The result; None if there was nothing to do.

    Raises:
        FastLNError: if an option in `run` is invalid or cannot be met, `out` already holds a run, or the run to resume
            had other options or read other questions or images.
    """
    out = user_path(out)
    method, engine = get_method(run.config.method, run.engine)
    check_finishes(run.config.method)
    device = settle_device(run.device)
    dtype = settle_dtype(run.dtype, device)
    is_first = is_first_process()
    if dry_run and (resume or overwrite):
        logger.warning("a dry run reads and writes nothing in %s, so resume and overwrite have no effect", out)
    if is_first and not dry_run:
        _check_folder(run, out, resume=resume, overwrite=overwrite)
    source = load_source(run.data, run.options)
    digests = {split: digest(samples, source.stats) for split, samples in source.splits.items()}
    if is_first and resume and not dry_run:
        check_same_data(run.data, digests, out / RECORD)
    if resume and not dry_run and is_finished(out / RECORD):
        logger.info("%s: this run is finished; there is nothing left to resume", out)
        return None
    # Find errors before the training, not after it.
    data, scored = _datasets(run, source)
    task = load_task(run.model, data, dtype=dtype, seed=run.config.seed, device=device, image_size=run.image_size)
    for dataset in scored.values():
        task.check_data(dataset)
    check_settings(task, run.config)
    _check_base_stays(run, task.origin.model or "", out)
    logger.info("%s by %s on %s (%s), %d questions of %s", method.name, engine, task.name, dtype, len(data), data.name)
    if features is not None:
        check_frozen(task, run.config.method, run.config.scope)
    if dry_run:
        print(preview(task, data, run.config, engine))
        tell_unused(task, data, run.config, ADAPTER_DTYPES[run.adapter_dtype])
        return None
    rates = run.config.rates.of(groups_that_train(task, run.config.method, run.config.scope))
    record = {
        "run": asdict(run),
        "engine": engine,
        "dtype": str(dtype),
        "learning_rates": rates,
        "digests": digests,
    }
    if is_first:
        if not resume:
            _clear(out)
        write_json(out / RECORD, record | {"finished": False})
    files = TrainFiles(out / CHECKPOINTS, resume, out / ADAPTER, ADAPTER_DTYPES[run.adapter_dtype])
    try:
        result = train_task(task, data, run.config, files, engine=engine, features=features)
    except KeyboardInterrupt:
        if checkpoints_in(out / CHECKPOINTS):
            logger.info("the same command with --resume continues from the last whole epoch")
        raise
    if not is_first:
        return Outcome(None, None, result)
    logger.info("trained in %.0f s", result.seconds)
    _save(task, out / MODEL)
    adapter_bytes = _size(out / ADAPTER)
    if adapter_bytes is not None:
        logger.info("the adapter is in %s: %s bytes", out / ADAPTER, f"{adapter_bytes:,}")
    n_together = run.config.batch_size  # there was room for that in training
    scores = {
        split: evaluate(task, dataset, batch_size=n_together, progress=True, features=features)
        for split, dataset in scored.items()
    }
    outcome = Outcome(scores.get("test"), scores.get("validation"), result)
    write_json(out / RECORD, record | {"finished": True, "adapter_bytes": adapter_bytes, **asdict(outcome)})
    for split, value in scores.items():
        print_scores(task, scored[split], value, head_is_trained=True)
    logger.info("the model is in %s", out / MODEL)
    for split in scores:
        logger.info("score its answers to the %s questions again with: %s", split, _command(run, out, split, features))
    return outcome


def _command(run: TrainRun, out: Path, split: str, features: TensorStore | None) -> str:
    """Return the command that scores a split as the run did."""
    words = ["fastln", "eval", str(out), "--data", run.data, "--split", split]
    if run.validation and split == "validation":
        words += ["--validation", str(run.validation)]
    words += ["--batch-size", str(run.config.batch_size)]  # it decides the padding, and so the rounding
    options = {
        "--layout": run.options.layout,
        "--language": run.options.language,
        "--device": None if run.device == "auto" else run.device,
        "--feature-cache": None if features is None else features.directory,
    }
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    words += ["--keep-repeats"] if run.options.keep_repeats else []  # a held-out split comes from the training rows
    if limit := run.options.skip_bad_rows:
        words += ["--skip-bad-rows"] if limit is True else ["--skip-bad-rows", str(limit)]
    return shlex.join(words)


def _datasets(run: TrainRun, source: Source) -> tuple[VQADataset, dict[str, VQADataset]]:
    """Return the training questions, and those to score after the training, by split."""
    data = source.dataset("train", validation_fraction=run.validation)
    scored = {split: source.dataset(split) for split in ("validation", "test") if split in source.splits}
    if run.validation:
        scored = {"validation": source.dataset("validation", validation_fraction=run.validation)} | scored
    for dataset in scored.values():
        check_scorable(dataset.samples)
    if not scored:
        logger.info("%s has neither a test nor a validation split: nothing will be scored", data.name)
    return data, scored


def _check_folder(run: TrainRun, out: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise FastLNError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise FastLNError(f"{out}: is a file; give a folder")
    if resume:
        if not checkpoints_in(out / CHECKPOINTS) and not is_finished(out / RECORD):
            raise FastLNError(f"{out}: there is no checkpoint to resume from")
        check_same_options(asdict(run), out / RECORD)
    if not resume and not overwrite and out.is_dir() and any(out.iterdir()) and not _came_to_nothing(out):
        raise FastLNError(f"{out}: already holds a run; give another folder, or --resume or --overwrite")


def _came_to_nothing(out: Path) -> bool:
    """Whether the run in `out` ended before it wrote anything, so that starting again loses nothing."""
    wrote = checkpoints_in(out / CHECKPOINTS) or (out / MODEL).exists() or (out / ADAPTER).exists()
    return is_finished(out / RECORD) is False and not wrote


def _check_base_stays(run: TrainRun, base: str, out: Path) -> None:
    """Refuse to overwrite a base that has to be loaded again at the end."""
    if run.config.products == EXACT or run.config.keep_weights:
        return
    for source in base.rpartition(":")[2].split(","):
        if Path(source).is_absolute() and Path(source).resolve().is_relative_to(out.resolve()):
            raise FastLNError(
                f"{out}: the run would overwrite its own base {source}, which products {run.config.products!r} loads "
                "again at the end: give another folder, or --keep-weights"
            )


def _clear(out: Path) -> None:
    """Make the folder, and delete what an earlier run wrote to it; other files stay."""
    try:
        for name in (MODEL, ADAPTER, CHECKPOINTS):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / RECORD).unlink(missing_ok=True)
        (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastLNError(f"{out}: cannot be written to: {error}") from error


def _save(task: VQATask, folder: Path) -> None:
    try:
        with written_whole(folder) as beside:
            task.save(beside)
    except (OSError, SafetensorError) as error:
        raise FastLNError(
            f"{folder}: the model cannot be written: {error}; the same command with --resume writes it"
        ) from error


def _size(folder: Path) -> int | None:
    """Return the size of a folder's files in bytes; None if there is no such folder."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else None
