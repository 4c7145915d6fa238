"""Tensors that are computed when somebody needs them: what logits and rows that wait have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from fastln.errors import FastLNError


class LateTensor(Tensor):
    """A tensor that is yet to be computed.

    Calls from Python may leave it so (`_later`); any other works on what it stands for, computed once. What Python's
    calls do not show, such as the arguments of an `autograd.Function`, meets it below autograd.
    """

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        writes = _writes(func, args, kwargs)
        result = None if writes else cls._later(func, args, kwargs)
        if result is not None:
            return result
        args, kwargs = tree_map_only(cls, lambda late: late._compute(writes), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise FastLNError(f"{func} would write into what fastln has not computed; pass it a clone")
        # Computed with their history even here, as the dispatcher gives Python the state back that the call began in.
        args, kwargs = tree_map_only(cls, lambda late: late._compute().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def _later(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call is with nothing more computed than it takes, or None where all must be."""
        raise NotImplementedError

    def _compute(self, writes: bool = False) -> Tensor:
        """Return it, computed, with its autograd history; `writes` says that it is about to be written into."""
        raise NotImplementedError


class Modes:
    """What torch's modes are where rows begin to wait, for them to be computed under the same.

    Hooks on saved tensors that came on since, such as a checkpoint's, are not for them: what the checkpoint computes
    again has these rows as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.autocast = _autocast(device)
        self._hooks = _hooks()

    def last(self) -> bool:
        """Whether they are the same now, but for hooks that went."""
        hooks = _hooks()
        return self.autocast == _autocast(self.device) and hooks == self._hooks[: len(hooks)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Bring them back; autograd is on."""
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
    """Take the hooks on saved tensors off, and return them, the outermost first."""
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


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into an argument."""
    if kwargs.get("inplace") or (func in _IN_PLACE_AT and any(args[_IN_PLACE_AT[func] :])):
        return True
    name = getattr(func, "__name__", "")
    return "out" in kwargs or name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE_AT = {F.relu: 1, F.silu: 1, F.dropout: 3}  # where the argument is that says so

# What the wrapper itself knows.
_PROPERTIES = "shape dtype device layout ndim requires_grad is_leaf is_cpu is_cuda is_meta is_nested is_sparse _version"
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.__len__),
    *(Tensor.is_contiguous, Tensor.is_floating_point, torch.is_floating_point),
}
