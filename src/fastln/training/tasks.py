"""Methods for tasks: applies `fastln.engines` to a task's model, with its head."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from fastln.engines import load_trained_adapter, put_method, to_stock
from fastln.errors import FastLNError
from fastln.models import Task


def apply_method(
    task: Task,
    method: str,
    engine: str | None = None,
    *,
    scope: Iterable[str] | None = None,
    without: str | Iterable[str] = (),
    backend: str = "auto",
) -> nn.Module:
    """Set up the task's model for `method`, in place.

    A randomly initialised task head trains with every method. Method `head` trains any head.

    Args:
        task: the model.
        method: as `fastln.methods.get_method` takes it.
        engine: the engine that runs it; the method's first by default.
        scope: the sub-models to tune; all by default.
        without: names of what `fastln.prepare` leaves out; for engine `fastln` only.
        backend: the backend of fastln's operations; for engine `fastln` only.

    Returns:
        The module to train: the task's model itself, or peft's wrapper of it.

    Raises:
        FastLNError: as in `put_method`, and for method `head` if there is no task head.
    """
    if method == "head" and not task.head:
        raise FastLNError(f"method 'head' trains a task head, and {task.name} has none")
    also = task.head_under(method)
    return put_method(task.model, method, engine, scope=scope, also=also, without=without, backend=backend)


def finish(task: Task, trained: nn.Module) -> None:
    """Make the task's model stock again, with the trained values in it.

    Args:
        task: the task that `apply_method` was called with.
        trained: what `apply_method` returned.
    """
    task.model = to_stock(trained)


def load_task_adapter(task: Task, directory: Path) -> None:
    """Load an adapter, fastln's or peft's, into the task's model, which stays stock.

    Raises:
        FastLNError: as in `fastln.engines.load_trained_adapter`.
    """
    task.model = load_trained_adapter(task.model, directory)
    task.random_head = ()  # the adapter holds it, because it trains with every method
