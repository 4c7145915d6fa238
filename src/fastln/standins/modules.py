"""Classes that stock modules take on while a model is prepared.

A stock module becomes a stand-in by a change of its class alone (`stand_in`), and so stays the object that it was: its
parameters, hooks and further attributes live on, whoever holds it, until `stand_back` gives it its own class again.
Where a stand-in computes in one what several of its children do, and one of those has hooks, the stock code runs: the
hooks want to be called.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D as StockConv1D

from fastln import ops
from fastln.late.logits import LazyLogits
from fastln.late.rows import LazyRows
from fastln.ops import ActivationKind, NormKind, OpSettings

ATTRIBUTE = "_fastln"


@dataclass(frozen=True)
class Part:
    """What a stand-in knows beyond the stock module.

    Attributes:
        stock: The class that it had.
        backend: A name from `fastln.ops.backends.BACKENDS`.
        kind: Which norm or activation it computes; None where that needs no saying.
        dtype: Of a trained norm, what its parameters had before; None where they train in that.
    """

    stock: type[nn.Module]
    backend: str
    kind: Any = None
    dtype: torch.dtype | None = None


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def stand_in(module: nn.Module, cls: type[ModuleT], backend: str = "auto", kind: Any = None) -> ModuleT:
    """Make `module` a `cls`, in place, and return it."""
    setattr(module, ATTRIBUTE, Part(type(module), backend, kind))
    module.__class__ = cls
    assert isinstance(module, cls)
    return module


def remember_dtype(norm: nn.Module, dtype: torch.dtype) -> None:
    """Tell a stand-in for a norm which dtype its parameters had before they trained."""
    setattr(norm, ATTRIBUTE, replace(getattr(norm, ATTRIBUTE), dtype=dtype))


def is_stand_in(module: nn.Module) -> bool:
    """Whether `module` went through `stand_in`."""
    return isinstance(module.__dict__.get(ATTRIBUTE), Part)


def stand_back(model: nn.Module) -> None:
    """Give every stand-in of `model` its own class back, in place."""
    for module in model.modules():
        if is_stand_in(module):
            module.__class__ = getattr(module, ATTRIBUTE).stock
            delattr(module, ATTRIBUTE)


class Norm(nn.Module):
    """A norm with a `weight` and perhaps a `bias`, of the kind that it was found to compute."""

    _fastln: Part
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `hidden_states` (..., n_cols) over its last dimension; the output has the input's dtype."""
        _warn_if_rounded(self.weight)
        y = ops.dropout_add_norm(
            *(hidden_states, None, self.weight, getattr(self, "bias", None), self._fastln.kind),
            settings=OpSettings(self._fastln.backend),
        )
        assert isinstance(y, Tensor)
        return y.to(output_dtype(hidden_states, self._fastln.dtype))


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over one dimension, computed by `fastln.ops.layer_norm`.

    γ and β may be float32 beside lower-precision input; the output has the input's dtype.
    """

    _fastln: Part

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (..., n_cols) over its last dimension."""
        _warn_if_rounded(self.weight)
        y = ops.layer_norm(input, self.weight, self.bias, self.eps, settings=OpSettings(self._fastln.backend))
        return y.to(output_dtype(input, self._fastln.dtype))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that stores no mask."""

    _fastln: Part

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input`, of any shape, in training."""
        return _dropout(input, self.p, self.training, self.inplace, settings=OpSettings(self._fastln.backend))


class CallsDropout(nn.Module):
    """A module of any stock class whose code calls `torch.nn.functional.dropout`, which stores no mask then.

    The stock code runs as it is, and under `torch.compile` in the same graph; what it calls `dropout` is fastln's.
    Made by `calls_dropout`.
    """

    _fastln: Part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stock module does."""
        with _WithoutMasks(self._fastln.backend):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # No module holds the class by its name, so copies and pickles name what it is made of.
        return _new_like, (self._fastln.stock,), self.__dict__


def calls_dropout(stock: type[nn.Module]) -> type[CallsDropout]:
    """Return the subclass of `stock`, of the same name, that is `CallsDropout`; always the same one."""
    if stock not in _CALLS_DROPOUT:
        names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
        _CALLS_DROPOUT[stock] = type(stock.__name__, (CallsDropout, stock), names)
    return _CALLS_DROPOUT[stock]


_CALLS_DROPOUT: dict[type[nn.Module], type[CallsDropout]] = {}


def _new_like(stock: type[nn.Module]) -> nn.Module:
    cls = calls_dropout(stock)
    return cls.__new__(cls)


class _WithoutMasks(TorchFunctionMode):
    """Inside it `torch.nn.functional.dropout` is `fastln.ops.dropout`."""

    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            return _dropout(*args, **(kwargs or {}), settings=OpSettings(self.backend))
        return func(*args, **(kwargs or {}))


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, settings: OpSettings
) -> Tensor:
    """`torch.nn.functional.dropout`, with its defaults, without a mask where it drops some elements but not all."""
    if not training or p in (0, 1) or inplace or not input.ndim:
        return F.dropout(input, p, training, inplace)
    return ops.dropout(input, p, settings=settings)


class DenseDropoutAddNorm(nn.Module):
    """The end of a post-norm block: `LayerNorm(dropout(dense(x)) + residual)`, of which x_hat alone is kept."""

    _fastln: Part
    dense: nn.Module
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return what the stock module does.

        Args:
            hidden_states: (..., n_in), what the block computed.
            input_tensor: (..., n_cols), the residual.
        """
        norm = self.LayerNorm
        if not unwatched(norm, self.dropout):
            return self._fastln.stock.forward(self, hidden_states, input_tensor)
        _warn_if_rounded(norm.weight)
        y = ops.dropout_add_norm(
            *(self.dense(hidden_states), input_tensor, norm.weight, norm.bias, NormKind(norm.eps)),
            dropout=self.dropout.p if self.dropout.training else 0.0,
            settings=OpSettings(self._fastln.backend),
        )
        assert isinstance(y, Tensor)
        return y


