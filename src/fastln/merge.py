"""Merging: writes the whole stock model with the tuned values in the base's dtype."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from fastln.adapters import CONFIG
from fastln.errors import FastLNError
from fastln.files import user_path, written_whole
from fastln.fingerprint import check_has_values
from fastln.processes import is_first_process, is_sharded, own_class
from fastln.rounding import warn_of_rounding
from fastln.state import prepared

_WEIGHTS_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def merge_adapter(model: PreTrainedModel, directory: str | Path) -> None:
    """Write the whole model with `save_pretrained`, with tuned values in the base's dtype; the model does not change.

    With several processes, only the first writes.

    Args:
        model: a model that `prepare` was called on, or a stock one after `load_adapter`.
        directory: the folder; an earlier save of the same model in it is replaced once the new one is completely on
            disk.

    Raises:
        FastLNError: if the model is sharded, or if the folder holds another model or an adapter, or cannot be written
            to; what is in it is then still complete.
    """
    if is_sharded(model):
        raise FastLNError(
            f"{own_class(model).__name__} is sharded over processes, so it cannot be written whole: save its "
            "adapter, which `fastln merge` puts into the base"
        )
    if (state := prepared(model)) is not None and state.n_lost:
        raise FastLNError(
            f"products='int8' replaced {state.n_lost} weights by their 8-bit form and did not keep them: save the "
            "adapter, which `fastln merge` puts into the base, or prepare the model with keep_weights=True"
        )
    if not hasattr(model, "hf_device_map"):  # then save_pretrained finds what is offloaded
        for name, tensor in model.state_dict(keep_vars=True).items():
            check_has_values(name, tensor)
    if not is_first_process():
        return
    folder = user_path(directory)
    if folder.is_file():
        raise FastLNError(f"{directory}: this is a file; give a folder for the model")
    try:
        with written_whole(folder) as beside:
            _refuse_adapter(folder)
            save_merged(model, beside)
            _refuse_other(folder, beside)
            new = {path.name for path in beside.iterdir()}
        for path in folder.iterdir():  # left by a model that was split into other files
            if _WEIGHTS_FILE.fullmatch(path.name) and path.name not in new:
                path.unlink()
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{directory}: the model cannot be written: {error}") from error


def _refuse_adapter(folder: Path) -> None:
    if (folder / CONFIG).is_file():
        raise FastLNError(
            f"{folder}: it holds an adapter, which from_pretrained would put onto the merged model; give another folder"
        )


def _refuse_other(folder: Path, new: Path) -> None:
    """Refuse a folder whose model is not an earlier save of the new one, because its other files would stay."""
    before = _type_and_shapes(folder)
    if before is not None and before != _type_and_shapes(new):
        raise FastLNError(f"{folder}: it holds another model, and files of two would be mixed; give another folder")


def _type_and_shapes(folder: Path) -> tuple[str | None, dict[str, list[int]]] | None:
    """Return the model's type and the shapes of its tensors in a folder; None if there is no configuration."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    shapes: dict[str, list[int]] = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors" and _WEIGHTS_FILE.fullmatch(path.name):
            try:
                with safe_open(path, "pt") as file:
                    shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            except SafetensorError:  # cut short; it goes
                continue
    return kind, shapes


def save_merged(model: PreTrainedModel, directory: Path) -> None:
    """Call `save_pretrained` with the tuned values in the base's dtype; on a full disk, part of a model may remain."""
    state = prepared(model)
    dtypes: Mapping[str, torch.dtype] = {} if state is None else state.dtypes
    tuned = {name: parameter for name, parameter in model.named_parameters() if name in dtypes}
    exact = {name: parameter.data for name, parameter in tuned.items()}
    try:
        for name, parameter in tuned.items():
            parameter.data = parameter.data.to(dtypes[name])
        warn_of_rounding(exact, tuned, "keep the adapter, which has every digit")
        model.save_pretrained(directory)
    finally:
        for name, parameter in tuned.items():
            parameter.data = exact[name]
