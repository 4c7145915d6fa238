"""Ask a model every question of a dataset, and score its answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastln.data import VQADataset
from fastln.metrics import Accuracy, ReportScores, score
from fastln.models import VQATask
from fastln.progress import bar
from fastln.training.features import cached_features
from fastln.training.tensor_store import TensorStore


def predict(
    task: VQATask,
    dataset: VQADataset,
    *,
    batch_size: int = 64,
    progress: bool = False,
    features: TensorStore | None = None,
) -> list[str]:
    """Return the model's answer to every question, in the dataset's order.

    Args:
        task: the model.
        dataset: the questions.
        batch_size: questions per batch; questions on one image go together, for models that share its vision pass.
        progress: whether to show a progress bar on stderr.
        features: keeps the vision tower's output for each image; None for no caching.
    """
    order = sorted(range(len(dataset)), key=lambda index: dataset.samples[index].image)
    predictions = [""] * len(order)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with (
        evaluating(task.model),
        cached_features(task.vision_tower, features),
        bar(total=len(batches), desc=f"eval {dataset.split}", unit="batch", shown=progress) as shown,
    ):
        for batch in batches:
            answers = task.answers(task.collate([dataset.samples[index] for index in batch], dataset))
            for index, answer in zip(batch, answers, strict=True):
                predictions[index] = answer
            shown.update()
    return predictions


def evaluate(
    task: VQATask,
    dataset: VQADataset,
    *,
    batch_size: int = 64,
    progress: bool = False,
    features: TensorStore | None = None,
) -> Accuracy | ReportScores:
    """Score a model's answers (or reports); see `predict` for the arguments."""
    predictions = predict(task, dataset, batch_size=batch_size, progress=progress, features=features)
    return score(predictions, dataset.samples)


def print_scores(
    task: VQATask, dataset: VQADataset, scores: Accuracy | ReportScores, *, head_is_trained: bool = False
) -> None:
    """Print a model's scores on a dataset, with a note if they mean little.

    Args:
        task: the model.
        dataset: what was scored.
        scores: the scores of the model's answers.
        head_is_trained: whether a randomly initialised head has been trained.
    """
    notes = []
    if task.random_head and not head_is_trained:
        notes.append("the task head was never trained: the figure is chance")
    if task.random_weights:
        notes.append("towers of random weights: the figure says nothing about the method")
    if dataset.synthetic:
        notes.append("synthetic data")
    print(f"{dataset.name} {dataset.split}: {scores.summary()}")
    if notes:
        print(f"  note: {'; '.join(notes)}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode, and restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
