"""Methods for tasks: applies `fastln.engines` to a task's model, with its head; adapters and their bases."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastln.adapters import CONFIG, PARTS, WHOLE, adapter_type, named_base
from fastln.changes import changed_buffers
from fastln.data import Source
from fastln.engines import load_trained_adapter, put, to_stock
from fastln.errors import FastLNError, loading
from fastln.families import parameters_in
from fastln.fingerprint import difference, fingerprint
from fastln.methods import RANDOM_HEADS, get_method, norm_parameters, select_parameters, settle_scope
from fastln.models import Kept, Task, VQATask, is_bare, load_task
from fastln.origin import ORIGIN, read_origin
from fastln.rounding import warn_of_rounding
from fastln.settings import EXACT, MethodSettings
from fastln.standins.tricks import TRICKS
from fastln.state import prepared
from fastln.training.config import TrainConfig
from fastln.training.trained import load_trained, out_of_use, trained_parameters

logger = logging.getLogger(__name__)


def apply_method(task: Task, method: str = "layernorm", engine: str | None = None, **settings: Any) -> nn.Module:
    """Set up the task's model for `method`, in place.

    Args:
        task: the model.
        method: as `fastln.methods.get_method` takes it.
        engine: the engine that runs it; the method's first by default.
        **settings: further arguments of `put_method`, but `also`.

    Returns:
        The module to train: the task's model itself, or peft's wrapper of it.

    Raises:
        FastLNError: as in `apply_settings`.
    """
    return apply_settings(task, MethodSettings.of(method, engine, **settings))


def apply_settings(task: Task, settings: MethodSettings, *, quietly: bool = False) -> nn.Module:
    """Set up the task's model with `settings`, in place.

    A randomly initialised task head trains with every method. Method `head` trains any head.

    Args:
        task: the model.
        settings: as `TrainConfig.settings` returns them.
        quietly: as `fastln.engines.put` takes it.

    Returns:
        The module to train: the task's model itself, or peft's wrapper of it.

    Raises:
        FastLNError: as in `put_method`, and for method `head` if there is no task head.
    """
    method, without = settings.method, settings.without
    if method == "head" and not task.head:
        raise FastLNError(f"method 'head' trains a task head, and {task.name} has none")
    if RANDOM_HEADS in without:
        raise FastLNError(
            f"{RANDOM_HEADS!r} cannot be left out of a task: its random head trains with every method, because "
            "answers mean nothing without it"
        )
    # The task has said which head is random, and refused checkpoints that lack anything else.
    settings = replace(settings, also=task.head_under(method), without=(*without, RANDOM_HEADS))
    return put(task.model, settings, quietly=quietly)


def method_arguments(task: Task, config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of `put_method` that a run has, for its checkpoints."""
    scope = None if config.scope is None else list(config.scope)
    return {"method": config.method, "scope": scope, "also": list(task.head_under(config.method))}


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
    """Make the task's model stock again, with the trained values in it; a warning tells if its dtype rounds them.

    Args:
        task: the task that `apply_method` was called with.
        trained: what `apply_method` returned.
    """
    state = prepared(task.model)
    names = {} if state is None else state.dtypes
    exact = {name: task.model.get_parameter(name).detach().clone() for name in names}
    task.model = to_stock(trained)
    warn_of_rounding(
        exact,
        dict(task.model.named_parameters()),
        "the whole model is saved and scored so; the adapter or a checkpoint has every digit",
    )


def check_reloads(task: Task, settings: MethodSettings) -> None:
    """Check that `reload` will find the base of a task whose own weights 8-bit ones replace.

    Raises:
        FastLNError: if the task does not say where it came from.
    """
    if settings.products != EXACT and not settings.keep_weights and task.origin.model is None:
        raise FastLNError(
            f"products {settings.products!r} drops the weights of {task.name}, and nothing says where they could be "
            "loaded from again at the end: keep_weights=True keeps them"
        )


