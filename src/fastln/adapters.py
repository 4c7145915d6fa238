"""Adapters: a model's tuned norms in a file of some hundred kilobytes, in peft's layout for LN tuning.

An adapter is a folder with `adapter_model.safetensors` and `adapter_config.json`. It holds the tuned norms, in float32
by default, and the modules that train in full, such as a task head (`also` of `prepare`; peft's `modules_to_save`). The
tensors' file has a fingerprint of the frozen parameters, so that an adapter is never put on another base.

A weight that several modules share, such as tied word embeddings, belongs to the first of them in the model's order. To
train it, name that module in `also`. It then trains in all of them, and the adapter holds each of these modules.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastln.changes import EXTRA, changed_buffers, extra_states, load_extra_states, mark_buffers
from fastln.errors import FastLNError
from fastln.files import replace_files, user_path
from fastln.fingerprint import FINGERPRINT, check_has_values, difference, fingerprint, vocabulary_differs
from fastln.methods import RANDOM_HEADS, norm_parameters
from fastln.origin import ORIGIN, Origin, absolute, origin_bytes
from fastln.processes import gathered, is_first_process, own_class
from fastln.rounding import warn_of_rounding
from fastln.state import prepared

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
LN_TUNING = "LN_TUNING"
TRAINED = "trained.safetensors"
"""What no adapter can hold of the values in a checkpoint, by their plain names."""
WHOLE = "model.safetensors"
"""The same if everything trains, which makes it a whole model."""
PARTS = (
    "none: these are values that no adapter can hold; load the base with from_pretrained, then call "
    "fastln.load_adapter(base, folder)"
)
"""Stands in place of peft's type where a checkpoint holds such values, so that loaders say it."""
PEFT_PREFIX = "base_model.model."  # what peft's wrapper puts before every name, in models and in files
TUNED = ".ln_tuning_layers."  # between a norm's name and its parameter's


@dataclass(frozen=True)
class _Adapter:
    """The contents of an adapter's folder.

    Attributes:
        tensors: the tensors, by their names in the model.
        fingerprint: the fingerprint of the base's other parameters; None in a file that peft wrote.
    """

    tensors: dict[str, Tensor]
    fingerprint: str | None


class NoAdapterError(FastLNError):
    """No adapter can hold what trains; the message says why."""


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    origin: Origin | None = None,
) -> None:
    """Write what training changed: the tuned norms, and the modules that train in full, in their own dtype.

    Buffers that changed since `prepare`, such as a batch norm's statistics, are written too. `load_adapter`,
    `peft.PeftModel.from_pretrained(base, directory)` and, for a base that was loaded from a directory or the hub,
    `peft.AutoPeftModel.from_pretrained(directory)` read it. The files appear complete or not at all. With several
    processes (torch.distributed, torchrun) only the first writes, as in `save_pretrained`. If FSDP2 shards the model,
    every process must call this function, because it gathers the values.

    Args:
        model: a model that `prepare` was called on, with method `layernorm` (and perhaps `also`).
        directory: the folder; an adapter in it is replaced.
        dtype: dtype of the norms' values; None for their own. float16 takes half the bytes and rounds a γ near 1 by up
            to 5e-4; a warning says by how much. Values merged into a bfloat16 base have an eighth of that precision.
        origin: what the base is, for `fastln eval` and `fastln merge`; by default only where it was loaded from.

    Raises:
        FastLNError: if `dtype` has fewer than 16 bits or is too narrow for a value, if the model is not prepared, if no
            norm trains, if something trains that this kind of adapter cannot hold (it holds norms and the modules in
            `also`), or if the folder cannot be written to. An earlier adapter in the folder is then still complete.
    """
    directory = user_path(directory)
    contents = adapter_contents(model, dtype, origin)
    if not is_first_process():
        return
    try:
        replace_files(directory, contents)
        for name in {ORIGIN, EXTRA} - contents.keys():  # of an earlier adapter
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise FastLNError(f"{directory}: the adapter cannot be written, and nothing there changed: {error}") from error


