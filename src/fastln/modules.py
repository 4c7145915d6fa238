"""Classes that stock modules take on while a model is prepared."""

from __future__ import annotations

from torch import Tensor, nn

from fastln import ops


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


class Activation(nn.Module):
    """An activation, computed by `fastln.ops.activation`.

    As with `LayerNorm`, a stock module becomes one by a change of its class alone.
    """

    _fastln_stock: type[nn.Module]
    _fastln_kind: ops.ActivationKind
    _fastln_backend: str

    def __init__(self, kind: ops.ActivationKind, backend: str = "auto") -> None:
        super().__init__()
        self._fastln_kind, self._fastln_backend = kind, backend

    @staticmethod
    def from_stock(activation: nn.Module, kind: ops.ActivationKind, backend: str) -> None:
        """Make `activation`, which computes what `kind` names, one of these, in place."""
        activation._fastln_stock = type(activation)  # type: ignore[assignment]
        activation._fastln_kind, activation._fastln_backend = kind, backend  # type: ignore[assignment]
        activation.__class__ = Activation

    @staticmethod
    def to_stock(activation: nn.Module) -> None:
        """Give `activation`, which went through `from_stock`, its own class back, in place."""
        activation.__class__ = activation._fastln_stock  # type: ignore[assignment]
        del activation._fastln_stock, activation._fastln_kind, activation._fastln_backend

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation to `input`, of any shape."""
        return ops.activation(input, self._fastln_kind, backend=self._fastln_backend)

    def extra_repr(self) -> str:
        """Say which one."""
        return self._fastln_kind


def gated_mlp(
    x: Tensor,
    gate_proj: nn.Module,
    up_proj: nn.Module,
    down_proj: nn.Module,
    kind: ops.ActivationKind,
    *,
    backend: str = "auto",
) -> Tensor:
    """A gated MLP (SwiGLU, GEGLU) that keeps the results of its first two projections and, if they are frozen, no more.

    Args:
        x: `(..., n_cols)`.
        gate_proj: Makes `(..., n_hidden)` of it, which goes through the activation.
        up_proj: Likewise, what the gate is multiplied with.
        down_proj: Applied to the product.
        kind: Which activation.
        backend: A name from `fastln.ops.backends.BACKENDS`.
    """
    return down_proj(ops.gated_activation(gate_proj(x), up_proj(x), kind, backend=backend))
