"""Classes that stock modules take on while a model is prepared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastln import ops
from fastln.logits import LazyLogits


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over one dimension, computed by `fastln.ops.layer_norm`.

    A stock module becomes one by a change of its class alone, and so stays the object that it was: its parameters,
    hooks and further attributes live on, whoever holds it. What a subclass adds to `nn.LayerNorm` is out of reach
    until `to_stock`.

    γ and β may be float32 beside lower-precision input; the output has the input's dtype.
    """

    _fastln_stock: type[nn.LayerNorm]
    _fastln_backend: str

    @staticmethod
    def from_stock(norm: nn.LayerNorm, backend: str) -> None:
        """Make `norm`, which computes what `torch.nn.LayerNorm` does over one dimension, one of these, in place."""
        norm._fastln_stock, norm._fastln_backend = type(norm), backend  # type: ignore[assignment]
        norm.__class__ = LayerNorm

    @staticmethod
    def to_stock(norm: nn.LayerNorm) -> None:
        """Give `norm`, which went through `from_stock`, its own class back, in place."""
        norm.__class__ = norm._fastln_stock  # type: ignore[assignment]
        del norm._fastln_stock, norm._fastln_backend

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (..., n_cols) over its last dimension."""
        return ops.layer_norm(input, self.weight, self.bias, self.eps, backend=self._fastln_backend)


class LMHead(nn.Linear):
    """A language-model head, `torch.nn.Linear`, whose logits wait in training: see `fastln.logits.LazyLogits`.

    It changes class as `LayerNorm` does. The logits are computed at once, by the stock code, in evaluation, without
    autograd, under `torch.compile` and other transforms, and where hooks are registered on the head: they see logits,
    and may gather and release its weight around the call.
    """

    @staticmethod
    def from_stock(linear: nn.Linear) -> None:
        """Make `linear`, a `torch.nn.Linear` and no subclass, one of these, in place."""
        linear.__class__ = LMHead

    @staticmethod
    def to_stock(linear: nn.Linear) -> None:
        """Give `linear`, which went through `from_stock`, its own class back, in place."""
        linear.__class__ = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., out_features) of `input` (..., in_features)."""
        if self._may_wait(input):
            return LazyLogits.of(input, self.weight, self.bias)
        return super().forward(input)

    def _may_wait(self, input: Tensor) -> bool:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return (
            self.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch._C._are_functorch_transforms_active()
            and type(input) is Tensor  # fakes, proxies and distributed tensors are others
            and input.ndim > 1
            and all(type(parameter) is nn.Parameter for parameter in parameters)
            and any(t.requires_grad for t in (input, *parameters))
            and self.out_features > 1
            and torch.amp.is_autocast_available(input.device.type)  # not on meta tensors
            and _dtypes_fit({t.dtype for t in (input, *parameters)}, input.device.type)
            and not (self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)
        )


def _dtypes_fit(dtypes: set[torch.dtype], device: str) -> bool:
    """Whether a linear layer takes these dtypes, all being cast to the one of autocast where that is on."""
    return torch.float64 not in dtypes if torch.is_autocast_enabled(device) else len(dtypes) == 1
