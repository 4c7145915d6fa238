"""fastln eval: score a saved model on a dataset."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fastln.data import DataOptions, load_source
from fastln.data.answers import normalise_answer
from fastln.data.dataset import check_split
from fastln.errors import FastLNError
from fastln.files import expanded, json_text, user_path
from fastln.machine import settle_device
from fastln.metrics import Accuracy, ReportScores, check_scorable, score
from fastln.models import is_bare, load_task
from fastln.models.sources import expanded_sources, saved_model
from fastln.origin import read_origin
from fastln.rates import DTYPES, settle_dtype
from fastln.training.evaluate import predict, print_scores
from fastln.training.features import check_cacheable
from fastln.training.record import write_json
from fastln.training.tasks import is_adapter, load_base, load_task_adapter
from fastln.training.tensor_store import TensorStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalRun:
    """The options of one `fastln eval`.

    Attributes:
        model: as `fastln.models.load_task` takes it; also an adapter's or a checkpoint's folder. None for the base that
            `adapter` names.
        data: "phantom", or a dataset's folder or file.
        split: "train", "validation" or "test".
        batch_size: questions per batch.
        dtype: "float32", "bfloat16" or "auto": the one that it is saved in, or its adapter was trained in.
        device: "cpu", "cuda" or "auto".
        options: how the data is read.
        adapter: folder of an adapter or a checkpoint to load into the model, which is then its base.
        image_size: as `fastln.models.load_task` takes it; by default the size saved with the model or the adapter.
        validation: the fraction of the training images that the run held out as its validation split.
        predictions: JSON Lines file for every question, with its answer and the model's answer.
        metrics: JSON file for the scores.
    """

    model: str | None
    data: str = "phantom"
    split: str = "test"
    batch_size: int = 64
    dtype: str = "auto"
    device: str = "auto"
    options: DataOptions = field(default_factory=DataOptions)
    adapter: Path | None = None
    image_size: int | None = None
    validation: float = 0.0
    predictions: Path | None = None
    metrics: Path | None = None

    def __post_init__(self) -> None:
        check_split(self.split, self.validation)
        if self.model is None and self.adapter is None:
            raise FastLNError("give a model, or an adapter that names its base")
        object.__setattr__(self, "data", expanded(self.data))
        if self.model is not None:
            object.__setattr__(self, "model", expanded_sources(self.model))
        for what in ("adapter", "predictions", "metrics"):
            if getattr(self, what) is not None:
                object.__setattr__(self, what, user_path(getattr(self, what)))
        for what in ("predictions", "metrics"):
            path: Path | None = getattr(self, what)
            if path is not None and not path.absolute().parent.is_dir():
                raise FastLNError(f"{path}: the folder for the {what} does not exist")
            if path is not None and path.is_dir():
                raise FastLNError(f"{path}: is a folder; name a file for the {what}")


def run_evaluation(run: EvalRun, features: TensorStore | None = None) -> Accuracy | ReportScores:
    """Score a saved model, and print the result.

    Args:
        run: the options.
        features: keeps the vision tower's output for each image; None for no caching.

    Raises:
        FastLNError: if an option in `run` is invalid or cannot be met.
    """
    device = settle_device(run.device)
    source = load_source(run.data, run.options)
    if run.split == "test" and "test" not in source.splits:
        raise FastLNError(f"{source.name} has no test split, only {', '.join(source.splits)}; --split names another")
    dataset = source.dataset(run.split, validation_fraction=run.validation)
    check_scorable(dataset.samples)
    model, adapter = run.model, run.adapter
    if adapter is None and model is not None and is_adapter(model):
        adapter = Path(model)
        model = None
    dtype = _dtype(run.dtype, model, adapter, device)
    if adapter is not None:
        task = load_base(
            adapter,
            model,
            source,
            dtype=dtype,
            device=device,
            image_size=run.image_size,
            validation=run.validation,
        )
    elif model is not None:
        # A saved model has its own vocabulary; a new one takes it from the training questions.
        is_saved = Path(model).is_dir() and not is_bare(model)
        words_from = None if is_saved else source.dataset("train", validation_fraction=run.validation)
        task = load_task(model, words_from, dtype=dtype, device=device, image_size=run.image_size)
    task.check_data(dataset)
    if features is not None:
        check_cacheable(task)
    if adapter is not None:
        load_task_adapter(task, adapter)
    answers = predict(task, dataset, batch_size=run.batch_size, progress=True, features=features)
    if run.predictions is not None:
        with run.predictions.open("w", encoding="utf-8") as file:
            for sample, answer in zip(dataset.samples, answers, strict=True):
                file.write(json_text(asdict(sample) | {"prediction": normalise_answer(answer)}) + "\n")
    scores = score(answers, dataset.samples)
    if run.metrics is not None:
        write_json(run.metrics, {"model": task.name, "data": dataset.name, "split": run.split, **asdict(scores)})
    print_scores(task, dataset, scores)
    return scores


def _dtype(name: str, model: str | None, adapter: Path | None, device: torch.device) -> torch.dtype:
    """Return the dtype to load a model in: with "auto", the one that it is saved in or the adapter was trained in."""
    if name != "auto":
        return settle_dtype(name, device)
    trained = read_origin(adapter)[0].dtype if adapter is not None else _saved_dtype(model or "")
    if trained not in DTYPES:
        return settle_dtype(name, device)
    logger.info("dtype %s, as %s", trained, "the model is saved" if adapter is None else "in training")
    return DTYPES[trained]


def _saved_dtype(model: str) -> str | None:
    """Return the dtype of a saved model; None for a hub's name, or if its configuration does not say."""
    if not Path(model).is_dir():
        return None
    try:
        config = json.loads((Path(saved_model(model)) / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):  # what loads the model says what is wrong with it
        return None
