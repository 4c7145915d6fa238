"""The trained values of a checkpoint, written as an adapter wherever one can hold them.

So whatever reads adapters reads checkpoints: `load_adapter`, peft, transformers, `fastln eval` and `fastln merge`. What
no adapter can hold lies beside it in `trained.safetensors`, under its plain names; if everything trains, all of it lies
in `model.safetensors`, as stock writes it. Buffers and frozen parameters that changed in training are kept too.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastln.adapters import (
    CONFIG,
    PEFT_PREFIX,
    TRAINED,
    TUNED,
    WEIGHTS,
    WHOLE,
    NoAdapterError,
    parts_configuration,
    read_tensors,
)
from fastln.changes import EXTRA, Marks, buffers, changed, changed_buffers, extra_states, frozen, load_extra_states
from fastln.engines import write_trained_adapter
from fastln.errors import FastLNError
from fastln.fingerprint import FINGERPRINT, difference, fingerprint, vocabulary_differs
from fastln.origin import ORIGIN, Origin, origin_bytes, read_origin
from fastln.processes import own_class
from fastln.settings import EXACT
from fastln.state import prepared


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters, by their names in the trained module."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, folder: Path, before: Marks, origin: Origin, method: dict[str, Any]) -> None:
    """Write all that training changed into a folder, with a fingerprint of the rest, which the base holds.

    Args:
        model: the module that trains.
        folder: an existing folder.
        before: the marks of its frozen parameters before training.
        origin: what the base is.
        method: the arguments of `put_method`.
    """
    trains = trained_parameters(model)
    others = changed_buffers(model) | changed(frozen(model), before)
    whole = all(parameter.requires_grad for parameter in model.parameters())
    stored: dict[str, Tensor] = {}
    if whole:
        others = dict(buffers(model))
        _save_configurations(model, folder)
    else:
        try:
            write_trained_adapter(model, folder, None, origin)
            stored = _tensors(folder)
        except NoAdapterError:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            (folder / CONFIG).write_bytes(parts_configuration(base, origin))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in (trains | others).items()}
    rest = {name: tensor for name, tensor in state.items() if not _same(_find(name, stored, model), tensor)}
    found = fingerprint(model, state.keys() | _plain(stored) | out_of_use(model))
    if rest:
        save_file(rest, folder / (WHOLE if whole else TRAINED), {"format": "pt", FINGERPRINT: found})
    if (states := extra_states(model)) is not None:
        (folder / EXTRA).write_bytes(states)
    further = {"method": method, "trains": list(trains), "changed": list(others), "fingerprint": found}
    further |= {"products": products_of(model), "activations": activations_of(model)}
    (folder / ORIGIN).write_bytes(origin_bytes(origin, **further))


def products_of(model: nn.Module) -> str:
    """Return the form in which a model's matrix products run: `int8` if any do in 8 bits, else `exact`.

    Args:
        model: a model, or peft's wrapper of it.
    """
    state = prepared(model.get_base_model() if isinstance(model, PeftModel) else model)
    changes = () if state is None else state.plan.changes
    return "int8" if any("int8" in (change.products or "") for change in changes) else EXACT


def activations_of(model: nn.Module) -> str:
    """Return the storage mode that a model was prepared with; a memory budget's mixes are `exact` here.

    Args:
        model: a model, or peft's wrapper of it.
    """
    state = prepared(model.get_base_model() if isinstance(model, PeftModel) else model)
    return EXACT if state is None else state.plan.settings.storage


def load_trained(model: nn.Module, folder: Path) -> None:
    """Load what `save_trained` wrote, in place.

    Raises:
        FastLNError: if a file cannot be read, holds other parameters than those that train, or comes from a run with
            other frozen parameters.
    """
    stored = _tensors(folder)
    entries = read_origin(folder)[1]
    trains = trained_parameters(model)
    if odd := sorted(trains.keys() ^ set(entries.get("trains", stored))):
        raise FastLNError(
            f"{folder}: it is from another run: {len(odd)} names differ from those that train now, for example {odd[0]}"
        )
    places: dict[str, Tensor] = dict(model.named_parameters()) | dict(buffers(model))
    state: dict[str, Tensor] = {}
    for name in [*trains, *entries.get("changed", ())]:
        tensor = _find(name, stored, model)
        if tensor is None or name not in places:
            lacks = "it has no" if tensor is None else "this model has no"
            raise FastLNError(f"{folder}: it is from another model: {lacks} {name}; resume with the model of that run")
        if name in trains and tensor.shape != places[name].shape:
            wrong = f"{name} has shape {(*tensor.shape,)} there and {(*places[name].shape,)} here"
            resized = vocabulary_differs(entries.get("fingerprint"), model)
            raise FastLNError(f"{folder}: it is from another model: {resized or wrong}")
        state[name] = tensor
    base, without = entries.get("fingerprint"), state.keys() | _plain(stored)
    if base is not None:
        without |= out_of_use(model)
    elif (folder / TRAINED).is_file():  # as earlier versions wrote it
        base = read_tensors(folder / TRAINED)[1].get(FINGERPRINT)
    if base is not None and (differs := difference(base, model, without)) is not None:
        raise FastLNError(
            f"{folder}: it is from another base model: {differs}; resume with that base, or start a new training"
        )
    load_extra_states(model, folder)
    with torch.no_grad():
        for name, tensor in state.items():
            place = places[name]
            if place.shape == tensor.shape:
                place.copy_(tensor)
            else:
                place.data = tensor.to(place.device)  # a counter or an average that took another shape


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, by their names in its files."""
    paths = [folder / name for name in (WEIGHTS, TRAINED, WHOLE)]
    found: dict[str, Tensor] = {}
    for path in paths:
        if path.is_file():
            found |= read_tensors(path)[0]
    if not found:
        raise FastLNError(f"{folder}: it has none of {', '.join(path.name for path in paths)}")
    return found


def _find(name: str, stored: dict[str, Tensor], model: nn.Module) -> Tensor | None:
    """Return a tensor by its name in the model: it is stored by that, by an adapter's name for it, or not at all."""
    owner, _, own = name.rpartition(".")
    names = [name, f"{PEFT_PREFIX}{name}", f"{PEFT_PREFIX}{owner}{TUNED}{own}"]
    if isinstance(model, PeftModel):
        names.append(name.replace(f".{model.active_adapter}", "").replace(".modules_to_save", ""))
    return next((stored[key] for key in names if key in stored), None)


def _plain(stored: dict[str, Tensor]) -> set[str]:
    return {name.removeprefix(PEFT_PREFIX).replace(TUNED, ".") for name in stored}


def out_of_use(model: nn.Module) -> set[str]:
    """Return the names of what peft keeps of modules that train whole, as they were: a new head is random there."""
    kept = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    inside = tuple(f"{name}.original_module." for name in kept)
    return {name for name, _ in model.named_parameters() if name.startswith(inside)}


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


def _save_configurations(model: nn.Module, folder: Path) -> None:
    """Write what `from_pretrained` needs beside the weights of a whole model."""
    if isinstance(model, PreTrainedModel):
        config = copy.deepcopy(model.config)
        config.architectures = [own_class(model).__name__]
        config.dtype = model.dtype
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
