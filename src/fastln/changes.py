"""Finds what training changes beside the trained parameters: batch norms' statistics, moving averages, counters, ranks.

Before training, the values of buffers and frozen parameters are marked by a digest. Afterwards those whose digest
differs have changed, whatever changed them. Adapters and checkpoints hold them too; constants stay with the base.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastln.errors import FastLNError

EXTRA = "extra_state.pt"
"""The file of what modules return from `get_extra_state`, where there are such modules."""

_ALL_BYTES = 1 << 20  # larger tensors are sampled
_N_SAMPLED = 4096

Marks = dict[str, str]
"""The digests of tensors' values, by name."""
_MARKED: WeakKeyDictionary[nn.Module, Marks] = WeakKeyDictionary()


def marks(tensors: Iterable[tuple[str, Tensor]]) -> Marks:
    """Return a digest of each tensor: of all its values, or of some thousand in a tensor of more than a megabyte."""
    return {name: _mark(tensor) for name, tensor in tensors}


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that are part of the model's `state_dict`, by name."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.removeprefix(f"{prefix}.") not in module._non_persistent_buffers_set:
                yield name, buffer


def frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that do not train, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)


def mark_buffers(model: nn.Module) -> Marks:
    """Mark the values of the model's buffers, unless they are marked already, and return the marks."""
    if model not in _MARKED:
        _MARKED[model] = marks(buffers(model))
    return _MARKED[model]


def changed_buffers(model: nn.Module, before: Marks | None = None) -> dict[str, Tensor]:
    """Return the buffers that changed.

    Args:
        model: the model.
        before: the marks to use if `mark_buffers` was not called for this very object, such as a copy.
    """
    before = _MARKED.get(model, before)
    return {} if before is None else changed(buffers(model), before)


def changed(tensors: Iterable[tuple[str, Tensor]], before: Marks) -> dict[str, Tensor]:
    """Return those of `tensors` whose values are not those of `before`."""
    return {name: tensor.detach() for name, tensor in tensors if before.get(name) != _mark(tensor)}


def extra_states(model: nn.Module) -> bytes | None:
    """Return the contents of the file `EXTRA`; None if no module has an extra state."""
    states = {name: module.get_extra_state() for name, module in model.named_modules() if _has_extra(module)}
    if not states:
        return None
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return buffer.getvalue()


def load_extra_states(model: nn.Module, folder: Path) -> None:
    """Give the modules the extra states in a folder; do nothing if it has none.

    Raises:
        FastLNError: if the file cannot be read (only tensors and plain Python values are), or is of other modules.
    """
    path = folder / EXTRA
    if not path.is_file():
        return
    try:
        states = dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise FastLNError(
            f"{path}: cannot be read; fastln reads tensors and plain Python values from pickles, nothing else: {reason}"
        ) from error
    modules = {name: module for name, module in model.named_modules() if _has_extra(module)}
    if odd := sorted(states.keys() ^ modules.keys()):
        raise FastLNError(f"{path}: it is from another model: extra states differ, for example of {odd[0]!r}")
    for name, state in states.items():
        modules[name].set_extra_state(state)


def _has_extra(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _mark(tensor: Tensor) -> str:
    tensor = tensor.detach()
    if tensor.is_meta:
        return "meta"
    values = tensor.reshape(-1)
    if values.nbytes > _ALL_BYTES:
        values = values[:: max(1, len(values) // _N_SAMPLED)]
    content = values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{(*tensor.shape,)} {hashlib.blake2b(content, digest_size=16).hexdigest()}"