def adapter_contents(model: nn.Module, dtype: torch.dtype | None, origin: Origin | None) -> dict[str, bytes]:
    """Return the contents of an adapter's files, by name; the arguments and errors are those of `save_adapter`."""
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise FastLNError(f"an adapter in {dtype}: its norms can be float32, bfloat16, float16 or float64")
    modules, tuned = _what_trains(model)
    inside = _prefixes(modules)
    stored_as = {name: f"{PEFT_PREFIX}{TUNED.join(name.rsplit('.', 1))}" for name in tuned}
    tensors = {stored_as[name]: parameter.to(dtype or parameter.dtype) for name, parameter in tuned.items()}
    whole = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name.startswith(inside) and isinstance(value, Tensor)
    }
    state = prepared(model)
    moved = changed_buffers(model, None if state is None else state.buffers)
    whole |= {name: buffer for name, buffer in moved.items() if not name.startswith(inside)}
    tensors |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in whole.items()}
    # Every process gathers; then all but the first return.
    exact = {name: gathered(parameter) for name, parameter in tuned.items()}
    # Copies, because safetensors refuses views of shared memory, such as tied weights.
    tensors = {
        name: gathered(tensor).cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    metadata = {"format": "pt", FINGERPRINT: fingerprint(model, tuned.keys() | whole.keys())}
    if not is_first_process():
        return {}
    written = {name: tensors[stored_as[name]] for name in tuned}
    for name, tensor in written.items():
        if tensor.isinf().any() and not exact[name].isinf().any():
            raise FastLNError(f"{name} has values beyond the range of {dtype}: save the adapter in a wider dtype")
    warn_of_rounding(exact, written, "a wider dtype keeps every digit", stacklevel=4)
    config = _configuration(model, origin) | {
        "peft_type": LN_TUNING,
        "target_modules": _targets(model, list(dict.fromkeys(map(_owner, tuned)))),
        "modules_to_save": list(_callable_parts(model, modules)) or None,
    }
    contents = {WEIGHTS: save(tensors, metadata), CONFIG: _json(config)}
    if origin is not None:
        contents[ORIGIN] = origin_bytes(origin)
    if (states := extra_states(model)) is not None:
        contents[EXTRA] = states
    return contents


def parts_configuration(model: nn.Module, origin: Origin | None) -> bytes:
    """Return the configuration beside trained values that no adapter can hold: every loader's error shows `PARTS`."""
    return _json(_configuration(model, origin) | {"peft_type": PARTS})


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _configuration(model: nn.Module, origin: Origin | None) -> dict[str, Any]:
    base = own_class(model)
    return {
        "auto_mapping": {"base_model_class": base.__name__, "parent_library": base.__module__},
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": (origin and origin.source) or name_or_path(model),
    }


def _what_trains(model: nn.Module) -> tuple[list[str], dict[str, nn.Parameter]]:
    """Return the modules that train in full, and the parameters of the other norms that train.

    Raises:
        FastLNError: as in `save_adapter`.
    """
    state = prepared(model)
    if state is None:
        raise NoAdapterError(
            "this model is not prepared, so fastln does not know what was tuned: save the adapter between "
            "fastln.prepare(model) and fastln.restore(model) (a peft model saves itself: model.save_pretrained)"
        )
    modules = _with_sharers(model, state.plan.also)
    inside = _prefixes(modules)
    names = [name for name in norm_parameters(model) if not name.startswith(inside)]
    norms = {_owner(name) for name in names if model.get_parameter(name).requires_grad}
    tuned = {name: model.get_parameter(name) for name in names if _owner(name) in norms}
    loose = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in tuned and not name.startswith(inside)
    ]
    if loose:
        raise NoAdapterError(
            f"an adapter holds norms and the modules named in `also`, but {len(loose)} other parameters train too, for "
            f"example {loose[0]}: write the whole model with fastln.merge_adapter(model, directory)"
        )
    if not norms:
        raise NoAdapterError(
            "no norm of this model trains, and an adapter is made of norms: write the whole model with "
            "fastln.merge_adapter(model, directory)"
        )
    return modules, tuned


