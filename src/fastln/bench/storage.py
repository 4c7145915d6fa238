"""What a run keeps for backward: fastln's storage modes and budgets, stock code's checkpoints and compilation."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastln.bench.results import Job
from fastln.bench.suite import times_exact
from fastln.budget import AtFirstBatch, outline_of
from fastln.errors import FastLNError
from fastln.models import Task
from fastln.models.shapes import is_shape
from fastln.peak import StepMemory, step_memory
from fastln.settings import MethodSettings
from fastln.state import prepared
from fastln.training.tasks import apply_settings

Batch = Mapping[str, Any]


class SetUp(NamedTuple):
    """A model that is ready to train.

    Attributes:
        model: The module to train.
        predicted: The predicted peak of a step; None if it was not asked for, or for compiled code, which has none.
    """

    model: nn.Module
    predicted: int | None


def largest(batches: Iterable[Batch]) -> Batch:
    """Return the batch with the most numbers."""
    return max(batches, key=lambda batch: sum(value.numel() for value in batch.values() if isinstance(value, Tensor)))


def set_up(job: Job, task: Task, settings: MethodSettings, batch: Batch | None) -> SetUp:
    """Set up the task's model for a run.

    Args:
        job: Says what checkpoints are made of and whether the model is compiled.
        task: The model.
        settings: The method, with a budget that `settled_budget` returned.
        batch: The largest batch of the run, to predict a step's peak for; None to predict nothing.

    Raises:
        FastLNError: As in `apply_settings`, or if the model has no layers that transformers can compute again.
    """
    predicts = batch is not None and job.compiled is None and settings.memory_budget is None
    predicted = predict(task, settings, batch, checkpointing=job.checkpointing).peak if predicts and batch else None
    if job.checkpointing:
        _compute_layers_again(task.model)
    model = apply_settings(task, settings)
    if job.compiled is not None:
        import torch._functorch.config as functorch  # not at the top: runs that compile nothing do not need it

        functorch.activation_memory_budget = job.compiled
        # The lengths of texts differ from batch to batch. Code for any length is compiled once, not again while timed.
        model.compile(dynamic=None if is_shape(job.model) else True)
    return SetUp(model, predicted)


def settled_budget(job: Job, task: Task, settings: MethodSettings, batch: Batch) -> float | str | None:
    """Return the run's budget as `prepare` takes it: a share of what exact storage takes becomes bytes.

    Args:
        job: Names the budget.
        task: The model, stock.
        settings: The method, with exact storage.
        batch: The batch that the peak is predicted for.
    """
    if job.memory_budget is None or (times := times_exact(job.memory_budget)) is None:
        return job.memory_budget
    memory = predict(task, settings, batch)
    return memory.weights + int(times * (memory.peak - memory.weights))


def predict(task: Task, settings: MethodSettings, batch: Batch, *, checkpointing: bool = False) -> StepMemory:
    """Predict the memory of a step of the task's model, on the meta device. The model stays as it is.

    Args:
        task: The model, stock.
        settings: The method.
        batch: The model's arguments, with labels.
        checkpointing: Whether stock layers are computed again in the backward.
    """
    on_paper = copy.copy(task)
    on_paper.model = outline_of(task.model)
    if checkpointing:
        _compute_layers_again(on_paper.model)
    return step_memory(apply_settings(on_paper, settings, quietly=True).train(), batch)


def chosen(model: nn.Module) -> tuple[int | None, str | None]:
    """Return what a memory budget chose: the peak that it predicts, and the choice in a line; or None for each."""
    state = prepared(model)
    waiting = [] if state is None else [undo for undo in state.undo if isinstance(undo, AtFirstBatch)]
    if not waiting or (found := waiting[0].found) is None:
        return None, None
    return found.memory.peak, found.describe(waiting[0].n_bytes)


def _compute_layers_again(model: PreTrainedModel) -> None:
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise FastLNError(f"checkpointing: {error}") from None
    if getattr(model, "_require_grads_hooks", None):  # for reentrant checkpoints; some models fail with them
        model.disable_input_require_grads()
