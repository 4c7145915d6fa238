"""Adapters: the tuned norms of a model in a file of some hundred kilobytes, in peft's layout for LN tuning.

An adapter is a folder with `adapter_model.safetensors` and `adapter_config.json`. It holds the norms that were tuned,
in float32 unless another dtype is asked for, and whole modules beside them, such as a task head (`also` of `prepare`;
peft's `modules_to_save`). The metadata of the tensors' file has a fingerprint of the frozen parameters: an adapter
meets no other base than its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastln.errors import FastLNError
from fastln.families import find_norms
from fastln.files import replace_files, written_whole
from fastln.plan import prepared
from fastln.processes import gathered, is_first_process, is_sharded

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
FINGERPRINT, LN_TUNING = "fastln_base", "LN_TUNING"
_PREFIX = "base_model.model."  # of every name in peft's files
_TUNED = ".ln_tuning_layers."  # between a norm's name and its parameter's
_WEIGHTS_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_N_SAMPLED = 64  # values of each parameter, in its fingerprint


@dataclass(frozen=True)
class _Adapter:
    """What a folder holds.

    Attributes:
        tensors: by the names that they have in the model.
        fingerprint: of the base's other parameters; None in a file that peft wrote.
    """

    tensors: dict[str, Tensor]
    fingerprint: str | None


def save_adapter(model: nn.Module, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write what training changed: the tuned norms, and the modules that train whole in their own dtype.

    `peft.PeftModel.from_pretrained(base, directory)` reads it, and `load_adapter`. Files appear whole or not at all.
    Of several processes (torch.distributed's, torchrun's) the first writes, the others nothing, as in
    `save_pretrained`. Where FSDP2 shards the model every one of them must call this, for it gathers the values.

    Args:
        model: a model that `prepare` was called on, with method `layernorm` (and perhaps `also`).
        directory: the folder; an adapter in it is replaced.
        dtype: of the norms' values. Half the bytes in float16 round a γ near 1 by up to 5e-4; a warning says by how
            much. A bfloat16 base takes merged values with an eighth of that precision.

    Raises:
        FastLNError: if `dtype` is none of 16 bits or more, or too narrow for a value, the model is not prepared, no
            norm of it trains, something else trains than norms and the modules in `also` (an adapter of this kind
            cannot hold it), or the folder cannot be written to, in which case what was there before is whole.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise FastLNError(f"an adapter in {dtype}: its norms can be float32, bfloat16, float16 or float64")
    state = prepared(model)
    if state is None:
        raise FastLNError(
            "this model is not prepared, so there is no telling what was tuned: save the adapter between "
            "fastln.prepare(model) and fastln.restore(model) (a model of peft's saves itself: model.save_pretrained)"
        )
    modules = state.plan.also
    inside = tuple(f"{name}." for name in modules)
    norms = [
        (name, norm)
        for name, norm in find_norms(model)
        if not f"{name}.".startswith(inside) and any(p.requires_grad for p in norm.parameters(recurse=False))
    ]
    tuned = {f"{name}.{own}": p for name, norm in norms for own, p in norm.named_parameters(recurse=False)}
    loose = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in tuned and not name.startswith(inside)
    ]
    if loose:
        raise FastLNError(
            f"an adapter holds norms and the modules named in `also`, and here {len(loose)} other parameters train "
            f"too, for example {loose[0]}: write the whole model with fastln.merge_adapter(model, directory)"
        )
    if not norms:
        raise FastLNError(
            "no norm of this model trains, and an adapter is made of norms: write the whole model with "
            "fastln.merge_adapter(model, directory)"
        )
    tensors = {
        f"{_PREFIX}{name}{_TUNED}{own}": parameter.to(dtype)
        for name, norm in norms
        for own, parameter in norm.named_parameters(recurse=False)
    }
    whole = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(inside)} if inside else {}
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in whole.items()}
    exact = {name: gathered(parameter) for name, parameter in tuned.items()}  # by all, before all but the first return
    # Copies, for safetensors takes no views of one memory, which tied weights are.
    tensors = {
        name: gathered(tensor).cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    metadata = {"format": "pt", FINGERPRINT: fingerprint(model, tuned.keys() | whole.keys())}
    config = {
        "peft_type": LN_TUNING,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "target_modules": _targets(model, [name for name, _ in norms]),
        "modules_to_save": list(modules) or None,
    }
    if not is_first_process():
        return
    written = {name: tensors[f"{_PREFIX}{_TUNED.join(name.rsplit('.', 1))}"] for name in tuned}
    for name, tensor in written.items():
        if tensor.isinf().any() and not exact[name].isinf().any():
            raise FastLNError(f"{name} has values beyond the range of {dtype}: save the adapter in a wider dtype")
    contents = {WEIGHTS: save(tensors, metadata), CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    try:
        replace_files(Path(directory), contents)
    except OSError as error:
        raise FastLNError(f"{directory}: the adapter cannot be written, and nothing there changed: {error}") from error
    _warn_of_rounding(exact, written, "a wider dtype keeps every digit")


def load_adapter(model: nn.Module, directory: str | Path, *, check_base: bool = True) -> None:
    """Put the values of an adapter, fastln's or peft's for LN tuning, into a model, in place.

    In a model that `prepare` was called on, tuned norms have float32 parameters and take every digit. Into a stock
    model of lower precision they are rounded, which a warning tells.

    Args:
        model: the base model that the adapter was trained on, prepared or stock.
        directory: the adapter's folder.
        check_base: whether the base must have the fingerprint that the adapter was saved with (one of peft's has none).

    Raises:
        FastLNError: if there is no whole adapter of this kind in the folder, its names or shapes are not the model's,
            the base is another one, or the adapter has a value for a weight that the model shares with a module which
            the adapter leaves alone. Nothing of the model has changed then.
    """
    adapter = _read(Path(directory))
    own = model.state_dict()
    for name, tensor in adapter.tensors.items():
        if name not in own:
            raise FastLNError(f"{directory}: the adapter is for another model: {type(model).__name__} has no {name}")
        if own[name].shape != tensor.shape:
            raise FastLNError(
                f"{directory}: the adapter is for another model: {name} is {(*tensor.shape,)} in it, and "
                f"{(*own[name].shape,)} in this {type(model).__name__}"
            )
    if adapter.fingerprint is None:
        logger.info(
            "%s: no fingerprint of its base in this adapter (peft writes none), so that was not checked", directory
        )
    elif check_base and adapter.fingerprint != fingerprint(model, adapter.tensors.keys()):
        raise FastLNError(
            f"{directory}: the adapter was trained on another base: the frozen weights of this model, or the answers "
            "that it chooses from, differ from those it was saved beside. Load that base, or pass check_base=False if "
            "you know that they fit"
        )
    _refuse_tied(model, directory, adapter)
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            own[name].copy_(tensor)
    _warn_of_rounding(
        adapter.tensors, own, "call fastln.prepare(model) before loading, which makes the tuned norms float32"
    )


def merge_adapter(model: PreTrainedModel, directory: str | Path) -> None:
    """Write the whole model by `save_pretrained`, tuned values in the base's dtype; the model itself stays as it is.

    Of several processes the first writes, the others nothing.

    Args:
        model: a model that `prepare` was called on, or a stock one after `load_adapter`.
        directory: the folder; a model in it is replaced once the new one is on the disk whole.

    Raises:
        FastLNError: if the model is sharded, or the folder cannot be written to, in which case what was there before is
            whole.
    """
    if is_sharded(model):
        raise FastLNError(
            f"{type(model).__name__} is sharded over processes and not written whole: save its adapter, which "
            "`fastln merge` puts into the base"
        )
    if not is_first_process():
        return
    folder = Path(directory)
    if folder.is_file():
        raise FastLNError(f"{directory}: is a file; give a folder for the model")
    try:
        with written_whole(folder) as beside:
            save_merged(model, beside)
            new = {path.name for path in beside.iterdir()}
        for path in folder.iterdir():  # of a model that was cut into other files
            if _WEIGHTS_FILE.fullmatch(path.name) and path.name not in new:
                path.unlink()
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{directory}: the model cannot be written: {error}") from error


def save_merged(model: PreTrainedModel, directory: Path) -> None:
    """Call `save_pretrained` with the tuned values in the base's dtype; a full disk can leave half a model."""
    state = prepared(model)
    dtypes: Mapping[str, torch.dtype] = {} if state is None else state.dtypes
    tuned = {name: parameter for name, parameter in model.named_parameters() if name in dtypes}
    exact = {name: parameter.data for name, parameter in tuned.items()}
    try:
        for name, parameter in tuned.items():
            parameter.data = parameter.data.to(dtypes[name])
        _warn_of_rounding(exact, tuned, "keep the adapter, which has every digit")
        model.save_pretrained(directory)
    finally:
        for name, parameter in tuned.items():
            parameter.data = exact[name]


def adapter_type(folder: Path) -> str:
    """Return which of peft's kinds the adapter in a folder is.

    Raises:
        FastLNError: if there is no readable configuration or no tensors' file in the folder.
    """
    kind = str(_config(folder).get("peft_type"))
    if not (folder / WEIGHTS).is_file():
        pickled = f" (there is {PICKLED}, a pickle, which is never read)" if (folder / PICKLED).is_file() else ""
        raise FastLNError(f"{folder}: there is no {WEIGHTS} in this folder{pickled}")
    return kind


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return a digest of the model's parameters, of their names, shapes and some values, in the precision of bfloat16.

    A checkpoint has the same one in float32 and in bfloat16. Some 64 values of each parameter are looked at: bases that
    were trained differently differ in it, ones that differ in a few values alone may not. The list of answers that a
    dual encoder chooses from counts too: the same head says other things of another list.

    Args:
        model: the model, prepared or stock.
        without: names that are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in without:
            values = gathered(parameter).reshape(-1)
            values = values[:: max(1, len(values) // _N_SAMPLED)].to("cpu", torch.bfloat16).contiguous()
            digest.update(repr((name, tuple(parameter.shape))).encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
    if answers := getattr(getattr(model, "config", None), "answers", None):
        digest.update(repr(list(answers)).encode())
    return digest.hexdigest()


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return what makes peft choose these modules and no other: names, or a pattern where one ends another name too."""
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in names)
    return names


def _read(folder: Path) -> _Adapter:
    if (kind := adapter_type(folder)) != LN_TUNING:
        raise FastLNError(f"{folder}: this is a {kind} adapter; fastln reads those for {LN_TUNING}")
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{path}: cannot be read, it is damaged or cut short: {error}") from error
    tensors = {name.removeprefix(_PREFIX).replace(_TUNED, "."): tensor for name, tensor in stored.items()}
    if not tensors:
        raise FastLNError(f"{path}: there is no tensor in this adapter")
    return _Adapter(tensors, metadata.get(FINGERPRINT))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise FastLNError(f"{folder}: there is no {CONFIG} in this folder; an adapter has one") from None
    except (OSError, ValueError) as error:
        raise FastLNError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise FastLNError(f"{path}: must be a mapping, not {type(config).__name__}")
    return config


def _refuse_tied(model: nn.Module, directory: str | Path, adapter: _Adapter) -> None:
    """Refuse a new value of a parameter that another module shares, which would change a part that stays frozen."""
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    for parameter, names in names_of.items():
        inside = [name for name in names if name in adapter.tensors]
        outside = [name for name in names if name not in adapter.tensors]
        if inside and outside and not torch.equal(adapter.tensors[inside[0]].to(parameter), parameter):
            raise FastLNError(
                f"{directory}: {inside[0]} has a value of its own in this adapter, and in this model it is one with "
                f"{outside[0]}: load the base with tie_word_embeddings=False"
            )


def _warn_of_rounding(exact: Mapping[str, Tensor], kept: Mapping[str, Tensor], advice: str) -> None:
    """Say how many values of `exact` were rounded in `kept`, and by how much."""
    n_values = n_rounded = 0
    largest = 0.0
    dtypes = set()
    for name, tensor in exact.items():
        before, after = tensor.double().cpu(), kept[name].detach().double().cpu()
        rounded = before != after
        n_values += tensor.numel()
        if rounded.any():
            n_rounded += int(rounded.sum())
            largest = max(largest, float((before - after).abs().max()))
            dtypes.add(str(kept[name].dtype).removeprefix("torch."))
    if n_rounded:
        warnings.warn(
            f"{', '.join(sorted(dtypes))} rounds {n_rounded:,} of {n_values:,} tuned values, by up to {largest:.1e}; "
            f"{advice}",
            stacklevel=3,
        )