def load_adapter(model: nn.Module, directory: str | Path, *, check_base: bool = True) -> None:
    """Load an LN-tuning adapter, fastln's or peft's, into a model, in place.

    In a prepared model the tuned norms have float32 parameters and keep the exact values. A stock model of lower
    precision rounds them, and a warning says so.

    Args:
        model: the base model that the adapter was trained on, prepared or stock.
        directory: the adapter's folder.
        check_base: whether the base must have the fingerprint that the adapter was saved with (peft writes none).

    Raises:
        FastLNError: if the folder holds no complete adapter of this kind, if its names or shapes do not fit the model,
            if the base is a different one, or if the adapter has several values for one weight that modules of
            this model share. The model is then unchanged.
    """
    directory = user_path(directory)
    adapter = _read(directory)
    own = model.state_dict(keep_vars=True)
    for name, tensor in adapter.tensors.items():
        if name in own:
            check_has_values(name, own[name])
        elif ".lora_" in name:
            raise FastLNError(
                f"{directory}: this checkpoint holds LoRA layers beside norms, which no stock model has; fastln eval "
                "and fastln merge read it"
            )
        if name not in own:
            raise FastLNError(f"{directory}: the adapter is for another model: {type(model).__name__} has no {name}")
        if own[name].shape != tensor.shape:
            resized = vocabulary_differs(adapter.fingerprint, model)
            raise FastLNError(
                f"{directory}: the adapter is for another model: "
                + (
                    resized
                    or f"{name} is {(*tensor.shape,)} in it, and {(*own[name].shape,)} in this {type(model).__name__}"
                )
            )
    if adapter.fingerprint is None:
        logger.info("%s: the base is not checked: peft writes no fingerprint of it into an adapter", directory)
    elif check_base and (differs := difference(adapter.fingerprint, model, adapter.tensors.keys())) is not None:
        raise FastLNError(
            f"{directory}: the adapter was trained on another base: {differs}. Load that base, or pass "
            "check_base=False if you know that they fit"
        )
    frozen = _frozen_sharers(model, directory, adapter.tensors)
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name not in frozen}
    mark_buffers(model)  # as the base has them, so that an adapter saved later holds those of this one
    load_extra_states(model, Path(directory))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    warn_of_rounding(tensors, own, "call fastln.prepare(model) before loading, which makes the tuned norms float32")
    _tell_frozen(model, directory, tensors)


def _tell_frozen(model: nn.Module, directory: str | Path, tensors: Collection[str]) -> None:
    """Warn of values in a prepared model that the adapter trained, and that would not train here."""
    state = prepared(model)
    if state is None or RANDOM_HEADS in state.plan.without:  # who leaves heads frozen knows it, as `fastln merge` does
        return
    frozen = [name for name, p in model.named_parameters() if name in tensors and not p.requires_grad]
    if owners := list(dict.fromkeys(_owner(name) for name in frozen)):
        logger.warning(
            "%s: %s%s got the adapter's values but stay frozen, and save_adapter would leave them out: prepare the "
            "model with the `also` and `scope` that the adapter was trained with",
            directory,
            ", ".join(owners[:3]),
            f" and {len(owners) - 3} more" if len(owners) > 3 else "",
        )


def adapter_type(folder: Path) -> str:
    """Return peft's type of the adapter in a folder.

    Raises:
        FastLNError: if the folder has no readable configuration or no file of tensors.
    """
    if (folder / WHOLE).is_file() and (folder / ORIGIN).is_file():  # a checkpoint in which everything trains
        return PARTS
    kind = str(_config(folder).get("peft_type"))
    if not any((folder / name).is_file() for name in (WEIGHTS, TRAINED)):
        pickled = f" (it has {PICKLED}, a pickle, which fastln never reads)" if (folder / PICKLED).is_file() else ""
        raise FastLNError(f"{folder}: there is no {WEIGHTS} in this folder{pickled}")
    return kind


def named_class(folder: Path) -> str | None:
    """Return the name of the class that the adapter or checkpoint in a folder is for; None if it does not say."""
    if (folder / CONFIG).is_file():
        return (_config(folder).get("auto_mapping") or {}).get("base_model_class")
    path = folder / "config.json"
    return (json.loads(path.read_text(encoding="utf-8")).get("architectures") or [None])[0] if path.is_file() else None


def named_base(folder: Path) -> str | None:
    """Return where the base of the adapter in a folder came from; None if its configuration does not say."""
    return _config(folder).get("base_model_name_or_path") if (folder / CONFIG).is_file() else None


def _owner(name: str) -> str:
    """Return the name of the module that owns this parameter; empty for the model itself."""
    return name.rpartition(".")[0]