class Activation(nn.Module):
    """An activation, computed by `fastln.ops.activation`, which keeps one tensor."""

    _fastln: Part

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation to `input`, of any shape."""
        return ops.activation(input, self._fastln.kind, settings=OpSettings(self._fastln.backend))


class GatedMLP(nn.Module):
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`, which keeps the results of its first two projections alone."""

    _fastln: Part
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return what the stock module does of `x` (..., n_cols)."""
        if not unwatched(self.act_fn):
            return self._fastln.stock.forward(self, x)
        kind: ActivationKind = self._fastln.kind
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.gated_activation(gate, up, kind, settings=OpSettings(self._fastln.backend)))


class Linear(nn.Linear):
    """`torch.nn.Linear` whose weight is frozen, computed by `fastln.ops.linear`."""

    _fastln: Part

    def forward(self, input: Tensor) -> Tensor:
        """Return what the stock module does of `input` (..., in_features)."""
        return ops.linear(input, self.weight, self.bias, settings=OpSettings(self._fastln.backend))


class Conv1D(StockConv1D):
    """GPT-2's linear layer, whose frozen weight is (in_features, out_features), computed by `fastln.ops.linear`."""

    _fastln: Part

    def forward(self, x: Tensor) -> Tensor:
        """Return what the stock module does of `x` (..., in_features)."""
        return ops.linear(x, self.weight, self.bias, transpose=False, settings=OpSettings(self._fastln.backend))


class LMHead(nn.Linear):
    """A language-model head, `torch.nn.Linear`, whose logits wait in training: see `fastln.late.logits.LazyLogits`.

    The logits are computed at once, by the stock code, in evaluation, without autograd, under `torch.compile` and other
    transforms, and where hooks are registered on the head: they see logits, and may gather and release its weight
    around the call.
    """

    _fastln: Part

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., out_features) of `input` (..., in_features)."""
        if self._may_wait(input):
            return LazyLogits.of(input, self.weight, self.bias)
        return super().forward(input)

    def _may_wait(self, input: Tensor) -> bool:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return (
            self.training
            and may_be_late(input)
            and all(type(parameter) is nn.Parameter for parameter in parameters)
            and any(t.requires_grad for t in (input, *parameters))
            and self.out_features > 1
            and _dtypes_fit({t.dtype for t in (input, *parameters)}, input.device.type)
            and unwatched(self)
        )


def may_be_late(x: Tensor) -> bool:
    """Whether what is made of `x` may be computed after the module that makes it has returned."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and type(x) in (Tensor, LazyRows)  # fakes, proxies and distributed tensors are others
        and x.ndim > 1
        and torch.amp.is_autocast_available(x.device.type)  # not on meta tensors
    )


def unwatched(*modules: nn.Module) -> bool:
    """Whether no module has hooks of its own."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


def output_dtype(x: Tensor, stock: torch.dtype | None) -> torch.dtype:
    """The dtype that the model expects of a norm of `x` whose parameters had the dtype `stock` before they trained.

    It is that of `x`, but where code casts to the dtype of the norm's weight (Mamba's does), which is float32 now.
    """
    return stock if stock is not None and x.dtype == torch.float32 else x.dtype


def _warn_if_rounded(weight: Tensor | None) -> None:
    """Say that somebody has cast a trained norm, which `prepare` had made float32."""
    if weight is None or not weight.requires_grad or weight.dtype.itemsize >= 4 or torch.compiler.is_compiling():
        return
    warnings.warn(
        f"a trained norm has {weight.dtype} parameters, in which steps of 1e-4 on a weight of 1.0 round to nothing: "
        "the model was cast after fastln.prepare(); restore it, and prepare it again",
        stacklevel=3,
    )


def _dtypes_fit(dtypes: set[torch.dtype], device: str) -> bool:
    """Whether a linear layer takes these dtypes, all being cast to the one of autocast where that is on."""
    return torch.float64 not in dtypes if torch.is_autocast_enabled(device) else len(dtypes) == 1
