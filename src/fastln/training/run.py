"""fastln train and fastln eval: from options to a folder with a model in it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastln.data import DataOptions, VQADataset, digest, load_source
from fastln.data.answers import normalise_answer
from fastln.data.dataset import check_split
from fastln.engines import check_finishes
from fastln.errors import FastLNError
from fastln.files import written_whole
from fastln.machine import settle_device, settle_dtype
from fastln.methods import get_method
from fastln.metrics import Accuracy, ReportScores, check_scorable, score
from fastln.models import VQATask, load_task
from fastln.models.sources import MODEL, RECORD
from fastln.processes import is_first_process
from fastln.training.checkpoints import checkpoints_in
from fastln.training.evaluate import evaluate, predict
from fastln.training.features import check_cacheable, check_frozen
from fastln.training.preview import preview
from fastln.training.tasks import load_task_adapter
from fastln.training.tensor_store import TensorStore
from fastln.training.trainer import TrainConfig, TrainResult, train_task

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
ADAPTER_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class TrainRun:
    """One training run: what `fastln train` was asked for.

    Attributes:
        data: "phantom", or a dataset's folder or file.
        model: as `fastln.models.load_task` takes it.
        engine: who runs the method; the method's first where None.
        config: how to train.
        validation: share of the training images whose questions are held out and scored beside the test questions.
        dtype: "float32", "bfloat16" or "auto".
        device: "cpu", "cuda" or "auto".
        options: how the data is read.
        adapter_dtype: of the norms in the adapter, "float32" or "float16".
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
        if self.adapter_dtype not in ADAPTER_DTYPES:
            raise FastLNError(
                f"unknown dtype {self.adapter_dtype!r} of an adapter (valid: {', '.join(ADAPTER_DTYPES)})"
            )


@dataclass(frozen=True)
class Outcome:
    """What came of a run: the scores on `test` and `validation` (None where the data has none), and the training."""

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
    """Train, save to `out/model` and `out/adapter`, score, and write what happened to `out/run.json`.

    There is no adapter of a method of which none can hold what it trains; the log says so. Of several processes
    (torchrun) all train, and the first alone looks into `out`, writes and scores.

    Args:
        run: what to do.
        out: a new or empty folder, or the one of the run to resume.
        resume: continue from the last checkpoint in `out`.
        overwrite: delete an earlier run in `out` first.
        features: keeps what a frozen vision tower gives for each image; None for no caching.
        dry_run: print what would train, the memory it takes and the first batch; write nothing and return None.

    Returns:
        What came of it; None where nothing was to be done.

    Raises:
        FastLNError: for anything in `run` that cannot be had as given, an `out` that already holds a run, or one to
            resume that had other options or read other questions or images.
    """
    method, engine = get_method(run.config.method, run.engine)
    check_finishes(run.config.method)
    device = settle_device(run.device)
    dtype = settle_dtype(run.dtype, device)
    is_first = is_first_process()
    if is_first and not dry_run:
        _check_folder(run, out, resume=resume, overwrite=overwrite)
    source = load_source(run.data, run.options)
    digests = {split: digest(samples, source.stats) for split, samples in source.splits.items()}
    if is_first and resume:
        _check_same_data(run, digests, out / RECORD)
    if resume and _is_finished(out):
        logger.info("%s: this run is finished, and nothing is left to resume", out)
        return None
    data = source.dataset("train", validation_fraction=run.validation)
    # What cannot be had is better found before the training than after.
    scored = {split: source.dataset(split) for split in ("validation", "test") if split in source.splits}
    if run.validation:
        scored = {"validation": source.dataset("validation", validation_fraction=run.validation)} | scored
    for dataset in scored.values():
        check_scorable(dataset.samples)
    if not scored:
        logger.info("%s has neither a test nor a validation split: nothing will be scored", data.name)
    task = load_task(run.model, data, dtype=dtype, seed=run.config.seed, device=device, image_size=run.image_size)
    for dataset in scored.values():
        task.check_data(dataset)
    logger.info("%s by %s on %s (%s), %d questions of %s", method.name, engine, task.name, dtype, len(data), data.name)
    if features is not None:
        check_frozen(task, run.config.method, run.config.scope)
    if dry_run:
        print(preview(task, data, run.config, engine))
        return None
    if is_first and not resume:
        _clear(out)
    record = {"run": asdict(run), "engine": engine, "dtype": str(dtype), "digests": digests}
    if is_first:
        _write(out / RECORD, record | {"finished": False})
    try:
        result = train_task(
            task,
            data,
            run.config,
            engine=engine,
            checkpoints=out / CHECKPOINTS,
            resume=resume,
            features=features,
            adapter=out / ADAPTER,
            adapter_dtype=ADAPTER_DTYPES[run.adapter_dtype],
        )
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
    _write(out / RECORD, record | {"finished": True, "adapter_bytes": adapter_bytes, **asdict(outcome)})
    for split, value in scores.items():
        _report(task, data, split, value, trained=True)
    logger.info("the model is in %s; score it again with: fastln eval %s --data %s", out / MODEL, out / MODEL, run.data)
    return outcome