def _callable_parts(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Yield the modules of these names; in place of a list or dict of modules, which peft refuses, its parts."""
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield from _callable_parts(model, (f"{name}.{part}" for part, _ in module.named_children()))
        else:
            yield name


def _prefixes(modules: Collection[str]) -> tuple[str, ...]:
    """Return the name prefixes of everything inside these modules."""
    return tuple(f"{name}." for name in modules)


def _shared(model: nn.Module) -> list[list[str]]:
    """Return all names of each parameter that has several; the name that the model lists comes first."""
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    return [names for names in names_of.values() if len(names) > 1]


def _with_sharers(model: nn.Module, also: Collection[str]) -> list[str]:
    """Return the modules that train in full, and those that share a trained weight with them.

    Raises:
        FastLNError: if the model itself holds such a weight, outside its modules: an adapter has no name for it.
    """
    modules = list(also)
    for names in _shared(model):
        if names[0].startswith(_prefixes(also)):
            for owner in (_owner(name) for name in names if not name.startswith(_prefixes(modules))):
                if not owner:
                    raise NoAdapterError(
                        f"{names[0]} trains and is also a parameter of the model itself, which no adapter can hold: "
                        "write the whole model with fastln.merge_adapter(model, directory)"
                    )
                if owner not in modules:
                    modules.append(owner)
    return modules


def _frozen_sharers(model: nn.Module, directory: str | Path, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the adapter's tensors that are unchanged weights of modules that it does not train.

    Raises:
        FastLNError: if the adapter has a new value for such a weight, or two values for one weight.
    """
    frozen: set[str] = set()
    for names in _shared(model):
        inside = [name for name in names if name in tensors]
        outside = [name for name in names if name not in tensors]
        if not inside:
            continue
        first = tensors[inside[0]]
        apart = [name for name in inside if not torch.equal(tensors[name], first)]
        if not apart and outside:
            if _equal(first, model.get_parameter(names[0])):
                frozen.update(inside)
            else:
                apart = outside
        if apart:
            raise FastLNError(
                f"{directory}: {inside[0]} has a value of its own in this adapter, but this model shares it with "
                f"{apart[0]}: load the base with tie_word_embeddings=False"
            )
    return frozen


def _equal(stored: Tensor, parameter: Tensor) -> bool:
    """Whether two tensors are equal in the dtype of one of them, because the bases may have different dtypes."""
    stored = stored.to(parameter.device)
    return torch.equal(stored.to(parameter.dtype), parameter) or torch.equal(stored, parameter.to(stored.dtype))


def name_or_path(model: nn.Module) -> str | None:
    """Return where the base was loaded from, a directory as an absolute path; None if that is not known."""
    named = (vars(model).get("name_or_path"), getattr(getattr(model, "config", None), "name_or_path", None))
    return next((absolute(name) for name in named if name), None)


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return what makes peft choose only these modules: names, or a pattern if one name is also the end of another."""
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in names)
    return names


def _read(folder: Path) -> _Adapter:
    kind = adapter_type(folder)
    if kind not in (LN_TUNING, PARTS):
        raise FastLNError(f"{folder}: this is a {kind} adapter; load_adapter reads {LN_TUNING} adapters")
    stored: dict[str, Tensor] = {}
    fingerprint = None
    for path in (folder / name for name in (WEIGHTS, TRAINED, WHOLE)):
        if path.is_file():
            tensors, metadata = read_tensors(path)
            stored |= tensors
            fingerprint = metadata.get(FINGERPRINT, fingerprint)  # the last knows what all of them hold
    tensors = {name.removeprefix(PEFT_PREFIX).replace(TUNED, "."): tensor for name, tensor in stored.items()}
    if not tensors:
        raise FastLNError(f"{folder}: there is no tensor in this adapter")
    return _Adapter(tensors, fingerprint)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        FastLNError: if it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{path}: cannot be read, it is damaged or cut short: {error}") from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.is_dir():
            raise FastLNError(f"{folder}: is no folder") from None
        inner = folder / "adapter"  # as `fastln train` names it
        hint = f"; {inner} is an adapter" if (inner / CONFIG).is_file() else "; an adapter has one"
        raise FastLNError(f"{folder}: there is no {CONFIG} in this folder{hint}") from None
    except (OSError, ValueError) as error:
        raise FastLNError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise FastLNError(f"{path}: must be a mapping, not {type(config).__name__}")
    return config
