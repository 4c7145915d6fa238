"""fastln eval: score a saved model on a dataset."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastln.data import DataOptions, load_source
from fastln.data.answers import normalise_answer
from fastln.data.dataset import check_split
from fastln.errors import FastLNError
from fastln.files import expanded, json_text, user_path
from fastln.machine import settle_device
from fastln.metrics import Accuracy, ReportScores, check_scorable, score
from fastln.models import load_task
from fastln.models.sources import expanded_sources
from fastln.rates import settle_dtype
from fastln.training.evaluate import predict, print_scores
from fastln.training.features import check_cacheable
from fastln.training.record import write_json
from fastln.training.tasks import load_task_adapter
from fastln.training.tensor_store import TensorStore


@dataclass(frozen=True)
class EvalRun:
    """The options of one `fastln eval`.

    Attributes:
        model: as `fastln.models.load_task` takes it.
        data: "phantom", or a dataset's folder or file.
        split: "train", "validation" or "test".
        batch_size: questions per batch.
        dtype: "float32", "bfloat16" or "auto".
        device: "cpu", "cuda" or "auto".
        options: how the data is read.
        adapter: folder of an adapter to load into the model, which is then the adapter's base.
        image_size: as `fastln.models.load_task` takes it; by default the size saved with the model.
        predictions: JSON Lines file for every question, with its answer and the model's answer.
        metrics: JSON file for the scores.
    """

    model: str
    data: str = "phantom"
    split: str = "test"
    batch_size: int = 64
    dtype: str = "auto"
    device: str = "auto"
    options: DataOptions = field(default_factory=DataOptions)
    adapter: Path | None = None
    image_size: int | None = None
    predictions: Path | None = None
    metrics: Path | None = None

    def __post_init__(self) -> None:
        check_split(self.split)
        object.__setattr__(self, "data", expanded(self.data))
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
    dataset = source.dataset(run.split)
    check_scorable(dataset.samples)
    # A saved model has its own vocabulary; a new one takes it from the training questions.
    words_from = dataset if Path(run.model).is_dir() else source.dataset("train")
    dtype = settle_dtype(run.dtype, device)
    task = load_task(run.model, words_from, dtype=dtype, device=device, image_size=run.image_size)
    task.check_data(dataset)
    if features is not None:
        check_cacheable(task)
    if run.adapter is not None:
        load_task_adapter(task, run.adapter)
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
