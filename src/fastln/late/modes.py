"""The torch modes that a late tensor is computed under: those that were active when it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor


class Modes:
    """The current autocast mode and hooks on saved tensors.

    Hooks that were added since, such as a checkpoint's, are left out. The checkpoint's second forward pass finds the
    late tensor already computed, so its first pass must not see the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.autocast = _autocast(device)
        self._hooks = _hooks()

    def last(self) -> bool:
        """Whether the modes are still the same, apart from removed hooks."""
        hooks = _hooks()
        return self.autocast == _autocast(self.device) and hooks == self._hooks[: len(hooks)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Switch back to these modes, with autograd on."""
        enabled, dtype = self.autocast
        hooks = _pop_hooks()
        common = takewhile(lambda pair: pair[0] == pair[1], zip(hooks, self._hooks, strict=False))
        _push_hooks([hook for hook, _ in common])
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self.device.type, dtype, enabled):
                yield
        finally:
            _pop_hooks()
            _push_hooks(hooks)


_Hooks = list[tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]]


def _hooks() -> _Hooks:
    hooks = _pop_hooks()
    _push_hooks(hooks)
    return hooks


def _pop_hooks() -> _Hooks:
    """Remove the hooks on saved tensors, and return them, outermost first."""
    found: _Hooks = []
    while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        found.append(pair)
    return found[::-1]


def _push_hooks(hooks: _Hooks) -> None:
    for pair in hooks:
        torch._C._autograd._push_saved_tensors_default_hooks(*pair)


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
