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
