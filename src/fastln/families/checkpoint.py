"""Compare a model's parameters with the names and shapes in the checkpoint that it came from, without network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

_OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # of norms, in checkpoints of the first BERTs


def stored_shape(model: PreTrainedModel, name: str) -> tuple[int, ...] | None:
    """Return the shape of a parameter in the model's checkpoint; None if the checkpoint has no such tensor.

    Args:
        model: The model that was loaded.
        name: The parameter's name, in this model or in one around it.

    Raises:
        LookupError: If there is no checkpoint in safetensors on this machine.
    """
    stored = _stored(model)
    if not stored:
        raise LookupError(f"there is no checkpoint of {model.name_or_path!r} on this machine")
    key = _key(name, stored)
    return None if key is None else stored[key][1]


def lacking(model: PreTrainedModel) -> set[str] | None:
    """Return the names of the parameters that the model's checkpoint lacks, or holds in another shape.

    Returns:
        The names; None if the checkpoint is not on this machine, or the model does not have its values: it was then
        made from the configuration alone, or changed since.
    """
    stored = _stored(model)
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        key = _key(name, stored)
        if key is not None and stored[key][1] == tuple(parameter.shape):
            found[name] = key
    telling = [name for name in found if _tells(model.get_parameter(name))]
    if not telling:
        return None
    smallest = min(telling, key=lambda name: model.get_parameter(name).numel())
    own = model.get_parameter(smallest)
    values = _read(stored[found[smallest]][0], found[smallest])
    if not torch.equal(values.to(own.device, own.dtype), own):
        return None
    return {name for name, _ in model.named_parameters()} - found.keys()


def _tells(parameter: Tensor) -> bool:
    """Whether a parameter's values tell where they are from: those of a new norm or bias are the same everywhere."""
    return parameter.dim() > 1 and not parameter.is_meta and bool(parameter.min() != parameter.max())


def _key(name: str, stored: Mapping[str, object]) -> str | None:
    """Return the name in the checkpoint: the same, but perhaps with or without the prefixes of models around it."""
    if name in stored:
        return name
    parts = name.split(".")
    shorter = (".".join(parts[n:]) for n in range(1, len(parts) - 1))
    if (key := next((key for key in shorter if key in stored), None)) is not None:
        return key
    return next((key for key in stored if key.endswith(f".{name}")), None)


def _stored(model: PreTrainedModel) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Return each tensor's file and shape, by name; nothing if there are no such files on this machine."""
    stored = {}
    for path in _files(model.name_or_path):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    first, _, last = key.rpartition(".")
                    renamed = f"{first}.{_OLD_NAMES.get(last, last)}" if first else last
                    stored[renamed] = path, tuple(file.get_slice(key).get_shape())
        except (OSError, SafetensorError):
            return {}
    return stored


def _read(path: Path, name: str) -> Tensor:
    first, _, last = name.rpartition(".")
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        old = next((f"{first}.{old}" for old, new in _OLD_NAMES.items() if new == last), name)
        tensor: Tensor = file.get_tensor(name if name in names else old)
    return tensor


def _files(source: str) -> list[Path]:
    if not source:
        return []
    if (whole := _file(source, SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := _file(source, SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [path for name in names if (path := _file(source, name)) is not None]
    return found if len(found) == len(names) else []


def _file(source: str, name: str) -> Path | None:
    try:
        found = cached_file(
            source,
            name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):  # a source that is neither a directory nor in the cache
        return None
    return None if found is None else Path(found)
