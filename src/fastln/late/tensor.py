"""The base of late tensors: how torch's calls reach them, and a check of what must not change before they are computed.

`docs/late-tensors.md` explains late tensors on one page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from fastln.errors import FastLNError


@dataclass(frozen=True, eq=False)
class Call:
    """A call of `func` that can be repeated with other tensors at `places` among the arguments."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: tuple[int, ...] = (0,)

    def open_at(self, *places: int) -> Call:
        """Return the call without the arguments at `places`."""
        args = tuple(None if i in places else value for i, value in enumerate(self.args))
        return replace(self, args=args, places=places)

    def __call__(self, *values: Tensor) -> Any:
        """Make the call with `values` at its places."""
        args = list(self.args)
        for place, value in zip(self.places, values, strict=True):
            args[place] = value
        return self.func(*args, **self.kwargs)


class LateTensor(Tensor):
    """A tensor that is computed when it is read.

    torch's calls reach it in two places. Calls from Python reach `__torch_function__`, above autograd. There a rule may
    answer with another late tensor (`_later`); every other call gets the computed tensor, with its autograd history.
    Uses that do not pass there, such as the arguments of an `autograd.Function`, reach `__torch_dispatch__`, below
    autograd. For them the late tensor has its own `grad_fn`.

    The graph of a loss may contain that `grad_fn`, and must not keep alive what the loss does not need. So `_held`, a
    list that the tensor and its `grad_fn` share, stays empty until the tensor is read: only then may it get a gradient.
    """

    _held: list[Any]

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
        result = None if writes else cls._later(Call(func, args, kwargs))
        if result is not None:
            return result
        args, kwargs = tree_map_only(cls, lambda late: late._read(writes), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise FastLNError(f"{func} would write into what fastln has not computed; pass it a clone")
        args, kwargs = tree_map_only(cls, lambda late: late._read().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def _later(cls, call: Call) -> Any:
        """Return the result of a call without computing everything, or None if the call needs the computed tensor."""
        raise NotImplementedError

    def _compute(self, writes: bool = False) -> Tensor:
        """Return the computed tensor with its autograd history; `writes` says that the caller will write to it."""
        raise NotImplementedError

    def _source(self) -> Any:
        """Return the objects that the gradient of this tensor is computed from."""
        raise NotImplementedError

    def _read(self, writes: bool = False) -> Tensor:
        self._held[:] = [self._source()]
        return self._compute(writes)

    @classmethod
    def _wrapper(cls, twin: Tensor, device: torch.device) -> Tensor:
        """Return a tensor without memory, with the shape, strides and dtype of `twin`, which is on meta."""
        strides, offset = twin.stride(), twin.storage_offset()
        return Tensor._make_wrapper_subclass(
            cls, twin.shape, strides, storage_offset=offset, dtype=twin.dtype, device=device
        )


class Unwritten:
    """Tensors that must not change until a late tensor has been computed from them.

    Optimizers with `fused=True` write without raising a tensor's version. So the first row and column of every trained
    matrix are also kept and compared.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [(tensor, tensor._version, _edges(tensor)) for tensor in tensors]

    def check(self) -> None:
        """Raise a `FastLNError` if one of the tensors was written to."""
        for tensor, version, edges in self._tensors:
            if tensor._version != version or not _same(_edges(tensor), edges):
                raise FastLNError(
                    f"a late tensor cannot be computed any more: a tensor {(*tensor.shape,)} that it is made of has "
                    "been written to since the forward pass; read it before optimizer.step(), or use "
                    'fastln.prepare(model, ..., without=("late_logits", "late_rows"))'
                )


def _edges(tensor: Tensor) -> Tensor | None:
    if not tensor.requires_grad or not tensor.is_leaf or tensor.ndim < 2 or not tensor.numel():
        return None
    return torch.cat([tensor.detach()[0].flatten(), tensor.detach()[..., 0].flatten()])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def as_it_is_now(tensor: Tensor) -> Tensor:
    """Return a copy, with history, of a trained vector (a norm's γ or β, a bias); return other tensors unchanged.

    An optimizer may step before the late tensor is read. Its values must still be those of the forward pass.
    """
    return tensor.clone() if tensor.requires_grad and tensor.is_leaf and tensor.ndim <= 1 else tensor


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes to an argument."""
    if kwargs.get("inplace") or (func in _IN_PLACE_AT and any(args[_IN_PLACE_AT[func] :])):
        return True
    name = getattr(func, "__name__", "")
    return "out" in kwargs or name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE_AT = {F.relu: 1, F.silu: 1, F.dropout: 3}  # the place of the argument `inplace`

GRAD = vars(torch._C.TensorBase)["grad"]
OF_GRADIENTS = {Tensor.retain_grad, Tensor.register_hook, torch.autograd.grad, torch.autograd.backward}
"""The functions with which a caller asks for the gradient of a tensor."""


def asks_for_gradient(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call asks for a tensor's gradient; a hook of torch.distributed, which FSDP2 sets on every output, does
    not.
    """
    hook = args[1] if func is Tensor.register_hook and len(args) > 1 else None
    return func in OF_GRADIENTS and not str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


# The properties and methods that need no computed values.
_PROPERTIES = "shape dtype device layout ndim requires_grad is_leaf is_cpu is_cuda is_meta is_nested is_sparse _version"
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    Tensor.size,
    Tensor.stride,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    torch.is_floating_point,
}
