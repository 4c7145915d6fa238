"""Methods for tasks: applies `fastln.engines` to a task's model, with its head."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from fastln.engines import load_trained_adapter, put_method, to_stock
from fastln.errors import FastLNError
from fastln.families import parameters_in
from fastln.methods import RANDOM_HEADS, get_method, norm_parameters, select_parameters, settle_scope
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
    if RANDOM_HEADS in without:
        raise FastLNError(
            f"{RANDOM_HEADS!r} cannot be left out of a task: its random head trains with every method, because "
            "answers mean nothing without it"
        )
    also = task.head_under(method)
    # The task has said which head is random, and refused checkpoints that lack anything else.
    without = (*((without,) if isinstance(without, str) else without), RANDOM_HEADS)
    return put_method(task.model, method, engine, scope=scope, also=also, without=without, backend=backend)


def groups_that_train(task: Task, method: str, scope: Iterable[str] | None = None) -> set[str]:
    """Return which of `fastln.methods.GROUPS` a method trains in a task's model, before it is applied.

    Raises:
        FastLNError: as in `fastln.methods.select_parameters`, and for a scope that the model does not have.
    """
    head = task.head_under(method)
    found = {"head"} if head else set()
    method, scope = settle_scope(method, scope)
    chosen, _ = get_method(method)
    if chosen.select is None:
        parameters_in(task.model, scope)  # refuses a scope that the model does not have
        return found | ({"own"} if chosen.norm_learning_rate is None else {"own", "norms"})
    prefixes = tuple(f"{name}." for name in head)
    names = {name for name in select_parameters(task.model, chosen, scope) if not name.startswith(prefixes)}
    norms = set(norm_parameters(task.model))
    return found | ({"norms"} if names & norms else set()) | ({"own"} if names - norms else set())


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