def run_evaluation(
    model: str,
    data: str,
    split: str,
    *,
    batch_size: int = 64,
    dtype: str = "auto",
    device: str = "auto",
    predictions: Path | None = None,
    metrics: Path | None = None,
    options: DataOptions | None = None,
    features: TensorStore | None = None,
    adapter: Path | None = None,
    image_size: int | None = None,
) -> Accuracy | ReportScores:
    """Score a saved model and print the result.

    Args:
        model: as `fastln.models.load_task` takes it.
        data: "phantom", or a dataset's folder or file.
        split: "train", "validation" or "test".
        batch_size: questions per batch.
        dtype: "float32", "bfloat16" or "auto".
        device: "cpu", "cuda" or "auto".
        predictions: JSON Lines file for every question with its answer and the model's.
        metrics: JSON file for the scores.
        options: how the data is read.
        features: keeps what the vision tower gives for each image; None for no caching.
        adapter: folder of an adapter to put into the model, which is then the base that it was trained on.
        image_size: as `fastln.models.load_task` takes it; a saved model knows the one that it was trained with.

    Raises:
        FastLNError: for anything that cannot be had as given.
    """
    _check_file(predictions, "predictions")
    _check_file(metrics, "metrics")
    check_split(split)
    place = settle_device(device)
    source = load_source(data, options)
    dataset = source.dataset(split)
    check_scorable(dataset.samples)
    # A saved model brings its own vocabulary; a new one takes it from the training questions.
    words_from = dataset if Path(model).is_dir() else source.dataset("train")
    task = load_task(model, words_from, dtype=settle_dtype(dtype, place), device=place, image_size=image_size)
    task.check_data(dataset)
    if features is not None:
        check_cacheable(task)
    if adapter is not None:
        load_task_adapter(task, adapter)
    answers = predict(task, dataset, batch_size=batch_size, progress=True, features=features)
    if predictions is not None:
        with predictions.open("w") as file:
            for sample, answer in zip(dataset.samples, answers, strict=True):
                file.write(json.dumps(asdict(sample) | {"prediction": normalise_answer(answer)}) + "\n")
    scores = score(answers, dataset.samples)
    if metrics is not None:
        _write(metrics, {"model": task.name, "data": dataset.name, "split": split, **asdict(scores)})
    _report(task, dataset, split, scores, trained=False)
    return scores


def _check_file(path: Path | None, what: str) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise FastLNError(f"{path}: the folder for the {what} does not exist")
    if path is not None and path.is_dir():
        raise FastLNError(f"{path}: is a folder; name a file for the {what}")


def _report(task: VQATask, data: VQADataset, split: str, scores: Accuracy | ReportScores, *, trained: bool) -> None:
    notes = []
    if task.random_head and not trained:
        notes.append("the task head was never trained: the figure is chance")
    if task.random_weights:
        notes.append("towers of random weights: the figure says nothing about the method")
    if data.synthetic:
        notes.append("synthetic data")
    print(f"{data.name} {split}: {scores.summary()}")
    if notes:
        print(f"  note: {'; '.join(notes)}")


def _check_folder(run: TrainRun, out: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise FastLNError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise FastLNError(f"{out}: is a file; give a folder")
    if resume:
        if not checkpoints_in(out / CHECKPOINTS) and not _is_finished(out):
            raise FastLNError(f"{out}: there is no checkpoint to resume from")
        _check_same(run, out / RECORD)
    if not resume and not overwrite and out.is_dir() and any(out.iterdir()) and not _came_to_nothing(out):
        raise FastLNError(f"{out}: already holds a run; give another folder, or --resume or --overwrite")


def _came_to_nothing(out: Path) -> bool:
    """Whether the run in `out` ended before it wrote anything, so that nothing is lost by starting again."""
    wrote = checkpoints_in(out / CHECKPOINTS) or (out / MODEL).exists() or (out / ADAPTER).exists()
    return _is_finished(out) is False and not wrote


def _is_finished(out: Path) -> bool | None:
    """Whether the run in `out` came to its end; None where no record says so."""
    try:
        return bool(json.loads((out / RECORD).read_text())["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_same(run: TrainRun, record: Path) -> None:
    before = _options(_recorded(record, "run"))
    for name, value in json.loads(json.dumps(_options(asdict(run)))).items():  # as the record has it: lists, no tuples
        if before.get(name) != value:
            raise FastLNError(f"{record}: the run to resume had {name} {_shown(before.get(name))}, not {_shown(value)}")


def _check_same_data(run: TrainRun, digests: dict[str, str], record: Path) -> None:
    before = _recorded(record, "digests")
    changed = sorted(split for split in before.keys() | digests.keys() if before.get(split) != digests.get(split))
    if changed:
        raise FastLNError(
            f"{run.data}: its {' and '.join(changed)} questions or images are not those that the run to resume read, "
            f"as {record} has it: bring them back, or train anew with --overwrite"
        )


def _recorded(record: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(record.read_text())[name])
    except (OSError, ValueError, KeyError, TypeError):
        raise FastLNError(f"{record}: is no record of a run to resume") from None


def _shown(value: object) -> str:
    return "by default" if value is None else repr(value)


def _options(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "config"} | run.get("config", {})


def _clear(out: Path) -> None:
    """Make the folder, without what an earlier run wrote to it; whatever else is in it stays."""
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
    """How many bytes the files of a folder take; None where there is none."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else None


def _write(path: Path, record: dict[str, object]) -> None:
    # Written beside and renamed, so that no reader ever finds half a file.
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=1, default=str) + "\n")
    beside.replace(path)
