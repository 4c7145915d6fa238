"""A model that was prepared on the meta device gets its values later: its first forward checks that all are there.

`load_state_dict` fills what a checkpoint has. Buffers that it does not have, such as a rotary embedding's `inv_freq`,
stay on meta, and torch computes with them without an error: the results are garbage or NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastln.errors import FastLNError

_SHOWN = 4


class _Check:
    """A hook before the forward of a module, which removes itself once the module has all its values.

    Args:
        name: The module's name in the model.
        deep: Whether all that is in the module counts, or its own buffers alone.
    """

    def __init__(self, name: str, deep: bool) -> None:
        self._name, self._deep = name, deep

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Raise a `FastLNError` if real inputs meet tensors without values."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if torch.compiler.is_compiling() or (inputs and all(tensor.is_meta for tensor in inputs)):
            return  # a compiler itself refuses to mix devices
        lacking = {"buffers": [name for name, t in module.named_buffers(recurse=self._deep) if t.is_meta]}
        if self._deep:
            lacking["parameters"] = [name for name, t in module.named_parameters() if t.is_meta]
        if any("_hf_hook" in vars(part) for part in module.modules()):  # it brings the values in each call
            lacking = {}
        if any(lacking.values()):
            raise FastLNError(_describe(lacking, self._name))
        _remove(module)


def _describe(lacking: dict[str, list[str]], prefix: str) -> str:
    listed = []
    for kind, names in lacking.items():
        whole = [f"{prefix}.{name}" if prefix else name for name in names]
        more = f" and {len(whole) - _SHOWN} more" if len(whole) > _SHOWN else ""
        listed += [f"{len(whole)} {kind} ({', '.join(whole[:_SHOWN])}{more})"] if whole else []
    return (
        f"{' and '.join(listed)} of this model are still on the meta device, without values, so that results would be "
        "garbage: load parameters with load_state_dict(weights, assign=True); a checkpoint may lack buffers, so make "
        "the model under accelerate.init_empty_weights(), which gives them their values, in place of "
        "torch.device('meta'), or set them with module.register_buffer(name, values, persistent=False)"
    )


def _remove(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Check)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def add_checks(model: nn.Module) -> None:
    """Have a model with tensors on meta check its values: hooks of itself, and of the owners of its buffers.

    The owners are for callers of `model.forward`, such as peft, whom a hook of the model does not see.
    """
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return
    for name, module in model.named_modules():
        if module is model or any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.register_forward_pre_hook(_Check(name, module is model), prepend=True, with_kwargs=True)


def remove_checks(model: nn.Module) -> None:
    """Remove the checks that are still there."""
    for module in model.modules():
        _remove(module)