def reload(task: VQATask, trained: nn.Module, settings: MethodSettings) -> nn.Module:
    """Replace the task's model, whose own weights are gone, by its base, loaded again, with the trained values.

    The model in memory is freed first.

    Args:
        task: the task that `apply_settings` was called with.
        trained: what that returned; it has no values afterwards.
        settings: what it was called with.

    Returns:
        The new module, set up for the same method with exact products, for `finish`.

    Raises:
        FastLNError: if the base cannot be loaded, or is no longer the one that was trained on.
    """
    device, origin = task.device, task.origin
    assert origin.model is not None
    logger.info(
        "products %s dropped the weights of %s: it is loaded again, and saved and scored with exact products",
        settings.products,
        origin.model,
    )
    values = {name: tensor.detach() for name, tensor in trained_parameters(trained).items()} | changed_buffers(trained)
    base = fingerprint(trained, values.keys() | out_of_use(trained))
    trained.to("meta")
    kept = Kept(origin.answers, task.tokenizer if is_bare(origin.model) else None)
    dtype = getattr(torch, origin.dtype or "float32")
    task.model = load_task(
        origin.model, None, dtype=dtype, seed=origin.seed, device=device, image_size=origin.image_size, kept=kept
    ).model
    plain = tuple(name for name in TRICKS if name != RANDOM_HEADS)
    exact = replace(settings, without=plain, backend="reference", activations=EXACT, memory_budget=None, products=EXACT)
    again = apply_settings(task, exact, quietly=True)
    if (differs := difference(base, again, values.keys() | out_of_use(again))) is not None:
        raise FastLNError(
            f"{origin.model}: it changed while it was trained on, so the result does not fit it: {differs}"
        )
    places = dict(again.named_parameters()) | dict(again.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            places[name].copy_(value)
    return again


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter or a checkpoint, and no whole model that `fastln train` wrote."""
    path = Path(folder)
    return (path / CONFIG).is_file() or ((path / ORIGIN).is_file() and (path / WHOLE).is_file())


def load_base(
    adapter: Path,
    base: str | None,
    data: Source | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    validation: float = 0.0,
) -> VQATask:
    """Load the base of an adapter or a checkpoint, with all that its use takes: its answers, its image size.

    Args:
        adapter: the folder.
        base: as `fastln.models.load_task` takes it; by default the one that the folder names.
        data: makes the tokenizer of a bare configuration, and the answers if the folder has none.
        dtype: dtype of the parameters.
        device: the model's device.
        image_size: as `fastln.models.load_task` takes it; by default the one that the folder has.
        validation: the fraction of the training images that was held out.

    Raises:
        FastLNError: if the folder does not say its base, or that cannot be loaded.
    """
    origin, _ = read_origin(adapter)
    spec = base_of(adapter, base)
    bare = is_bare(spec)
    kept = Kept(origin.answers, kept_tokenizer(adapter) if bare else None)
    needs_data = (bare and kept.tokenizer is None) or (spec.startswith("dual") and kept.answers is None)
    train = data.dataset("train", validation_fraction=validation) if needs_data and data is not None else None
    if spec.startswith("dual:") and train is None and kept.answers is None:
        raise FastLNError(
            f"{adapter}: it does not hold the answers that its dual encoder chooses from, as those written by earlier "
            "versions do not: give the folder that the run wrote in place of the two encoders"
        )
    size = image_size or origin.image_size
    return load_task(spec, train, dtype=dtype, seed=origin.seed, device=device, image_size=size, kept=kept)


def kept_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in the folder of an adapter or a checkpoint, if there is one."""
    if not (folder / "tokenizer.json").is_file():
        return None
    with loading(str(folder)):
        return PreTrainedTokenizerFast.from_pretrained(folder)


def base_of(adapter: Path, base: str | None = None) -> str:
    """Return the base of an adapter or a checkpoint, as `fastln.models.load_task` takes it.

    Args:
        adapter: the folder.
        base: what the user gave in its place, if anything.

    Raises:
        FastLNError: if the folder does not say it, or it is a directory that is not there.
    """
    if base is not None:
        return base
    model = read_origin(adapter)[0].model or named_base(adapter)
    if model is None:
        raise FastLNError(
            f"{adapter}: it does not say what its base is, because that was not loaded from a directory or the hub: "
            "name the base (fastln eval BASE --adapter ADAPTER, fastln merge ADAPTER --base BASE)"
        )
    gone = [source for source in model.rpartition(":")[2].split(",") if source[:1] == "/" and not Path(source).exists()]
    if gone:
        raise FastLNError(f"{adapter}: its base was {model}, and {gone[0]} is not there: name the base where it is now")
    return model


def load_values(model: nn.Module, directory: Path, *, check_base: bool = True) -> nn.Module:
    """Load the values of an adapter or a checkpoint into a stock model, and return the stock model.

    Raises:
        FastLNError: as in `fastln.engines.load_trained_adapter` and `fastln.training.trained.load_trained`.
    """
    method = read_origin(directory)[1].get("method", {})
    if adapter_type(directory) == PARTS and method.get("method") == "layernorm+lora":  # no adapter holds both
        trained = put(model, MethodSettings.of(**method, without=TRICKS, backend="reference"), quietly=True)
        load_trained(trained, directory)
        return to_stock(trained)
    return load_trained_adapter(model, directory, check_base=check_base)


def load_task_adapter(task: Task, directory: Path) -> None:
    """Load an adapter, fastln's or peft's, or a checkpoint, into the task's model, which stays stock.

    Raises:
        FastLNError: as in `load_values`.
    """
    task.model = load_values(task.model, directory)
    task.random_head = ()  # the adapter holds it, because it trains with every method
