"""Who puts a method on a model: fastln itself, plain torch, or peft. All train the same parameters' kinds."""

from __future__ import annotations

from collections.abc import Iterable

import peft
from peft.utils import ModulesToSaveWrapper
from torch import nn

from fastln.errors import FastLNError
from fastln.families import scope_prefixes
from fastln.methods import LORA_RANK, LORA_TARGETS, get_method, select_parameters
from fastln.models import Task
from fastln.prepare import STATE, prepare, restore


def apply_method(
    task: Task,
    method: str,
    engine: str | None = None,
    *,
    scope: Iterable[str] | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Put `method` on the task's model, in place.

    A task head that starts random trains under every method; `head` trains the head even where it does not.

    Args:
        task: the model.
        method: a name from `fastln.methods.METHODS`.
        engine: who runs it; the method's first by default.
        scope: the sub-models to tune; all by default.
        backend: of fastln's operations; for engine `fastln` only.

    Returns:
        The module to train: the task's model itself, or peft's wrapper of it.

    Raises:
        FastLNError: for an unknown pair, or a model that the method finds nothing in.
    """
    chosen, engine = get_method(method, engine)
    head = task.head if chosen.name == "head" else task.random_head
    if engine == "fastln":
        return prepare(task.model, method, scope=scope, also=head, backend=backend)
    if engine == "torch":
        trained = select_parameters(task.model, chosen, scope, head)
        for name, parameter in task.model.named_parameters():
            parameter.requires_grad_(name in trained)
        return task.model
    config: peft.PeftConfig
    if method == "layernorm":
        norms = {name.rpartition(".")[0] for name in select_parameters(task.model, chosen, scope)}
        config = peft.LNTuningConfig(target_modules=norms)
    else:
        targets = _projections(task.model, task.head, scope_prefixes(task.model, scope))
        config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.1, target_modules=targets)
    config.modules_to_save = list(head) or None
    # The optimizer keeps float32 copies of low-precision parameters for every engine; peft's own would slow it down.
    return peft.get_peft_model(task.model, config, autocast_adapter_dtype=False)


def finish(task: Task, trained: nn.Module) -> None:
    """Make the task's model stock again, with the trained values in it.

    Args:
        task: the model that `apply_method` was called with.
        trained: what `apply_method` returned.
    """
    if isinstance(trained, peft.PeftModel):
        task.model = trained.merge_and_unload()
        # For norms, peft leaves its wrappers around the further modules.
        for name, module in list(task.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                task.model.set_submodule(name, module.modules_to_save[module.active_adapter])
    elif hasattr(trained, STATE):
        restore(task.model)


def _projections(model: nn.Module, head: tuple[str, ...], inside: tuple[str, ...]) -> list[str]:
    prefixes = tuple(f"{name}." for name in head)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and LORA_TARGETS.search(name)
        and name.startswith(inside)
        and not name.startswith(prefixes)
    ]
    if not names:
        raise FastLNError(f"method 'lora' finds no query or value projection in {type(model).__name__}")
    return names
